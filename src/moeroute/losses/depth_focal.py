"""The focal loss of a router of depth, its classes balanced by their effective number.

    w_c     = (1 - beta) / (1 - beta^{n_c}),  alpha_c = w_c / mean over c of w
    L       = - mean over sequences of alpha_y (1 - p_y)^gamma log p_y

Source: Dr.LLM: Dynamic Layer Routing in LLMs, 2025, arXiv 2510.12773; the weights are those of
Class-Balanced Loss Based on Effective Number of Samples, Cui et al., 2019, arXiv 1901.05555.
Differences from the paper: none.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moeroute.depth_types import DepthRecord
from moeroute.types import RoutingRecord


@dataclass(frozen=True, kw_only=True, slots=True)
class DepthFocalLoss:
    """Teaches a router of depth the actions that were found for its prompts.

    Args:
        class_counts: How often each action stands in the training labels; 0 counts as 1. Equal
            counts weigh all actions alike.
        gamma: Power of the focal factor; 0 gives weighted cross-entropy.
        beta: In [0, 1); 0 weighs all actions alike, towards 1 they weigh by inverse frequency.
        weight: Coefficient in the total, which takes the mean over the layers.

    Shapes:
        router_logits: (B, A); the loss is a scalar in their dtype.

    Raises:
        ValueError: A field is out of range; in the call, a layer that was given no labels or has
            another number of actions.
    """

    class_counts: tuple[int, ...]
    gamma: float = 2.0
    beta: float = 0.999
    weight: float = 1.0

    def __post_init__(self) -> None:
        """Check every field."""
        if len(self.class_counts) < 2 or min(self.class_counts) < 0:
            raise ValueError(
                f"class_counts={self.class_counts}; give one count of labels an action"
            )
        if self.gamma < 0.0 or not 0.0 <= self.beta < 1.0:
            raise ValueError(
                f"gamma={self.gamma} and beta={self.beta}; gamma is at least 0, beta in [0, 1)"
            )

    def __call__(self, record: RoutingRecord) -> Tensor:
        """The loss of one layer: a scalar, unweighted."""
        if not isinstance(record, DepthRecord) or record.depth is None or record.labels is None:
            raise ValueError(f"{record.site} was given no depth_labels to learn from")
        logits = record.depth.router_logits
        if logits.shape[-1] != len(self.class_counts):
            raise ValueError(
                f"{record.site} knows {logits.shape[-1]} actions but class_counts speaks of "
                f"{len(self.class_counts)}"
            )
        labels = record.labels.to(logits.device)[:, None]
        chosen = logits.log_softmax(-1).gather(1, labels)[:, 0]
        alpha = effective_weights(self.class_counts, self.beta).to(logits)[labels[:, 0]]
        focal = (1 - chosen.exp()).clamp(min=0.0) ** self.gamma
        return -(alpha * focal * chosen).mean()


def effective_weights(class_counts: tuple[int, ...], beta: float) -> Tensor:
    """(A,) float64 weights by the effective number of samples, 1 on average."""
    counts = torch.tensor(class_counts, dtype=torch.float64).clamp(min=1.0)
    weights = (1 - beta) / (1 - beta**counts)
    return weights / weights.mean()
