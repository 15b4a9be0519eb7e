"""Every mixture method over a base whose weights are four bits wide.

The suite's own opaque linears stand for quantised bases where bitsandbytes is not installed.
"""

import pytest
import torch
from contracts.method_cases import ADAPTERS, case_of, small, with_tasks
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import moeroute

pytest.importorskip("bitsandbytes", reason="pip install bitsandbytes")

LINEARS = 14
pytestmark = pytest.mark.parametrize("name", ADAPTERS)


def four_bits(folder):
    """The base in NF4, in training mode: in eval, some CPUs take an inexact path."""
    config = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32
    )
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=config)
    return model.requires_grad_(requires_grad=False).train()


def codes_of(model):
    """The packed weights, by the linear's place."""
    return [
        parameter.detach().clone()
        for parameter in model.parameters()
        if type(parameter).__name__ == "Params4bit"
    ]


def test_trains_saves_and_loads_over_a_base_of_four_bits(name, make_llama, tmp_path):
    make_llama().save_pretrained(tmp_path / "base")
    ids = torch.randint(0, 61, (2, 9))
    batch = with_tasks(name, {"input_ids": ids})
    base = four_bits(tmp_path / "base")
    before = codes_of(base)
    assert len(before) == LINEARS
    expected = base(input_ids=ids).logits
    model = moeroute.wrap_model(base, small(name), task_type="CAUSAL_LM")
    case_of(name).prepare(model)
    assert torch.equal(logits_of(model, batch), expected)
    if case_of(name).trains:
        train(name, model, {**batch, "labels": ids})
    assert all(map(torch.equal, codes_of(model), before))
    model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(four_bits(tmp_path / "base"), tmp_path / "adapter")
    again = moeroute.accept_routing_inputs(again).train()
    assert torch.equal(logits_of(again, batch), logits_of(model, batch))


@torch.no_grad()
def logits_of(model, batch):
    """The answer in training mode, of the same draws at every call."""
    torch.manual_seed(2)
    return model(**batch).logits


def train(name, model, batch):
    """Three steps, which must lower the loss."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = case_of(name).loss_of(model, batch)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    if not case_of(name).waits:
        assert losses[-1] < losses[0]
