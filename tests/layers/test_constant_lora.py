"""A bank under constant weights is one plain LoRA."""

import pytest
import torch
from torch import nn

from moeroute.layers.averaged_bank import AveragedLoRABank
from moeroute.layers.constant_lora import constant_lora, num_slots
from moeroute.layers.lora_bank import LoRABank
from moeroute.layers.ragged_bank import RaggedLoRABank
from moeroute.layers.shared_down_bank import SharedDownLoRABank

E, I, O, T = 3, 5, 4, 7  # noqa: E741
WIDTHS = {"in_features": I, "out_features": O}
BANKS = {
    "bank": lambda: LoRABank(num_experts=E, r=2, lora_alpha=3, **WIDTHS),
    "ragged": lambda: RaggedLoRABank(ranks=[2, 0, 3], scalings=[0.5, 9.0, 2.0], **WIDTHS),
    "shared_down": lambda: SharedDownLoRABank(num_experts=E, r=2, lora_alpha=3, **WIDTHS),
}
RANKS = {"bank": [2, 2, 2], "ragged": [2, 0, 3]}


@pytest.fixture(params=BANKS)
def name(request):
    return request.param


def filled(name):
    torch.manual_seed(0)
    bank = BANKS[name]().double()
    nn.init.normal_(bank.lora_b)
    return bank


@pytest.mark.parametrize("weights", [[0.2, 0.5, 0.3], [0.0, 0.0, 1.0], [-0.7, 1.3, 0.0], [0.0] * 3])
def test_equals_the_bank_with_those_weights(name, weights):
    bank, linear = filled(name), nn.Linear(I, O).double()
    x = torch.randn(2, T, I, dtype=torch.float64)
    every = torch.arange(E).expand(2 * T, E)
    routing = torch.tensor(weights, dtype=torch.float64).expand(2 * T, E)
    expected = bank(linear(x).flatten(0, 1), x.flatten(0, 1), every, routing).view(2, T, O)
    lora = constant_lora(bank, torch.tensor(weights))
    torch.testing.assert_close(lora(x, linear), expected, rtol=1e-6, atol=1e-6)
    used = [expert for expert in range(E) if weights[expert]]
    if name == "shared_down":
        assert lora.r == (2 if used else 0)
    else:
        assert lora.r == sum(RANKS[name][expert] for expert in used)
    assert not lora.lora_a.requires_grad


def test_one_expert_is_its_own_matrices_bit_for_bit():
    bank = filled("ragged")
    lora = constant_lora(bank, torch.tensor([0.0, 0.0, 1.0]))
    assert torch.equal(lora.lora_a, bank.lora_a[2:])
    assert torch.equal(lora.lora_b, bank.lora_b[:, 2:])
    assert lora.scaling == 2.0


@pytest.mark.parametrize("weights", [[0.2, 0.5, 0.3, 0.1, 0.0, 0.9], [0, 0, 1, 0, 0, 1], [0] * 6])
def test_experts_that_are_averaged_by_head(weights):
    torch.manual_seed(0)
    bank = AveragedLoRABank(
        num_experts=E, r=2, in_features=6, out_features=O, scaling=0.5, heads=2
    ).double()
    nn.init.normal_(bank.lora_b)
    linear, x = nn.Linear(6, O).double(), torch.randn(2, T, 6, dtype=torch.float64)
    constant = torch.tensor(weights, dtype=torch.float64)
    assert num_slots(bank) == len(weights)
    lora = constant_lora(bank, constant)
    expected = bank(linear(x), x, constant.view(1, 2, E).expand(2, 2, E))
    torch.testing.assert_close(lora(x, linear), expected)
    assert lora.r == (2 if any(weights) else 0)
    assert not lora.lora_a.requires_grad
