"""A bias that decides who is chosen but not how much: balance without a loss."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class SelectionBias(nn.Module):
    """One float32 number an expert, added to probabilities for choosing only.

    Source: Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts, Wang et al., 2024,
    arXiv 2408.15664. It is a buffer: no gradient reaches it, and it is saved.

    Args:
        num_experts: E.

    Shapes:
        e_score_correction_bias: (E,) float32, zero at first; the name that checkpoints use.
    """

    e_score_correction_bias: Tensor

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        self.register_buffer(
            "e_score_correction_bias", torch.zeros(num_experts, dtype=torch.float32)
        )

    def forward(self, router_probs: Tensor) -> Tensor:
        """(T, E) probabilities to (T, E) choosing scores."""
        return router_probs + self.e_score_correction_bias
