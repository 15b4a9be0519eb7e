"""The router of a single expert."""

from __future__ import annotations

import torch
from torch import nn

from moeroute.types import RouterInput, RouterOutput


class SoleExpert(nn.Module):
    """Gives every token the one expert that there is, with weight 1; nothing to learn.

    Shapes:
        router_logits: (T, 1) zeros, float32 or float64 for float64 tokens.
        routing_weights, selected_experts: (T, 1) ones and zeros.
    """

    num_experts = 1

    def forward(self, router_input: RouterInput) -> RouterOutput:
        """Route (T, H) tokens."""
        tokens = router_input.hidden_states
        wide = torch.promote_types(tokens.dtype, torch.float32)
        ones = torch.ones(tokens.shape[0], 1, dtype=wide, device=tokens.device)
        return RouterOutput(
            router_logits=torch.zeros_like(ones),
            routing_weights=ones,
            selected_experts=torch.zeros_like(ones, dtype=torch.int64),
        )
