"""The router anchor of single-expert unlearning: keep the target chosen while it is trained.

    L = mean over tokens of |p_t - a|^2,  a = 1 / M on the M targets, 0 elsewhere

Source: UOE: Unlearning One Expert Is Enough For Mixture-of-Experts LLMs (later SEUF), Zhuang et
al., 2024, arXiv 2411.18797; from descriptions of the paper, the use on a batch of forget text
alone is our own reading.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moeroute.losses.masked import masked_mean, real_tokens_only
from moeroute.ops.probs import softmax_probs
from moeroute.types import RoutingRecord


@dataclass(frozen=True, kw_only=True, slots=True)
class AnchorLoss:
    """Holds a router on the experts that are being unlearned.

    0 where every token gives the targets all its probability, evenly; 1/M - 1/E where all
    probabilities are equal; 0 without real tokens. The gradient raises the logits of targets.
    Padding is left out.

    Args:
        experts: Ids of the targets. The paper finds one to be best.
        weight: Coefficient in the total, which takes the mean over the layers that ask for it.
            Default of the paper: 1.
        probs: Logits to probabilities whose rows sum to 1; for sigmoid routers
            `moeroute.routers.normalized_sigmoid_probs`.

    Shapes:
        router_logits: (T, E); the loss is a scalar in their dtype.

    Raises:
        ValueError: There is no target, or one is no expert of the layer.
    """

    experts: tuple[int, ...] = (0,)
    weight: float = 1.0
    probs: Callable[[Tensor], Tensor] = field(default=softmax_probs, repr=False)

    def __post_init__(self) -> None:
        """Check the targets."""
        if not self.experts or min(self.experts) < 0 or len({*self.experts}) < len(self.experts):
            raise ValueError(f"AnchorLoss: experts={self.experts}; name distinct ids from 0 up")

    def __call__(self, record: RoutingRecord) -> Tensor:
        """The loss of one layer: a scalar, unweighted."""
        size = record.routing.num_experts
        if max(self.experts) >= size:
            raise ValueError(
                f"{record.site}: AnchorLoss got experts={self.experts}, but there are {size}: ids "
                f"go from 0 to {size - 1}"
            )
        probs = self.probs(real_tokens_only(record.routing.router_logits, record.token_mask))
        anchor = torch.zeros_like(probs[:1]).index_fill(
            1, torch.tensor(self.experts, device=probs.device), 1.0 / len(self.experts)
        )
        return masked_mean((probs - anchor).square().sum(-1), record.token_mask)
