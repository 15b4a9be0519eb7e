"""Experts whose output is of another width than their input, for a branch of a layer.

Axes: E experts, H hidden, I intermediate, O output, T tokens, N = T * K rows.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from moeroute.ops.dispatch import combine, dispatch, plan_dispatch
from moeroute.ops.expert_mm import grouped_mm
from moeroute.types import RouterOutput


class BranchExperts(nn.Module):
    """E plain feed-forward blocks with a leaky ReLU, from H features to O.

        y[t] = sum_k w[t, k] (down_e leaky_relu(up_e x[t] + b_e) + c_e),  e = ids[t, k]

    Args:
        num_experts: E.
        hidden_size: H.
        intermediate_size: I of one expert.
        out_features: O.

    Shapes:
        up_proj: (E, I, H); up_proj_bias: (E, I); down_proj: (E, O, I); down_proj_bias: (E, O).
        tokens: (T, H); the output is (T, O).

    Raises:
        ValueError: A size is below 1.
    """

    def __init__(
        self, num_experts: int, hidden_size: int, intermediate_size: int, out_features: int
    ) -> None:
        super().__init__()
        sizes = (num_experts, hidden_size, intermediate_size, out_features)
        if min(sizes) < 1:
            raise ValueError(
                f"num_experts, hidden_size, intermediate_size, out_features = {sizes}: all are at "
                "least 1"
            )
        self.num_experts = num_experts
        self.hidden_size = hidden_size
        self.up_proj = nn.Parameter(torch.empty(num_experts, intermediate_size, hidden_size))
        self.up_proj_bias = nn.Parameter(torch.zeros(num_experts, intermediate_size))
        self.down_proj = nn.Parameter(torch.empty(num_experts, out_features, intermediate_size))
        self.down_proj_bias = nn.Parameter(torch.zeros(num_experts, out_features))
        for weight in (self.up_proj, self.down_proj):
            bound = 1.0 / math.sqrt(weight.shape[2])
            nn.init.uniform_(weight, -bound, bound)

    def forward(self, tokens: Tensor, routing: RouterOutput) -> Tensor:
        """Weighted sum of the chosen experts, one row a token; zero where all slots are empty."""
        plan = plan_dispatch(routing)
        rows, ends = dispatch(tokens, plan), plan.expert_offsets  # (N, H)
        hidden = functional.leaky_relu(grouped_mm(rows, self.up_proj, ends, self.up_proj_bias))
        answers = grouped_mm(hidden, self.down_proj, ends, self.down_proj_bias)  # (N, O)
        return combine(answers, routing.routing_weights, plan)

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        experts, out, width = self.down_proj.shape
        return (
            f"num_experts={experts}, hidden_size={self.hidden_size}, intermediate_size={width}, "
            f"out_features={out}"
        )
