"""A limit on what an expert takes of each sample.

Axes: B samples, S tokens of a sample, T = B * S, K slots per token, E experts, C tokens an expert.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import nn

from moeroute.ops.queue import places_in_queue
from moeroute.types import Router, RouterInput, RouterOutput


class SequenceCapacity(nn.Module):
    """Another router, of whose choices each expert keeps its C highest weights of each sample.

        C = ceil(share * real tokens of the sample), at least 1

    In training alone: the limit of a token depends on later tokens, so that eval, where text is
    written one token after the other, has none.

    Source: Union of Experts, Yang et al., 2025, arXiv 2503.02495 ("data selection"); the limit in
    training alone is our own reading.

    Args:
        router: Whose choices.
        share: In (0, 1].

    Shapes:
        As the router's, with empty slots where an expert did not take a token.

    Raises:
        ValueError: share is outside (0, 1].
    """

    router: Router

    def __init__(self, router: nn.Module, *, share: float) -> None:
        super().__init__()
        if not 0.0 < share <= 1.0:
            raise ValueError(f"share={share} is outside (0, 1]; a capacity of 0 takes no token")
        self.router = router  # pyright: ignore[reportAttributeAccessIssue]
        self.num_experts = self.router.num_experts
        self.share = share

    def forward(self, router_input: RouterInput) -> RouterOutput:
        """Route (T, H) tokens."""
        routing = self.router(router_input)
        if not self.training:
            return routing
        batch, length = router_input.sequence_shape
        size, ids = routing.num_experts, routing.selected_experts
        sample = torch.arange(batch, device=ids.device).repeat_interleave(length)  # (T,)
        real = torch.ones_like(sample)
        if router_input.token_mask is not None:
            real = router_input.token_mask.to(torch.int64)
        filled = (ids < size) & (real > 0).unsqueeze(1)
        queue = torch.where(filled, ids + size * sample.unsqueeze(1), size * batch)
        weights = routing.routing_weights
        places = places_in_queue(queue.flatten(), size * batch, weights.flatten())
        counts = real.new_zeros(batch).scatter_add(0, sample, real)  # (B,)
        capacity = torch.ceil(counts.double() * self.share - 1e-6)[sample].unsqueeze(1)
        kept = filled & (places.reshape(ids.shape) < capacity)
        return replace(
            routing,
            routing_weights=weights.masked_fill(~kept, 0.0),
            selected_experts=ids.masked_fill(~kept, size),
        )

    def extra_repr(self) -> str:
        """Settings, for `print(model)`."""
        return f"share={self.share:g}"
