"""`grouped_lora` equals a loop over experts, with one adapter and with several."""

from typing import Any

import pytest
import routed_cases
import torch
from tolerances import assert_close
from torch import Tensor

from moeroute_kernels import (
    expert_sort,
    grouped_lora,
    grouped_mm,
    lora_dense,
    lora_form,
    virtual_experts,
)

SIZES = {"odd": [3, 5, 0, 7, 2], "idle": [0, 4, 0], "none": [0, 0], "many": [40, 25]}
DTYPES = [torch.float64, torch.float32, torch.bfloat16]


def make(sizes: list[int], dtype: torch.dtype, tail: int = 2) -> tuple[list[Tensor], Tensor]:
    experts, rank, width, out = len(sizes), 3, 21, 17
    rows = sum(sizes) + tail
    tensors = [torch.randn(rows, out), torch.randn(rows, width)]
    tensors += [torch.randn(experts, rank, width) * width**-0.5, torch.randn(experts, out, rank)]
    ends = torch.tensor(sizes).cumsum(0).int()
    return [tensor.to(dtype).requires_grad_() for tensor in tensors], ends


def by_loop(
    base: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, ends: Tensor, scaling: float
) -> Tensor:
    pieces, start = [], 0
    for expert, end in enumerate(ends.tolist()):
        delta = x[start:end] @ lora_a[expert].t() @ lora_b[expert].t()
        pieces.append(base[start:end] + scaling * delta)
        start = end
    return torch.cat([*pieces, base[start:]])


@pytest.mark.parametrize("name", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tail", [0, 2], ids=["dense", "grouped"])
def test_equals_a_loop(name: str, dtype: torch.dtype, tail: int):
    tensors, ends = make(SIZES[name], dtype, tail)
    exact = [tensor.detach().double().requires_grad_() for tensor in tensors]
    seen, expected = grouped_lora(*tensors, ends, 1.5), by_loop(*exact, ends, 1.5)
    assert_close("gated_lora", seen, expected)
    gradient = torch.randn(seen.shape).to(dtype)
    found = torch.autograd.grad(seen, tensors, gradient)
    right = torch.autograd.grad(expected, exact, gradient.double())
    for a, b in zip(found, right, strict=True):
        assert_close("gated_lora", a, b, dtype=dtype)


@pytest.mark.parametrize(("tail", "rows", "dense"), [(0, 3, True), (2, 3, False), (0, 600, False)])
def test_few_rows_take_the_dense_form(
    tail: int, rows: int, dense: bool, monkeypatch: pytest.MonkeyPatch
):
    taken = []
    own = lora_dense.forward_if_filled

    def watched(*given: Any) -> Tensor | None:
        out = own(*given)
        taken.append(out is not None)
        return out

    monkeypatch.setattr(lora_dense, "forward_if_filled", watched)
    monkeypatch.setattr(lora_form, "LOOP_PRODUCTS", 10_000)
    tensors, ends = make([rows, rows, 0], torch.float32, tail)
    grouped_lora(*tensors, ends, 1.0)
    assert any(taken) == dense


def test_factors_as_peft_keeps_them():
    """B rank by rank: (out, R * E); rows and columns of an expert's matrix both have gaps."""
    (base, x, lora_a, lora_b), ends = make([4, 6, 1], torch.float64)
    kept = lora_b.detach().permute(1, 2, 0).flatten(1).requires_grad_()
    seen = grouped_lora(base, x, lora_a, kept.unflatten(1, (-1, 3)).permute(2, 0, 1), ends, 0.5)
    expected = by_loop(base, x, lora_a, lora_b, ends, 0.5)
    assert_close("gated_lora", seen, expected)
    gradient = torch.randn(seen.shape, dtype=torch.float64)
    (found,) = torch.autograd.grad(seen, kept, gradient)
    (right,) = torch.autograd.grad(expected, lora_b, gradient)
    assert_close("gated_lora", found, right.permute(1, 2, 0).flatten(1))


@pytest.mark.parametrize("tail", [0, 2])
def test_a_fresh_adapter_changes_no_bit(tail: int):
    (base, x, lora_a, lora_b), ends = make(SIZES["odd"], torch.bfloat16, tail)
    assert torch.equal(grouped_lora(base, x, lora_a, torch.zeros_like(lora_b), ends, 2.0), base)


@pytest.mark.parametrize("tail", [0, 1])
def test_gradcheck(tail: int):
    tensors, ends = make([2, 0, 3], torch.float64, tail)
    assert torch.autograd.gradcheck(lambda *given: grouped_lora(*given, ends, 0.5), tensors)


def test_several_adapters_share_one_sort_with_the_base():
    tokens, slots, experts, adapters, width, out, rank = 19, 2, 4, 3, 12, 10, 2
    ids = routed_cases.with_empty_slots(tokens, slots, experts)
    own = torch.randint(-1, adapters + 1, (tokens,))
    x, weight = torch.randn(tokens, width), torch.randn(experts, out, width)
    lora_a = torch.randn(experts * adapters, rank, width)
    lora_b = torch.randn(experts * adapters, out, rank)
    virtual = virtual_experts(ids, own, experts, adapters)
    plan = expert_sort(virtual, experts * adapters)
    rows = x[plan.order // slots]
    base = grouped_mm(rows, weight, plan.expert_offsets[adapters - 1 :: adapters])
    seen = grouped_lora(base, rows, lora_a, lora_b, plan.expert_offsets, 0.7)[plan.inverse]
    for slot, row in enumerate(seen):
        token, expert = slot // slots, int(ids.reshape(-1)[slot])
        adapter = int(own[token])
        if not (0 <= expert < experts and 0 <= adapter < adapters):
            assert not row.any()
            continue
        pair = expert * adapters + adapter
        delta = lora_b[pair] @ (lora_a[pair] @ x[token])
        torch.testing.assert_close(row, weight[expert] @ x[token] + 0.7 * delta)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora_b": (5, 3, 17)}, r"lora_a \(5, 3, 21\) and lora_b \(5, 3, 17\) do not fit"),
        ({"base": (19, 16)}, r"base \(19, 16\) must be \(19, 17\)"),
    ],
)
def test_sizes_that_do_not_fit(change: dict[str, tuple[int, ...]], message: str):
    tensors, ends = make(SIZES["odd"], torch.float32)
    given = dict(zip(("base", "x", "lora_a", "lora_b"), tensors, strict=True))
    given |= {name: torch.zeros(shape) for name, shape in change.items()}
    with pytest.raises(ValueError, match=message):
        grouped_lora(**given, expert_offsets=ends, scaling=1.0)
