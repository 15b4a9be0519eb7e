"""Banks of experts of different ranks, and of experts that share A, against their equations."""

import pytest
import torch
from torch import nn

from moeroute.layers import LoRABank, RaggedLoRABank, SharedDownLoRABank
from moeroute.ops.gates import expert_table, rank_gated_lora


def awake(bank):
    bank = bank.double()
    for parameter in bank.parameters():
        nn.init.normal_(parameter, std=0.5)
    return bank


def routing(tokens=7, slots=2, experts=3):
    ids = torch.randint(0, experts + 1, (tokens, slots))  # E is an empty slot
    return ids, torch.rand(tokens, slots, dtype=torch.double, requires_grad=True)


def ragged(ranks=(2, 0, 3)):
    return RaggedLoRABank(ranks=ranks, scalings=[1.5, 2.0, 0.5], in_features=5, out_features=4)


def shared():
    return SharedDownLoRABank(num_experts=3, r=2, in_features=5, out_features=4, lora_alpha=3.0)


def delta(bank, expert, x):
    if isinstance(bank, RaggedLoRABank):
        own = bank.expert(expert)
        scaling = [1.5, 2.0, 0.5][expert]
        return scaling * (x @ bank.lora_a[own].T) @ bank.lora_b[:, own].T
    heads = bank.lora_b.unflatten(1, (3, 2))
    return bank.scaling * (x @ bank.lora_a.T) @ heads[:, expert].T


@pytest.mark.parametrize("make", [ragged, shared])
def test_output_and_gradients_equal_the_equation(make):
    bank = awake(make())
    x = torch.randn(7, 5, dtype=torch.double, requires_grad=True)
    base = torch.randn(7, 4, dtype=torch.double, requires_grad=True)
    ids, weights = routing()
    ours = bank(base, x, ids, weights)
    rows = []
    for token in range(7):
        row = base[token]
        for expert, weight in zip(ids[token].tolist(), weights[token], strict=True):
            if expert < 3:
                row = row + weight * delta(bank, expert, x[token])
        rows.append(row)
    paper, inputs = torch.stack(rows), [base, x, weights, *bank.parameters()]
    torch.testing.assert_close(ours, paper)
    upstream = torch.randn_like(ours)
    for left, right in zip(
        torch.autograd.grad(ours, inputs, upstream),
        torch.autograd.grad(paper, inputs, upstream),
        strict=True,
    ):
        torch.testing.assert_close(left, right)


@pytest.mark.parametrize("make", [ragged, shared])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_fresh_experts_change_no_bit(make, dtype):
    base, ids = torch.randn(7, 4).to(dtype), torch.randint(0, 3, (7, 2))
    assert torch.equal(make()(base, torch.randn(7, 5).to(dtype), ids, torch.rand(7, 2)), base)


@pytest.mark.parametrize("make", [ragged, shared])
def test_no_tokens(make):
    out = make()(
        torch.zeros(0, 4),
        torch.zeros(0, 5),
        torch.zeros(0, 2, dtype=torch.int64),
        torch.zeros(0, 2),
    )
    assert out.shape == (0, 4)


def test_equal_ranks_equal_the_stacked_bank():
    stacked = awake(LoRABank(num_experts=3, r=2, in_features=5, out_features=4, lora_alpha=4.0))
    same = RaggedLoRABank(ranks=(2, 2, 2), scalings=(2.0,) * 3, in_features=5, out_features=4)
    same = same.double()
    same.load_state_dict(stacked.state_dict())
    ids, weights = routing()
    inputs = torch.randn(7, 4).double(), torch.randn(7, 5).double(), ids, weights
    torch.testing.assert_close(same(*inputs), stacked(*inputs))


def test_one_head_is_plain_lora():
    bank = awake(
        SharedDownLoRABank(num_experts=1, r=2, in_features=5, out_features=4, lora_alpha=2)
    )
    x, base = torch.randn(3, 5).double(), torch.randn(3, 4).double()
    ids = torch.zeros(3, 1, dtype=torch.int64)
    ours = bank(base, x, ids, torch.ones(3, 1).double())
    torch.testing.assert_close(ours, base + x @ bank.lora_a.T @ bank.lora_b.T)


@pytest.mark.parametrize("ranks", [(), (1, -1, 2), (1, 2)])
def test_bad_ranks(ranks):
    with pytest.raises(ValueError, match="one rank of 0 or more"):
        ragged(ranks)


def test_a_table_adds_repeated_experts_and_drops_empty_slots():
    ids = torch.tensor([[0, 0], [2, 3], [-1, 1]])
    weights = torch.tensor([[0.25, 0.5], [0.75, float("nan")], [float("nan"), 1.0]])
    expected = torch.tensor([[0.75, 0, 0], [0, 0, 0.75], [0, 1.0, 0]])
    assert torch.equal(expert_table(ids, weights, 3), expected)


def test_block_gates_are_a_mixture_of_loras():
    bank = awake(LoRABank(num_experts=3, r=2, in_features=5, out_features=4, lora_alpha=2.0))
    ids, weights = routing()
    x, base = torch.randn(7, 5).double(), torch.randn(7, 4).double()
    gates = expert_table(ids, weights, 3).repeat_interleave(2, dim=1)
    torch.testing.assert_close(
        rank_gated_lora(base, x, bank.lora_a, bank.lora_b, gates), bank(base, x, ids, weights)
    )
