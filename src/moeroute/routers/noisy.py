"""Noise on the logits of any score.

Axes: T tokens, H hidden, E experts.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from moeroute.routers.scores import linear_logits
from moeroute.types import RouterInput

LEAST_SCALE = 1e-2


class SizedScore(Protocol):
    """A score of tokens of one width."""

    in_features: int
    num_experts: int

    def __call__(self, router_input: RouterInput, /) -> Tensor:
        """Answer (T, E) logits."""
        ...


class NoisyScore(nn.Module):
    """Another score plus, in training, normal noise whose scale each token chooses.

        logits = score(x) + z * (softplus(W_n x) + 0.01),  z ~ N(0, 1), one draw a token and expert

    Source: Shazeer et al., 2017, arXiv 1701.06538, equations 3-5; `NoisyLinearScore` is the case of
    a linear score without the least scale of 0.01, which ports of the paper have.

    Args:
        score: Whose logits.

    Shapes:
        noise_weight: (E, H), zero at first.
        router_logits: (T, E), in training with the noise.
    """

    score: SizedScore

    def __init__(self, score: SizedScore) -> None:
        super().__init__()
        self.score = score
        self.in_features = score.in_features
        self.num_experts = score.num_experts
        self.noise_weight = nn.Parameter(torch.zeros(score.num_experts, score.in_features))

    def forward(self, router_input: RouterInput) -> Tensor:
        """Answer (T, E) logits."""
        logits = self.score(router_input)
        if not self.training:
            return logits
        wish = linear_logits(router_input.hidden_states, self.noise_weight, None, None)
        return logits + torch.randn_like(logits) * (functional.softplus(wish) + LEAST_SCALE)
