"""Experts of any kind: a list of modules, run one after the other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moeroute.ops.dispatch import combine, dispatch, plan_dispatch
from moeroute.types import RouterOutput


class ModuleExperts(nn.Module):
    """E modules, each (rows, H) to (rows, H): the general form, for experts of different shapes.

    It reads how many rows each expert has, which waits for the device, and launches every expert by
    itself; stacked experts (`SwiGLUExperts`, `MLPExperts`) do neither.

    Args:
        experts: The modules; expert e is the e-th.

    Raises:
        ValueError: There are none.
    """

    def __init__(self, experts: Sequence[nn.Module]) -> None:
        super().__init__()
        if not experts:
            raise ValueError("experts is empty; pass at least one module")
        self.experts = nn.ModuleList(experts)
        self.num_experts = len(experts)

    def forward(self, tokens: Tensor, routing: RouterOutput) -> Tensor:
        """Weighted sum of the chosen experts: (T, H) to (T, H) in the tokens' dtype."""
        plan = plan_dispatch(routing)
        rows = dispatch(tokens, plan)
        ends = plan.expert_offsets.tolist()
        starts = [0, *ends[:-1]]
        pieces = [
            expert(rows[start:end])
            for expert, start, end in zip(self.experts, starts, ends, strict=True)
        ]
        pieces.append(rows[ends[-1] :].detach())
        return combine(torch.cat(pieces), routing.routing_weights, plan).to(tokens.dtype)
