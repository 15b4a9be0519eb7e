"""LoRA on the matrices of experts: each row passes through the low-rank pair of its own expert.

    out[r] = base[r] + scaling * B_e A_e x[r],   e = the expert of row r

Nothing as large as an expert's matrix is made: the delta stays factored in forward and backward.
Several adapters live in one call as virtual experts, `virtual_experts`.

Axes: N rows, E experts (or virtual experts), R rank, I in, O out.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moeroute_kernels import lora_dense, lora_form
from moeroute_kernels.grouped_mm import grouped_mm

__all__ = ["grouped_lora", "virtual_experts"]


def grouped_lora(
    base: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    expert_offsets: Tensor,
    scaling: float,
) -> Tensor:
    """Add each expert's LoRA to the output of the frozen grouped product that it adapts.

    Two grouped products and one sum, each differentiable: gradients reach base, x, lora_a and
    lora_b, those that are asked for; an expert without rows gets a zero gradient. Kept for backward
    are x and A x (N, R). On a CPU few rows take the dense form of `gated_lora` instead, two
    products over all E * R ranks. Deterministic; with lora_b at zero the result equals base bit for
    bit.

    Args:
        base: (N, O), what the frozen experts answered.
        x: (N, I) rows in expert order, what they were asked.
        lora_a: (E, R, I), the dtype of x, any strides.
        lora_b: (E, O, R), likewise.
        expert_offsets: (E,) inclusive ends, as `expert_sort` gives them.
        scaling: Multiplies the low-rank product.

    Returns:
        (N, O) in the dtype of base; rows past expert_offsets[-1] are those of base.

    Raises:
        ValueError: shapes or dtypes do not fit.
    """
    if lora_a.ndim != 3 or lora_b.ndim != 3 or lora_b.shape[::2] != lora_a.shape[:2]:
        raise ValueError(
            f"grouped_lora: lora_a {tuple(lora_a.shape)} and lora_b {tuple(lora_b.shape)} do not "
            "fit; give (E, R, I) and (E, O, R)"
        )
    if base.shape != (x.shape[0], lora_b.shape[1]):
        raise ValueError(
            f"grouped_lora: base {tuple(base.shape)} must be {(x.shape[0], lora_b.shape[1])}, one "
            "row per row of x, as wide as lora_b"
        )
    dense = _dense(base, x, lora_a, lora_b, expert_offsets, scaling)
    if dense is not None:
        return dense
    if 1 not in lora_b.stride()[1:]:  # each expert's product would copy its matrix
        lora_b = lora_b.contiguous()
    delta = grouped_mm(grouped_mm(x, lora_a, expert_offsets), lora_b, expert_offsets)
    wide = torch.promote_types(torch.promote_types(base.dtype, delta.dtype), torch.float32)
    return torch.add(base.to(wide), delta, alpha=scaling).to(base.dtype)


def _dense(
    base: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, ends: Tensor, scaling: float
) -> Tensor | None:
    """The dense form, or None where it is slower, or cannot be had: rows past the last expert."""
    rows, tensors = x.shape[0], (base, x, lora_a, lora_b)
    if not (lora_form.runs_directly(x) and all(map(lora_form.is_plain, tensors))):
        return None
    if torch.is_autocast_enabled("cpu") or x.dtype == torch.float16 or lora_a.dtype != x.dtype:
        return None
    if not (rows and lora_form.dense_rows_are_faster(lora_a, rows, base.shape[1])):
        return None
    places = torch.arange(rows, dtype=ends.dtype)
    ids = torch.searchsorted(ends, places, right=True).unsqueeze(1)
    pairs = (lora_a, lora_b.transpose(0, 1))
    return lora_dense.forward_if_filled(base, x, *pairs, ids, x.new_ones(rows, 1), scaling, x.dtype)


def virtual_experts(
    selected_experts: Tensor, adapters: Tensor, num_groups: int, num_adapters: int
) -> Tensor:
    """Number the pairs of an expert and an adapter, so that one sort serves both.

    Rows sorted by `expert * num_adapters + adapter` are sorted by expert as well: with `ends` of
    the virtual experts, the experts' own are `ends[num_adapters - 1 :: num_adapters]`.

    Args:
        selected_experts: (T, K) integers; anything outside [0, num_groups) is an empty slot.
        adapters: (T,) integers, the adapter of each token.
        num_groups: E.
        num_adapters: Adapters whose stacks lie behind each other per expert: lora_a is (E * A, R,
            I), that of expert e and adapter a at e * A + a.

    Returns:
        (T, K) int64 in [0, E * A), and E * A for an empty slot or an adapter outside [0, A).
    """
    ids, own = selected_experts.long(), adapters.long().unsqueeze(1)
    known = (ids >= 0) & (ids < num_groups) & (own >= 0) & (own < num_adapters)
    return torch.where(known, ids * num_adapters + own, num_groups * num_adapters)
