"""Experts of any kind: a list of modules, run one after the other."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moeroute.ops.dispatch import combine, dispatch, plan_dispatch
from moeroute.types import RouterOutput


class ModuleExperts(nn.Module):
    """E modules, each (rows, H) to (rows, O): the general form, for experts of different kinds.

        y[t] = sum_k w[t, k] expert_e(x[t]),  e = ids[t, k]

    Reads how many rows each expert has, which waits for the device and breaks a
    `torch.compile(fullgraph=True)`, and launches every expert by itself; stacked experts
    (`SwiGLUExperts`, `MLPExperts`) do neither. An expert that nobody chose is called with zero
    rows, so that its parameters get a zero gradient like those of stacked experts.

    Args:
        experts: The modules; expert e is the e-th. They answer row by row: a row's result must not
            depend on the other rows.

    Shapes:
        tokens: (T, H); the output is (T, O) in the dtype that the experts answer in.

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
        """Weighted sum of the chosen experts, one row a token; zero where all slots are empty."""
        plan = plan_dispatch(routing)
        rows = dispatch(tokens, plan)  # (N, H)
        ends = plan.expert_offsets.tolist()
        answers = [
            expert(rows[start:end])
            for expert, start, end in zip(self.experts, [0, *ends], ends, strict=False)
        ]
        empty = answers[0].new_zeros(rows.shape[0] - ends[-1], answers[0].shape[-1])
        return combine(torch.cat([*answers, empty]), routing.routing_weights, plan)
