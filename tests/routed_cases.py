"""Inputs for the routed ops: named cases of sizes and routing, and both sides of a comparison.

Axes: T tokens, K slots per token, E experts, H hidden, I intermediate.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from moeroute_kernels import reference, routed_mlp
from moeroute_kernels.activations import ACTIVATIONS

Routing = Callable[[int, int, int], Tensor]


def distinct(tokens: int, slots: int, experts: int) -> Tensor:
    """A token's slots go to different experts."""
    return torch.rand(tokens, experts).topk(slots).indices


def with_empty_slots(tokens: int, slots: int, experts: int) -> Tensor:
    """Some slots are empty, by every kind of id that means it; token 0 has none filled."""
    ids = torch.randint(0, experts, (tokens, slots))
    outside = torch.tensor([-1, experts, experts + 7, -(2**63), 2**63 - 1])
    hole = torch.rand(tokens, slots) < 0.4
    ids = torch.where(hole, outside[torch.randint(0, 5, (tokens, slots))], ids)
    ids[:1] = experts
    return ids


def crowded(tokens: int, slots: int, experts: int) -> Tensor:
    """Every slot of every token goes to one expert, so ids repeat within a token."""
    return torch.full((tokens, slots), experts // 2)


def nowhere(tokens: int, slots: int, experts: int) -> Tensor:
    """All slots are empty."""
    return torch.full((tokens, slots), experts)


@dataclass(frozen=True)
class Case:
    """One routed MLP."""

    tokens: int
    slots: int
    experts: int
    hidden: int
    width: int
    routing: Routing = distinct
    activation: str = "silu_glu"
    limit: float = 1.0
    bias: bool = False
    transposed: bool = False
    interleaved: bool = False
    dtype: torch.dtype = torch.float32

    def but(self, **changes: Any) -> "Case":
        """The same case with some fields changed."""
        return replace(self, **changes)


CASES = {
    "even": Case(64, 2, 8, 64, 32),
    "odd sizes": Case(65, 2, 8, 97, 47),
    "odd number of experts": Case(64, 2, 7, 128, 64),
    "one slot": Case(40, 1, 8, 64, 32),
    "one token": Case(1, 4, 8, 64, 48),
    "no token": Case(0, 2, 4, 16, 8),
    "every expert": Case(9, 4, 4, 24, 16),
    "one expert": Case(17, 1, 1, 48, 24),
    "idle experts": Case(3, 2, 16, 32, 16),
    "many rows per expert": Case(96, 2, 4, 256, 64),
    "rows of many sizes": Case(150, 3, 9, 320, 40, lambda t, k, e: distinct(t, k, e) ** 2 // e),
    "empty slots": Case(41, 3, 6, 40, 24, with_empty_slots),
    "one token with empty slots": Case(1, 6, 5, 32, 16, lambda t, k, e: torch.arange(-1, 5)[None]),
    "crowded": Case(37, 3, 5, 64, 32, crowded),
    "one crowded token": Case(1, 3, 5, 64, 32, crowded),
    "nowhere": Case(5, 2, 3, 16, 8, nowhere),
    "one token nowhere": Case(1, 2, 3, 16, 8, nowhere),
}


@dataclass
class Inputs:
    """The tensors of a case; `differentiable` in a fixed order by name."""

    case: Case
    ids: Tensor
    differentiable: dict[str, Tensor]

    def on(self, device: str) -> "Inputs":
        """The same numbers on another device."""
        moved = {
            name: tensor.detach().to(device).requires_grad_()
            for name, tensor in self.differentiable.items()
        }
        return Inputs(self.case, self.ids.to(device), moved)

    def call(self, op: Callable[..., Tensor], tensors: dict[str, Tensor] | None = None) -> Tensor:
        """Call `routed_mlp` or its reference."""
        given = dict(self.differentiable if tensors is None else tensors)
        if self.case.transposed:
            given["gate_up"] = given["gate_up"].transpose(1, 2)
            given["down"] = given["down"].transpose(1, 2)
        x, gate_up, down, weights = (given.pop(k) for k in ("x", "gate_up", "down", "weights"))
        return op(
            x,
            gate_up,
            down,
            self.ids,
            weights,
            activation=self.case.activation,
            interleaved=self.case.interleaved,
            limit=self.case.limit,
            **given,
        )


def make(case: Case) -> Inputs:
    """Draw the tensors of a case: O(1) activations, weights that require grad."""
    rows = case.width * (2 if ACTIVATIONS[case.activation].gated else 1)
    up_shape, down_shape = (
        (case.experts, rows, case.hidden),
        (case.experts, case.hidden, case.width),
    )
    gate_up = torch.randn(up_shape) * case.hidden**-0.5
    down = torch.randn(down_shape) * case.width**-0.5
    if case.transposed:
        gate_up, down = (w.transpose(1, 2).contiguous() for w in (gate_up, down))
    tensors = {"x": torch.randn(case.tokens, case.hidden), "gate_up": gate_up, "down": down}
    if case.bias:
        tensors["gate_up_bias"] = torch.randn(case.experts, rows)
        tensors["down_bias"] = torch.randn(case.experts, case.hidden)
    tensors = {name: tensor.to(case.dtype) for name, tensor in tensors.items()}
    wide = torch.promote_types(case.dtype, torch.float32)
    tensors["weights"] = torch.rand(case.tokens, case.slots).to(wide)
    for tensor in tensors.values():
        tensor.requires_grad_()
    return Inputs(case, case.routing(case.tokens, case.slots, case.experts), tensors)


def both_sides(case: Case, device: str = "cpu") -> dict[str, tuple[Tensor, Tensor]]:
    """Output and every gradient by name: of the op on a device, of the float64 reference."""
    drawn = make(case)
    exact = {k: v.detach().double().requires_grad_() for k, v in drawn.differentiable.items()}
    inputs = drawn.on(device)
    seen, expected = inputs.call(routed_mlp), drawn.call(reference.routed_mlp, exact)
    gradient = torch.randn(expected.shape).to(seen.dtype)
    pairs = zip(
        torch.autograd.grad(seen, list(inputs.differentiable.values()), gradient.to(device)),
        torch.autograd.grad(expected, list(exact.values()), gradient.double()),
        strict=True,
    )
    named = dict(zip(inputs.differentiable, pairs, strict=True))
    return {"output": (seen, expected), **named}
