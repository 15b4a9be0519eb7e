"""Wrap a checkpoint with a mixture of LoRA experts: python wrap_checkpoint.py [CHECKPOINT]."""

import sys

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

import moeroute
from moeroute.methods import MixLoRA

if len(sys.argv) > 1:
    model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
else:  # a small random Llama, so that the example runs without any download
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=512, hidden_size=64, intermediate_size=128, num_hidden_layers=2)
    )

model = moeroute.wrap_model(model, MixLoRA(r=8, num_experts=8, top_k=2), task_type="CAUSAL_LM")
model.print_trainable_parameters()

input_ids = torch.randint(model.config.vocab_size, (2, 32))
output = model(input_ids=input_ids, labels=input_ids)  # the loss holds the balance loss
output.loss.backward()

with moeroute.track_routing(model) as stats, torch.no_grad():
    model(input_ids=input_ids)
print(stats.summary())
