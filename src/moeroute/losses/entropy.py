"""The entropy loss: how unsure the router is of each token.

    L = mean over tokens of H_q(p_t),  H_q the Tsallis entropy as a fraction of its maximum

Source: DynMoLE, 2025, arXiv 2504.00661; read from the official code. Differences from the code:
padding is left out of the mean, and the entropy is clamped to [0, 1], which its eps can leave by a
few 1e-4.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moeroute.losses.masked import masked_mean, real_tokens_only
from moeroute.ops.entropy import tsallis_entropy
from moeroute.ops.probs import softmax_probs
from moeroute.types import RoutingRecord


@dataclass(frozen=True, kw_only=True, slots=True)
class EntropyLoss:
    """Pushes the router to be sure of each token.

    1 where all probabilities are equal (but for eps), 0 where every token has one expert, for a
    single expert and without real tokens. The gradient flows through the probabilities.

    Args:
        weight: Coefficient in the total, which takes the mean over the layers that ask for it.
        index: q of the Tsallis entropy, above 0; 1 is Shannon's.
        eps: Added to every probability.

    Shapes:
        router_logits: (T, E); the loss is a scalar in the logits' dtype.
    """

    weight: float = 0.01
    index: float = 1.1
    eps: float = 1e-5

    def __call__(self, record: RoutingRecord) -> Tensor:
        """The loss of one layer: a scalar, unweighted."""
        # masked before the softmax: NaN in a padding row would come back through its gradient
        router_logits = real_tokens_only(record.routing.router_logits, record.token_mask)
        probs = softmax_probs(router_logits)
        entropy = tsallis_entropy(probs, index=self.index, eps=self.eps)
        return masked_mean(entropy.clamp(0.0, 1.0), record.token_mask)
