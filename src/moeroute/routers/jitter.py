"""A score whose tokens are shaken in training.

Axes: T tokens, H hidden, E experts.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor, nn

from moeroute.routers.scores import Score
from moeroute.types import RouterInput


class JitteredScore(nn.Module):
    """Logits of tokens times U(1 - noise, 1 + noise), in training, one draw a token and feature.

    The score alone sees the noise. Activation checkpointing draws the same again, as long as it
    preserves the state of the random generator, which is its default.

    Source: Switch Transformers, Fedus et al., 2021, arXiv 2101.03961, section 2.4.

    Args:
        score: Whose logits.
        noise: Half the width of the uniform distribution, in [0, 1).

    Shapes:
        router_logits: (T, E), of the score.

    Raises:
        ValueError: noise is outside [0, 1).
    """

    score: Score

    def __init__(self, score: Score, *, noise: float = 0.01) -> None:
        super().__init__()
        if not 0.0 <= noise < 1.0:
            raise ValueError(f"noise={noise} is outside [0, 1)")
        self.score = score
        self.noise = noise
        self.num_experts = score.num_experts

    def forward(self, router_input: RouterInput) -> Tensor:
        """Answer (T, E) logits."""
        if not self.training:
            return self.score(router_input)
        tokens = router_input.hidden_states
        wide = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
        shaken = wide * torch.empty_like(wide).uniform_(1 - self.noise, 1 + self.noise)
        return self.score(dataclasses.replace(router_input, hidden_states=shaken))

    def extra_repr(self) -> str:
        """Settings, for `print(model)`."""
        return f"noise={self.noise:g}"
