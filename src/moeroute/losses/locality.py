"""BlockFFN's activation locality: a token's experts foretell the next token's.

    L = mean over neighbours t, t+1 and experts of BCE(sigmoid(a z_t), sigmoid(a z_{t+1}))

Source: BlockFFN: Towards End-Side Acceleration-Friendly Mixture-of-Experts with Chunk-Level
Activation Sparsity, Song et al., 2025, arXiv 2507.08771; read with the official code: a token
foretells the one after it, and the gradient reaches both. Differences from the paper: documents
packed into one sample are not told apart, so that the pair at their border counts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from moeroute.losses.masked import real_tokens_only
from moeroute.losses.samples import sample_shape
from moeroute.types import RoutingRecord


@dataclass(frozen=True, kw_only=True, slots=True)
class LocalityLoss:
    """Makes tokens that follow each other share experts, for routers that choose by sign.

    ln 2 where all logits are 0, near 0 where neighbours agree by a margin, about
    sharpness * |logit| times the share of experts that change otherwise. 0 without a pair. Pairs
    with padding, and those of two samples, are left out.

    Args:
        weight: Coefficient in the total, which takes the mean over the layers that ask for it.
            Default of the paper: 2e-3 (1e-3 for its 0.8B model).
        sharpness: a, how soon a logit counts as on or off. Default of the paper: 100.

    Shapes:
        router_logits: (B * S, E); the loss is a scalar in their dtype.

    Raises:
        ValueError: The layer was not told samples from tokens.
    """

    weight: float = 2e-3
    sharpness: float = 100.0

    def __call__(self, record: RoutingRecord) -> Tensor:
        """The loss of one layer: a scalar, unweighted."""
        shape, mask = sample_shape(record, self), record.token_mask
        logits = real_tokens_only(record.routing.router_logits, mask) * self.sharpness
        logits = logits.unflatten(0, shape)  # (B, S, E)
        each = functional.binary_cross_entropy_with_logits(
            logits[:, :-1], torch.sigmoid(logits[:, 1:]), reduction="none"
        ).mean(-1)
        if mask is None:
            return each.sum() / max(each.numel(), 1)
        real = mask.to(torch.bool).reshape(shape)
        pairs = real[:, :-1] & real[:, 1:]
        return (each * pairs).sum() / pairs.sum().clamp(min=1)
