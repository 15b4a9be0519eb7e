"""Which form `gated_lora` takes, and which sizes belong together.

Axes: T tokens, K slots per token, E experts, R rank of one expert, I in, O out.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

__all__ = [
    "DENSE_RANKS",
    "DENSE_RANKS_BFLOAT16",
    "check_sizes",
    "dense_is_faster",
    "dense_rows_are_faster",
    "is_plain",
    "runs_dense",
    "runs_directly",
]

DENSE_RANKS = 160
DENSE_RANKS_BFLOAT16 = 1024
"""Ranks that the dense form may compute beyond the K * R that are needed; measured.

Where bfloat16 has matrix units, products cost a quarter and moving rows about costs the same.
"""
LOOP_PRODUCTS = 5_000_000
LOOP_PRODUCTS_BFLOAT16 = 40_000_000
"""Multiply-adds of both products that take as long as one expert's turn in the sorted form."""


def runs_dense(lora_a: Tensor, selected_experts: Tensor) -> bool:
    """Whether the dense form is used: a matter of static sizes, never of the number of tokens.

    Args:
        lora_a: (E, R, I).
        selected_experts: (T, K).

    Returns:
        True when all ranks together are few enough, or every expert has a slot anyway.
    """
    experts, rank = lora_a.shape[:2]
    unused = experts - min(selected_experts.shape[1], experts)
    return unused * rank <= _most_ranks(lora_a)


def _most_ranks(lora_a: Tensor) -> int:
    return DENSE_RANKS_BFLOAT16 if lora_a.dtype == torch.bfloat16 else DENSE_RANKS


def dense_is_faster(lora_a: Tensor, tokens: int, slots: int, outs: int) -> bool:
    """Whether dense products win on a CPU: as `runs_dense` has it, and where tokens are few."""
    experts, rank, ins = lora_a.shape
    unused = (experts - min(slots, experts)) * rank
    few = tokens * unused * (ins + outs) <= LOOP_PRODUCTS * experts
    return few or unused <= _most_ranks(lora_a)


def dense_rows_are_faster(lora_a: Tensor, rows: int, outs: int) -> bool:
    """Whether dense products win on a CPU for rows in expert order, one expert a row."""
    experts, rank, ins = lora_a.shape
    extra = rows * (experts - 1) * rank * (ins + outs)
    turn = LOOP_PRODUCTS_BFLOAT16 if lora_a.dtype == torch.bfloat16 else LOOP_PRODUCTS
    return extra <= turn * min(rows, experts)


def runs_directly(tensor: Tensor) -> bool:
    """Tell whether nobody watches or traces a CPU tensor, so that dispatch may be left out.

    Dispatch and the autograd of a custom op cost 0.2 ms, as much as all the products of 64 tokens
    over 32 ranks. Only on a CPU: another device may have a kernel of its own under the op's name.
    """
    watched = torch.compiler.is_compiling() or is_in_torch_dispatch_mode()
    return not watched and tensor.is_cpu and is_plain(tensor)


def is_plain(tensor: Tensor) -> bool:
    """Tell whether a tensor is torch's own and no subclass."""
    return type(tensor) in (Tensor, torch.nn.Parameter)


def check_sizes(
    base: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, ids: Tensor, weights: Tensor
) -> tuple[int, int, int]:
    """Check that sizes belong together.

    Args:
        base: (T, O).
        x: (T, I).
        lora_a: (E, R, I).
        lora_b: (O, E, R).
        ids: (T, K).
        weights: (T, K).

    Returns:
        T, K and O.

    Raises:
        ValueError: The first that does not fit, with what was seen and what is allowed.
    """
    if lora_a.dim() == 3 and ids.dim() == 2:
        (tokens, slots), (experts, rank, ins), outs = ids.shape, lora_a.shape, lora_b.shape[0]
        if (
            x.shape == (tokens, ins)
            and base.shape == (tokens, outs)
            and lora_b.shape == (outs, experts, rank)
            and weights.shape == (tokens, slots)
            and weights.is_floating_point()
            and not ids.is_floating_point()
        ):
            return tokens, slots, outs
    raise ValueError(_what_does_not_fit(base, x, lora_a, lora_b, ids, weights))


def _what_does_not_fit(
    base: Tensor, x: Tensor, lora_a: Tensor, lora_b: Tensor, ids: Tensor, weights: Tensor
) -> str:
    if lora_a.dim() != 3 or lora_b.dim() != 3 or lora_b.shape[1:] != lora_a.shape[:2]:
        return (
            f"gated_lora: lora_a {tuple(lora_a.shape)} and lora_b {tuple(lora_b.shape)} must be "
            "(E, R, I) and (O, E, R)"
        )
    ins, outs = lora_a.shape[2], lora_b.shape[0]
    if x.dim() != 2 or x.shape[1] != ins:
        return f"gated_lora: x {tuple(x.shape)} must be (T, {ins}), as wide as lora_a"
    tokens = x.shape[0]
    if base.shape != (tokens, outs):
        return (
            f"gated_lora: base {tuple(base.shape)} must be ({tokens}, {outs}), "
            "one row per token of x, as wide as lora_b"
        )
    if ids.dim() != 2 or ids.shape[0] != tokens or weights.shape != ids.shape:
        return (
            f"gated_lora: selected_experts {tuple(ids.shape)} and routing_weights "
            f"{tuple(weights.shape)} must both be ({tokens}, K)"
        )
    return (
        f"gated_lora: selected_experts ({ids.dtype}) must be integers and routing_weights "
        f"({weights.dtype}) floating"
    )
