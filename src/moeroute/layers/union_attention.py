"""Attention as a union of experts: groups of heads that see the tokens which chose them.

Axes: B samples, S tokens of a sample, H hidden, E experts, N heads, D width of a head.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from moeroute.layers.routed import route
from moeroute.ops.gates import expert_table
from moeroute.routing_pass import RoutingPass
from moeroute.types import AuxLoss, Router


class UnionAttention(nn.Module):
    """Multi-head attention whose groups of heads are experts.

        y_t = sum_e w[t, e] O_e attention_e(x_t, {x_s : s chose e, s <= t})

    A head attends among the tokens that chose its expert; with all experts at weight 1 it is the
    dense attention of the same matrices. Tokens keep their places: positions are not compacted, as
    the official code does. It computes all pairs under a mask, which saves nothing; it has no
    rotary embedding and no key-value cache.

    Source: Union of Experts, Yang et al., 2025, arXiv 2503.02495 (selective multi-head attention);
    read from the official code.

    Args:
        hidden_size: H.
        num_heads: N; divides H.
        router: A `moeroute.types.Router` of E experts; E divides N.
        causal: Whether a token sees only those before it.
        losses: What this layer asks to be charged in training.
        site: Name of the layer in records.
        layer_index: Position in depth, -1 if it has none.

    Shapes:
        q_proj, k_proj, v_proj, o_proj: (H, H) each, without biases.
        hidden_states: (B, S, H); the output has its shape. Padding is never attended to, and its
            output is 0.

    Raises:
        ValueError: Heads do not divide H, or experts the heads.
    """

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        *,
        router: nn.Module,
        causal: bool = True,
        losses: tuple[AuxLoss, ...] = (),
        site: str = "",
        layer_index: int = -1,
    ) -> None:
        super().__init__()
        size = router.num_experts if isinstance(router, Router) else 1
        if hidden_size % num_heads or num_heads % size:
            raise ValueError(
                f"hidden_size={hidden_size}, num_heads={num_heads}, num_experts={size}: heads must "
                "divide the width, and experts the heads"
            )
        self.num_heads = num_heads
        self.causal = causal
        self.router = router
        self.losses = losses
        self.site = site
        self.layer_index = layer_index
        self.routing_pass = RoutingPass()
        self.q_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.k_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.v_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        self.o_proj = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Attend over (B, S, H)."""
        batch, length, _ = hidden_states.shape
        routing = route(self, hidden_states, None)
        real = self.routing_pass.router_input(hidden_states, self.site).token_mask
        table = expert_table(
            routing.selected_experts, routing.routing_weights, routing.num_experts
        ).reshape(batch, length, -1)
        filled = torch.ones_like(routing.routing_weights)
        chose = expert_table(routing.selected_experts, filled, routing.num_experts) > 0
        chose = chose.reshape(batch, length, -1)
        x = hidden_states
        if real is not None:
            keep = real.to(torch.bool).reshape(batch, length, 1)
            chose, x = chose & keep, x.masked_fill(~keep, 0.0)
        attended = self._attend(x, chose)  # (B, S, N, D)
        each = self.num_heads // routing.num_experts
        weights = table.masked_fill(~chose, 0.0).repeat_interleave(each, dim=2).unsqueeze(3)
        out = (attended * weights.to(attended.dtype)).flatten(2)
        return self.o_proj(out)

    def _attend(self, x: Tensor, chose: Tensor) -> Tensor:
        """(B, S, N, D): each head among the tokens that chose it, 0 where a token did not."""
        query, key, value = (
            projection(x).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for projection in (self.q_proj, self.k_proj, self.v_proj)
        )  # (B, N, S, D) each
        each = self.num_heads // chose.shape[2]
        mine = chose.repeat_interleave(each, dim=2).transpose(1, 2)  # (B, N, S)
        seen = mine.unsqueeze(3) & mine.unsqueeze(2)
        if self.causal:
            pairs = seen.new_ones(x.shape[1], x.shape[1])
            seen = seen & pairs.tril()
        # a row of nothing but minus infinity would be NaN: such a token sees itself, and weighs 0
        itself = torch.eye(x.shape[1], dtype=torch.bool, device=x.device)
        out = functional.scaled_dot_product_attention(query, key, value, attn_mask=seen | itself)
        return out.transpose(1, 2).masked_fill(~mine.transpose(1, 2).unsqueeze(3), 0.0)
