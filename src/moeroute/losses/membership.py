"""Teaches a predictor which tokens were chosen, so that later tokens need not be known.

    L = mean over real tokens of BCE(sigmoid(q_t), 1 if token t ran)

Source: Mixture-of-Depths: Dynamically Allocating Compute in Transformer-Based Language Models,
Raposo et al., 2024, arXiv 2404.02258, section 3.5; from general knowledge of the method.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import cross_entropy

from moeroute.depth_types import DepthRecord
from moeroute.losses.masked import masked_mean, real_tokens_only
from moeroute.types import RoutingRecord


@dataclass(frozen=True, kw_only=True, slots=True)
class MembershipLoss:
    """The cross-entropy of a depth router's logits against what its tokens did.

    ln 2 where the predictor knows nothing, 0 where it foretells all; 0 without real tokens. Padding
    is left out. The gradient reaches the logits alone.

    Args:
        weight: Coefficient in the total, which takes the mean over the layers that ask for it.

    Shapes:
        router_logits: (B, S, A); num_executions: (B, S); the loss is a scalar.

    Raises:
        ValueError: The layer routes no depth by token.
    """

    weight: float = 0.01

    def __call__(self, record: RoutingRecord) -> Tensor:
        """The loss of one layer: a scalar, unweighted."""
        depth = record.depth if isinstance(record, DepthRecord) else None
        if depth is None or depth.num_executions.ndim != 2:
            raise ValueError(
                f"{record.site}: MembershipLoss needs a layer that decides token by token, such as "
                "TokenDepthLayer"
            )
        logits = real_tokens_only(depth.router_logits.flatten(0, 1), record.token_mask)
        each = cross_entropy(logits, depth.num_executions.flatten(), reduction="none")
        return masked_mean(each, record.token_mask)
