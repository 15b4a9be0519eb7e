"""A small causal transformer over token ids, that says which experts the tokens of a model want.

Axes: B samples, S tokens of a sample, N heads, D width of a head, W width of the gate, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

ROTARY_BASE = 10000.0


class PreGate(nn.Module):
    """One causal transformer block over token ids, and logits of the experts.

    Source: Read-ME: Refactorizing LLMs as Router-Decoupled Mixture of Experts with System
    Co-Design, Cai et al., 2024, arXiv 2410.19123, section 3.2.

    Args:
        vocab_size: Of the model.
        num_experts: E.
        width: W. Default of the paper: 512.
        num_heads: Divides W, into heads of an even width. Default of the paper: 4.

    Shapes:
        token_ids: (B, S); router_logits: (B, S, E).

    Raises:
        ValueError: Heads do not divide the width.
    """

    def __init__(
        self, vocab_size: int, num_experts: int, *, width: int = 512, num_heads: int = 4
    ) -> None:
        super().__init__()
        if width % (2 * num_heads):
            raise ValueError(
                f"width={width} is no multiple of 2 * num_heads={2 * num_heads}; rotary heads have "
                "an even width"
            )
        self.num_experts = num_experts
        self.num_heads = num_heads
        self.embedding = nn.Embedding(vocab_size, width)
        self.attention_norm = nn.RMSNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.mlp_norm = nn.RMSNorm(width)
        self.up = nn.Linear(width, 4 * width, bias=False)
        self.down = nn.Linear(4 * width, width, bias=False)
        self.head_norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, num_experts, bias=False)

    def forward(self, token_ids: Tensor, real: Tensor | None = None) -> Tensor:
        """Logits of every token, by the ids up to it.

        Args:
            token_ids: (B, S).
            real: (B, S) bool, False marks padding, which nobody looks at.
        """
        x = self.embedding(token_ids)
        x = x + self._attend(self.attention_norm(x), real)
        x = x + self.down(functional.silu(self.up(self.mlp_norm(x))))
        return self.head(self.head_norm(x))

    def _attend(self, x: Tensor, real: Tensor | None) -> Tensor:
        heads = self.qkv(x).unflatten(2, (3, self.num_heads, -1))  # (B, S, 3, N, D)
        query, key, value = heads.permute(2, 0, 3, 1, 4)
        seen = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool, device=x.device).tril()
        if real is not None:
            itself = torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
            seen = (seen & real[:, None, None, :]) | itself  # so that no row is empty
        mixed = functional.scaled_dot_product_attention(
            _rotated(query), _rotated(key), value, attn_mask=seen
        )
        return self.out(mixed.transpose(1, 2).flatten(2))


def _rotated(heads: Tensor) -> Tensor:
    """(B, N, S, D) with rotary positions."""
    half = heads.shape[3] // 2
    steps = torch.arange(half, device=heads.device, dtype=torch.float32) / half
    places = torch.arange(heads.shape[2], device=heads.device, dtype=torch.float32)
    angles = places.unsqueeze(1) * ROTARY_BASE**-steps  # (S, D / 2)
    cos, sin = angles.cos().to(heads.dtype), angles.sin().to(heads.dtype)
    first, second = heads[..., :half], heads[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=3)
