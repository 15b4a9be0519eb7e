"""A score that is a small network.

Axes: T tokens, H hidden, E experts, M width of the network.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moeroute.routers.scores import LinearScore, linear_logits
from moeroute.types import RouterInput


class MLPScore(nn.Module):
    """Logits of two linears with a tanh between them: logits = W_2 tanh(W_1 x).

    Source: the default gate of Mixture-of-Experts Meets In-Context Reinforcement Learning, Wu et
    al., 2025 (T2MIR), whose M is E; a network of zeros would get no gradient, so both start as
    `nn.Linear` does.

    Args:
        in_features: H.
        num_experts: E.
        width: M; None: E.

    Shapes:
        inner.weight: (M, H); outer.weight: (E, M).
        router_logits: (T, E) float32, or float64.

    Raises:
        ValueError: A size is below 1; in forward, tokens of another width.
    """

    def __init__(self, in_features: int, num_experts: int, *, width: int | None = None) -> None:
        super().__init__()
        middle = num_experts if width is None else width
        if middle < 1:
            raise ValueError(f"width={middle} is below 1; a network needs a unit")
        self.in_features = in_features
        self.num_experts = num_experts
        self.inner = LinearScore(in_features, middle, init_std=None)
        self.outer = LinearScore(middle, num_experts, init_std=None)

    def forward(self, router_input: RouterInput) -> Tensor:
        """Answer (T, E) logits."""
        hidden = torch.tanh(self.inner(router_input))
        return linear_logits(hidden, self.outer.weight, None, None)

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        width = self.inner.num_experts
        return f"in_features={self.in_features}, num_experts={self.num_experts}, width={width}"
