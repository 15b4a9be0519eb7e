"""BlockFFN's chunk sparsification: few experts for all tokens of a chunk together.

    q_te = share of expert e in token t's positive activations
    L = coefficient * mean over chunks and experts of (1 - prod_{t in chunk} (1 - q_te))

Source: BlockFFN: Towards End-Side Acceleration-Friendly Mixture-of-Experts with Chunk-Level
Activation Sparsity, Song et al., 2025, arXiv 2507.08771; eps as in the official code. Differences
from the paper: a sample's last chunk may be shorter, and chunks of padding alone are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from torch import Tensor

from moeroute.losses.samples import sample_shape
from moeroute.ops.chunks import chunk_activation
from moeroute.types import RoutingRecord


@runtime_checkable
class SteersChunks(Protocol):
    """A part of a router that keeps the coefficient of this loss."""

    chunk_coefficient: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class ChunkSparsityLoss:
    """Pushes down the chance that an expert is active anywhere in a chunk of tokens.

    About 1/E where each chunk has one expert, (1 - (1 - 1/E)^C) where C tokens share their weight
    evenly over E experts, 1 where every expert is sure of a token of its own; -1e-5 * C where no
    expert is active (the code's eps). 0 without real tokens. Where the router has a
    `moeroute.routers.ChunkControl` the loss is multiplied by its coefficient.

    Args:
        weight: Coefficient in the total, which takes the mean over the layers that ask for it.
            Default of the paper, at first: 5e-2 (1e-1 for its 2.8B model).
        chunk_size: C, consecutive tokens of a sample. Default of the paper: 64.

    Shapes:
        router_logits: (B * S, E); the loss is a scalar in their dtype.

    Raises:
        ValueError: The layer was not told samples from tokens.
    """

    weight: float = 5e-2
    chunk_size: int = 64

    def __call__(self, record: RoutingRecord) -> Tensor:
        """The loss of one layer: a scalar, unweighted."""
        shape, logits = sample_shape(record, self), record.routing.router_logits
        loss = chunk_activation(logits, record.token_mask, shape, self.chunk_size)
        for part in [] if record.router is None else record.router.modules():
            if isinstance(part, SteersChunks):
                return part.chunk_coefficient.to(loss) * loss
        return loss
