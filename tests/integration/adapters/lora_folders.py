"""Ordinary PEFT LoRA adapters of a tiny Llama, saved to folders."""

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

TARGETS = ["q_proj", "v_proj"]


def make_base(**changes):
    torch.manual_seed(0)
    sizes = {
        "vocab_size": 31,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
    }
    return LlamaForCausalLM(LlamaConfig(**(sizes | changes)))


def save_lora(folder, seed=0, base=None, **changes):
    """Save a LoRA adapter with weights of some size; the folder's path as text."""
    settings = {"r": 3, "lora_alpha": 6, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
    model = get_peft_model(base or make_base(), LoraConfig(**(settings | changes)))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return str(folder)
