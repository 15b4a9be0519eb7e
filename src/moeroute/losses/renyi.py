"""The entropy loss in Renyi's form.

    L = mean over tokens of ln(sum_e p_te^a) / ((1 - a) ln E)

Source: Renyi, On Measures of Entropy and Information, 1961; one of the entropies that the official
code of DynMoLE, 2025, arXiv 2504.00661, offers.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moeroute.losses.masked import masked_mean, real_tokens_only
from moeroute.ops.entropy import renyi_entropy
from moeroute.ops.probs import softmax_probs
from moeroute.types import RoutingRecord


@dataclass(frozen=True, kw_only=True, slots=True)
class RenyiLoss:
    """Pushes the router to be sure of each token.

    1 where all probabilities are equal, 0 where every token has one expert, for a single expert and
    without real tokens. Padding is
    left out.

    Args:
        weight: Coefficient in the total, which takes the mean over the layers that ask for it.
        order: a, above 0; 1 is Shannon's entropy.

    Shapes:
        router_logits: (T, E); the loss is a scalar in their dtype.

    Raises:
        ValueError: order is not above 0.
    """

    weight: float = 0.01
    order: float = 2.0

    def __post_init__(self) -> None:
        """Check the order."""
        if self.order <= 0:
            raise ValueError(f"RenyiLoss: order={self.order} is not above 0")

    def __call__(self, record: RoutingRecord) -> Tensor:
        """The loss of one layer: a scalar, unweighted."""
        logits = real_tokens_only(record.routing.router_logits, record.token_mask)
        return masked_mean(
            renyi_entropy(softmax_probs(logits), order=self.order), record.token_mask
        )
