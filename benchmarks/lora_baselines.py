"""A mixture of LoRA over one linear, written the four usual ways in plain autograd torch.

Every peer takes `(base, x, lora_a, lora_b, selected_experts, routing_weights, scaling)` and returns
base + scaling * sum_k w_k B_{e_k} A_{e_k} x, as `moeroute_kernels.gated_lora` does. Each is written
as well as its form allows: no expert is indexed under autograd (its backward would build a gradient
of the whole stack per expert), gates are applied in rank space, products add into base.

Axes: T tokens, K slots per token, N = T * K rows, E experts, R rank of one expert, I in, O out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor
from torch.nn import functional as F

__all__ = [
    "PEERS",
    "SHAPES",
    "LoRAShape",
    "dense_stacked",
    "grouped",
    "make_inputs",
    "masked_loop",
    "naive_loop",
]

USUAL_WIDTH = 1024
Mixture = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, float], Tensor]


@dataclass(frozen=True, slots=True)
class LoRAShape:
    """One row of the comparison.

    Attributes:
        tokens: T.
        num_experts: E.
        top_k: K.
        r: Rank of one expert.
        width: I and O of the linear, in features.
    """

    tokens: int
    num_experts: int
    top_k: int
    r: int
    width: int = USUAL_WIDTH

    @property
    def name(self) -> str:
        """Short name, as it stands in the tables; an unusual width is part of it."""
        wide = "" if self.width == USUAL_WIDTH else f"-d{self.width}"
        return f"E{self.num_experts}k{self.top_k}r{self.r}{wide}"


SHAPES = [
    LoRAShape(1024, 4, 2, 8),
    LoRAShape(1024, 8, 2, 16),
    LoRAShape(1024, 8, 2, 64),
    LoRAShape(1024, 16, 2, 16),
    LoRAShape(1024, 16, 4, 64),
    LoRAShape(64, 4, 2, 8),
    LoRAShape(64, 16, 2, 16),
]


def make_inputs(shape: LoRAShape, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, ...]:
    """Inputs of order one, as a layer would hold them: leaves with gradients, LoRA stacks as views.

    Args:
        shape: Sizes.
        dtype: Of base, x and the adapters; the routing weights are float32.
        seed: Of the generator.

    Returns:
        base (T, O), x (T, I), lora_a (E * R, I), lora_b (O, E * R), selected_experts (T, K) with no
        expert twice in a token, routing_weights (T, K) that sum to 1. The floating ones are leaves.
    """
    generator = torch.Generator().manual_seed(seed)
    ranks = shape.num_experts * shape.r

    def normal(rows: int, columns: int, scale: float = 1.0) -> Tensor:
        values = torch.randn((rows, columns), generator=generator) * scale
        return values.to(dtype).requires_grad_()

    logits = torch.randn((shape.tokens, shape.num_experts), generator=generator)
    weights, ids = logits.softmax(-1).topk(shape.top_k, -1)
    return (
        normal(shape.tokens, shape.width),
        normal(shape.tokens, shape.width),
        normal(ranks, shape.width, shape.width**-0.5),
        normal(shape.width, ranks, shape.r**-0.5),
        ids,
        (weights / weights.sum(-1, keepdim=True)).requires_grad_(),
    )


def naive_loop(
    base: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    selected_experts: Tensor,
    routing_weights: Tensor,
    scaling: float,
) -> Tensor:
    """Every expert over every token, weighted by its gate."""
    out = base
    experts = zip(lora_a.unbind(0), lora_b.unbind(1), strict=True)
    for expert, (down, up) in enumerate(experts):
        gate = (routing_weights * (selected_experts == expert)).sum(1, keepdim=True) * scaling
        ranks = F.linear(x, down)
        out = torch.addmm(out, (ranks * gate).to(ranks.dtype), up.t())
    return out


def masked_loop(
    base: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    selected_experts: Tensor,
    routing_weights: Tensor,
    scaling: float,
) -> Tensor:
    """Every expert over its own tokens, found by a mask."""
    out = base
    experts = zip(lora_a.unbind(0), lora_b.unbind(1), strict=True)
    for expert, (down, up) in enumerate(experts):
        token, slot = torch.where(selected_experts == expert)
        if token.numel() == 0:
            continue
        gate = routing_weights[token, slot].unsqueeze(1) * scaling
        ranks = F.linear(x.index_select(0, token), down)
        delta = (ranks * gate).to(ranks.dtype) @ up.t()
        out = out.index_add(0, token, delta)
    return out


def grouped(
    base: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    selected_experts: Tensor,
    routing_weights: Tensor,
    scaling: float,
) -> Tensor:
    """Rows sorted by expert, two grouped products, the deltas added where they belong."""
    experts, slots = lora_a.shape[0], selected_experts.shape[1]
    flat = selected_experts.reshape(-1)
    order = flat.argsort(stable=True)
    ends = flat.bincount(minlength=experts).cumsum(0).int()
    token = order // slots
    ranks = F.grouped_mm(x.index_select(0, token), lora_a.transpose(1, 2), offs=ends)
    gate = routing_weights.reshape(-1).index_select(0, order).unsqueeze(1) * scaling
    delta = F.grouped_mm((ranks * gate).to(ranks.dtype), lora_b.permute(1, 2, 0), offs=ends)
    return base.index_add(0, token, delta)


def dense_stacked(
    base: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    selected_experts: Tensor,
    routing_weights: Tensor,
    scaling: float,
) -> Tensor:
    """One LoRA of rank E * R with gated ranks: two dense products."""
    experts, rank = lora_a.shape[:2]
    gates = routing_weights.new_zeros(x.shape[0], experts)
    gates = gates.scatter_add(1, selected_experts, routing_weights * scaling)
    ranks = F.linear(x, lora_a.flatten(0, 1))
    gated = ranks.view(-1, experts, rank) * gates.unsqueeze(2)
    return torch.addmm(base, gated.to(ranks.dtype).flatten(1), lora_b.flatten(1).t())


PEERS: Mapping[str, Mixture] = MappingProxyType(
    {
        "naive_loop": naive_loop,
        "masked_loop": masked_loop,
        "grouped": grouped,
        "dense_stacked": dense_stacked,
    }
)
