"""What routers are charged that leave out the tokens of least importance.

    guide  L = (share of the guide) * mean over real tokens of CE(z_t, what the rule does with t)
    share  L = (mean over real tokens of P(skip)_t - s)^2

Source: FTP: A Fine-grained Token-wise Pruner for Large Language Models via Token Routing, 2024,
arXiv 2412.11494, names a guide loss and a sparsity constraint; the paper was not read, and both
formulas are our own reading.

Axes: B batch, S sequence, T tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor
from torch.nn.functional import cross_entropy

from moeroute.depth_types import DepthRecord, PrunedTokens
from moeroute.losses.masked import masked_mean, real_tokens_only
from moeroute.types import RoutingRecord


@dataclass(frozen=True, kw_only=True, slots=True)
class GuideLoss:
    """How far a router is from the rule that guides it.

    0 where its logits are certain of what the rule does, once nothing of the guide is left, and
    without real tokens. Padding is left out.

    Args:
        weight: Coefficient in the total, which takes the mean over the layers that ask for it.

    Shapes:
        router_logits: (B, S, 2); guide: (B, S); the loss is a scalar.

    Raises:
        ValueError: The layer's router follows no guide.
    """

    weight: float = 1.0

    def __call__(self, record: RoutingRecord) -> Tensor:
        """The loss of one layer: a scalar, unweighted by the coefficient."""
        depth = _pruned(record, self)
        logits = real_tokens_only(depth.router_logits.flatten(0, 1), record.token_mask)
        each = cross_entropy(logits, depth.guide.flatten(), reduction="none")
        return depth.guide_share * masked_mean(each, record.token_mask)


@dataclass(frozen=True, kw_only=True, slots=True)
class SkipShareLoss:
    """The squared distance of the expected share of skipped tokens from the layer's sparsity.

    0 at the target and without real tokens. Padding is left out. Every layer has a target of its
    own, unlike `SparsityTargetLoss`.

    Args:
        weight: Coefficient in the total, which takes the mean over the layers that ask for it.

    Shapes:
        router_logits: (B, S, 2); the loss is a scalar.

    Raises:
        ValueError: The layer's router has no sparsity.
    """

    weight: float = 10.0

    def __call__(self, record: RoutingRecord) -> Tensor:
        """The loss of one layer: a scalar, unweighted."""
        depth = _pruned(record, self)
        logits = real_tokens_only(depth.router_logits.flatten(0, 1), record.token_mask)
        skips = logits.softmax(-1)[:, 0]
        share = masked_mean(skips, record.token_mask)
        known = masked_mean(skips.new_ones(skips.shape), record.token_mask)  # 0 without real tokens
        return (share - known * depth.sparsity).square()


def _pruned(record: RoutingRecord, loss: GuideLoss | SkipShareLoss) -> PrunedTokens:
    depth = record.depth if isinstance(record, DepthRecord) else None
    if not isinstance(depth, PrunedTokens):
        raise ValueError(
            f"{record.site}: {type(loss).__name__} needs a router that leaves out the least "
            "important tokens, such as FactorRouter"
        )
    return depth
