"""Experts that cost next to nothing, after others that compute.

Axes: T tokens, K slots per token, E experts of all kinds, H hidden.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from moeroute.ops.gates import expert_table
from moeroute.routers.scores import LinearScore
from moeroute.types import RouterInput, RouterOutput


class SizedExperts(Protocol):
    """Experts of one width."""

    num_experts: int
    hidden_size: int

    def __call__(self, tokens: Tensor, routing: RouterOutput, /) -> Tensor:
        """Weighted sum of the chosen experts, one row a token."""
        ...


class CheapExperts(nn.Module):
    """Feed-forward experts first, then null, copy and constant experts.

        null:      e(x) = 0
        copy:      e(x) = x
        constant:  e(x) = a x + b v_e,  (a, b) = softmax(W_e x)

    The cheap ones take no row of a grouped product: a slot of theirs is empty for the others.

    Source: MoE++: Accelerating Mixture-of-Experts Methods with Zero-Computation Experts, Jin et
    al., 2024, arXiv 2410.07348, equations 3-5.

    Args:
        experts: The first experts, such as `SwiGLUExperts`.
        num_null: How many experts give nothing.
        num_copy: How many give the token back.
        num_constant: How many mix the token with a vector of their own.

    Shapes:
        constants: (C, H), zero at first; mix.weight: (2C, H).
        tokens: (T, H); the output has its shape. Ids follow the order above.

    Raises:
        ValueError: A number is negative.
    """

    def __init__(
        self,
        experts: SizedExperts,
        *,
        num_null: int = 1,
        num_copy: int = 1,
        num_constant: int = 2,
    ) -> None:
        super().__init__()
        if min(num_null, num_copy, num_constant) < 0:
            raise ValueError(
                f"num_null={num_null}, num_copy={num_copy}, num_constant={num_constant}: none may "
                "be negative"
            )
        self.experts = experts
        self.first_copy = experts.num_experts + num_null
        self.first_constant = self.first_copy + num_copy
        self.num_experts = self.first_constant + num_constant
        self.hidden_size = experts.hidden_size
        self.constants = nn.Parameter(torch.zeros(num_constant, experts.hidden_size))
        self.mix = LinearScore(experts.hidden_size, 2 * num_constant) if num_constant else None

    def forward(self, tokens: Tensor, routing: RouterOutput) -> Tensor:
        """Weighted sum of the chosen experts, one row a token; zero where all slots are empty."""
        ids, weights = routing.selected_experts, routing.routing_weights
        computed = self.experts(tokens, self._for_the_first(routing))
        table = expert_table(ids, weights, self.num_experts)  # (T, E)
        shares = table[:, self.first_copy : self.first_constant].sum(1, keepdim=True)  # of x
        added = tokens.to(shares.dtype)
        if self.mix is not None:
            constant = table[:, self.first_constant :]  # (T, C)
            a, b = self._mixing(tokens).to(shares.dtype).unbind(-1)  # (T, C) each
            shares = shares + (constant * a).sum(1, keepdim=True)
            added = shares * added + (constant * b) @ self.constants.to(shares.dtype)
        else:
            added = shares * added
        # a token of no cheap expert gets nothing of itself, not even NaN times 0
        chosen = (table[:, self.first_copy :] != 0).any(1, keepdim=True)
        return computed + added.masked_fill(~chosen, 0.0).to(computed.dtype)

    def _for_the_first(self, routing: RouterOutput) -> RouterOutput:
        """The routing of the experts that compute; the others' slots are empty."""
        size = self.experts.num_experts
        away = routing.selected_experts >= size
        return RouterOutput(
            router_logits=routing.router_logits[:, :size],
            routing_weights=routing.routing_weights.masked_fill(away, 0.0),
            selected_experts=routing.selected_experts.clamp(max=size),
        )

    def _mixing(self, tokens: Tensor) -> Tensor:
        """(T, C, 2) shares of the token and of the vector."""
        assert self.mix is not None
        wish = self.mix(RouterInput(hidden_states=tokens, sequence_shape=(1, tokens.shape[0])))
        return torch.softmax(wish.unflatten(1, (-1, 2)), dim=-1)

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        copies = self.first_constant - self.first_copy
        return (
            f"num_experts={self.num_experts}, "
            f"num_null={self.first_copy - self.experts.num_experts}, num_copy={copies}, "
            f"num_constant={self.num_experts - self.first_constant}"
        )
