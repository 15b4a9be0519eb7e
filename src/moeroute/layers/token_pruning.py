"""A decoder layer that the tokens of least importance skip; importance is attention received."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from moeroute.depth_types import PrunedTokens
from moeroute.layers.depth_record import depth_record
from moeroute.layers.post_step import in_backward, stateful_parts
from moeroute.ops.attention_received import attention_received
from moeroute.routing_pass import RoutingPass

if TYPE_CHECKING:
    from moeroute.depth_types import AttentionSeen, DecoderCall
    from moeroute.types import AuxLoss


class TokenPruningLayer(nn.Module):
    """Asks a router which tokens run a decoder layer, and tells the next one what they attended to.

        y = B(x) where a token runs,  y = x elsewhere

    Skipped tokens leave their keys and values, so that others see them. What is not to be run is
    not computed, but while the router draws (in training): then all tokens run, so that the choice
    has a gradient on both sides. A token that runs sees the same keys either way.

    Args:
        router: A router that answers with `PrunedTokens`.
        num_queries: How many of a prompt's last queries are watched; 0 watches nothing, for a layer
            that has none behind it.
        losses: What this layer asks to be charged in training.
        site: Full module name of the decoder layer.
        layer_index: Its place among the decoder layers.

    Shapes:
        hidden_states: (B, S, H), any floating dtype; the output has its shape.
        state: (T, 1) float32, the importance of each token.

    Raises:
        ValueError: The router answers with something else.
    """

    def __init__(
        self,
        *,
        router: nn.Module,
        num_queries: int = 8,
        losses: tuple[AuxLoss, ...] = (),
        site: str = "",
        layer_index: int = -1,
    ) -> None:
        super().__init__()
        self.router = router
        self.num_queries = num_queries
        self.losses = losses
        self.site = site
        self.layer_index = layer_index
        self.routing_pass = RoutingPass()

    @property
    def watches_attention(self) -> bool:
        """Whether the layer's attention is watched."""
        return self.num_queries > 0

    def forward(self, hidden_states: Tensor, call: DecoderCall) -> Tensor:
        """Answer in place of the decoder layer."""
        router_input = self.routing_pass.router_input(hidden_states.detach(), self.site)
        router_input = replace(router_input, memory=call.open_memory())
        depth = self.router(router_input)
        if not isinstance(depth, PrunedTokens):
            raise ValueError(
                f"{type(self.router).__name__} answers with {type(depth).__name__}; "
                "TokenPruningLayer needs PrunedTokens, such as FactorRouter gives"
            )
        self._keep(hidden_states, depth)
        ran = self._run(hidden_states, call, depth, router_input.state)
        if depth.routing_weights is None:
            return ran
        gate = depth.routing_weights[..., None].to(hidden_states.dtype)
        return gate * ran + (1 - gate) * hidden_states

    def _run(
        self, hidden_states: Tensor, call: DecoderCall, depth: PrunedTokens, before: Tensor | None
    ) -> Tensor:
        """The layer on the tokens that run it, its attention watched."""
        kept = depth.num_executions > 0  # (B, S)
        runs = kept if depth.routing_weights is None else torch.ones_like(kept)
        if not self.watches_attention:
            return call.run_tokens(hidden_states, runs, 0, "all")
        watched: list[AttentionSeen] = []
        with call.watching(watched.append):
            ran = call.run_tokens(hidden_states, runs, 0, "all")
        if before is None:
            importance = torch.zeros(kept.shape, device=kept.device)
        else:
            importance = before.reshape(kept.shape)
        real = self.routing_pass.mask_of(kept.numel())
        for seen in watched:
            importance = attention_received(
                importance,
                seen,
                ran=runs,
                counted=kept if real is None else kept & real.reshape(kept.shape),
                prompt=depth.prompt,
                num_queries=self.num_queries,
            )
        self.routing_pass.hand_on(self.site, importance.reshape(-1, 1))
        return ran

    def _keep(self, hidden_states: Tensor, depth: PrunedTokens) -> None:
        routing_pass = self.routing_pass
        losses = self.losses if self.training else ()
        shown = self.training and routing_pass.is_open and not in_backward()
        watching = stateful_parts(self.router) if shown else []
        wanted = routing_pass.wants(charged=bool(losses))
        if not (watching or wanted):
            return
        record = depth_record(
            routing_pass,
            hidden_states,
            depth.num_executions,
            site=self.site,
            layer_index=self.layer_index,
            depth=depth,
        )
        record = replace(record, router=self.router, losses=losses)
        for part in watching:
            part.observe(record)
        if wanted:
            routing_pass.keep(record, charged=bool(losses))

    def extra_repr(self) -> str:
        """Settings, for `print(model)`."""
        return f"num_queries={self.num_queries}"
