"""Scores made of another score: its logits capped or scaled, its tokens normalised.

Axes: T tokens, H hidden, E experts.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn
from torch.nn import functional

from moeroute.routers.scores import LinearScore
from moeroute.types import RouterInput


class SoftCappedScore(nn.Module):
    """Logits within a bound: cap * tanh(logits / cap).

    Args:
        score: Whose logits.
        cap: The bound, in units of logits; above 0.

    Raises:
        ValueError: cap is not above 0.
    """

    def __init__(self, score: LinearScore, *, cap: float) -> None:
        super().__init__()
        if cap <= 0:
            raise ValueError(f"cap={cap} bounds nothing; use a number above 0")
        self.score = score
        self.cap = cap
        self.num_experts = score.num_experts
        self.in_features = score.in_features

    def forward(self, router_input: RouterInput) -> Tensor:
        """Answer (T, E) logits in (-cap, cap)."""
        return torch.tanh(self.score(router_input) / self.cap) * self.cap

    def extra_repr(self) -> str:
        """Settings, for `print(model)`."""
        return f"cap={self.cap:g}"


class ScaledScore(nn.Module):
    """Logits times a constant: a fixed inverse temperature.

    Args:
        score: Whose logits.
        factor: What they are multiplied by.
    """

    def __init__(self, score: LinearScore, *, factor: float) -> None:
        super().__init__()
        self.score = score
        self.factor = factor
        self.num_experts = score.num_experts
        self.in_features = score.in_features

    def forward(self, router_input: RouterInput) -> Tensor:
        """Answer (T, E) logits."""
        return self.score(router_input) * self.factor

    def extra_repr(self) -> str:
        """Settings, for `print(model)`."""
        return f"factor={self.factor:g}"


class NormedScore(nn.Module):
    """Linear logits of tokens of unit root mean square, each feature scaled (Gemma 4).

        logits = W (g * x / rms(x) / sqrt(H))

    Args:
        score: Whose logits.
        eps: Added to the mean square.

    Shapes:
        scale: (H,), g, ones at first.
        router_logits: (T, E) float32, or float64.
    """

    def __init__(self, score: LinearScore, *, eps: float = 1e-6) -> None:
        super().__init__()
        self.score = score
        self.eps = eps
        self.num_experts = score.num_experts
        self.in_features = score.in_features
        self.scale = nn.Parameter(torch.ones(score.in_features))

    def forward(self, router_input: RouterInput) -> Tensor:
        """Answer (T, E) logits."""
        tokens = router_input.hidden_states
        wide = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
        unit = functional.rms_norm(wide, wide.shape[-1:], eps=self.eps)
        scaled = unit * self.scale * self.in_features**-0.5
        return self.score(dataclasses.replace(router_input, hidden_states=scaled))

    def extra_repr(self) -> str:
        """Settings, for `print(model)`."""
        return f"eps={self.eps:g}"
