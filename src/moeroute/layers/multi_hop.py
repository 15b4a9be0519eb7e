"""Several hops through one set of experts: each is routed by what the one before made of the token.

    h_0 = x;  d_t = MoE(h_t);  h_{t+1} = h_t + d_t;  y = sum_t d_t

Source: Equifinality in Mixture of Experts, Ternovtsii and Bilak, 2026, arXiv 2604.14419, which hops
with cosine routers. Read from the abstract and summaries: the equations and the rule for halting
are our own reading.

Axes: T tokens, H hidden, E experts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from moeroute.layers.routed import route
from moeroute.routing_pass import RoutingPass
from moeroute.types import AuxLoss, RouterInput, RouterOutput


class MultiHopLayer(nn.Module):
    """Stands for a feed-forward block, as a `MoELayer` does; with one hop it is one.

    Every hop keeps a record of its own, so that losses and statistics see them all: that of hop t
    is named `<site>.hop<t>`.

    Args:
        routers: One router for all hops, or one a hop.
        experts: Shared by all hops.
        hops: How often a token passes, at least 1.
        halt_below: In evaluation a token stops after the hop that moved it by less than this part
            of its norm, |d_t| < halt_below * |h_t|: later hops run no expert for it. 0 never stops.
        losses: What every hop asks to be charged in training.
        site: Name of the layer in records; left empty, it is found when it is needed.
        layer_index: Position in depth, -1 if it has none.

    Shapes:
        hidden_states: (..., H), any floating dtype that the experts take; so is the output.

    Raises:
        ValueError: A number is out of range, or the routers are neither one nor as many as hops.

    Example:
        >>> router = Cosine(space_size=16).router(64, 8)
        >>> layer = MultiHopLayer([router], SwiGLUExperts(8, 64, 128), hops=2, halt_below=0.1)
    """

    def __init__(
        self,
        routers: Sequence[nn.Module],
        experts: nn.Module,
        *,
        hops: int = 2,
        halt_below: float = 0.0,
        losses: tuple[AuxLoss, ...] = (),
        site: str = "",
        layer_index: int = -1,
    ) -> None:
        super().__init__()
        if hops < 1 or halt_below < 0:
            raise ValueError(f"hops={hops} must be at least 1, halt_below={halt_below} 0 or more")
        if len(routers) not in (1, hops):
            raise ValueError(f"{len(routers)} routers for hops={hops}; pass one, or one a hop")
        self.router = nn.ModuleList(routers)
        self.experts = experts
        self.hops, self.halt_below = hops, halt_below
        self.losses = tuple(losses)
        self.site, self.layer_index = site, layer_index
        self.routing_pass = RoutingPass()

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Apply all hops to (..., H)."""
        now, moves = hidden_states, not self.training and self.halt_below > 0
        halted: Tensor | None = None
        for hop in range(self.hops):
            routing = route(self._hop(hop, halted), now, self.experts)
            tokens = now.reshape(-1, now.shape[-1])  # (T, H)
            step = self.experts(tokens, routing)
            if moves:
                short = step.norm(dim=-1) < self.halt_below * tokens.norm(dim=-1)
                halted = short if halted is None else halted | short
            now = now + step.reshape(now.shape)
        return now - hidden_states

    def _hop(self, hop: int, halted: Tensor | None) -> _Hop:
        router = self.router[hop % len(self.router)]
        return _Hop(
            router=router if halted is None else _Halted(router, halted),
            losses=self.losses,
            routing_pass=self.routing_pass,
            site=f"{self.site}.hop{hop}",
            layer_index=self.layer_index,
            training=self.training,
        )

    def extra_repr(self) -> str:
        """Settings, for `print(model)`."""
        return f"hops={self.hops}, halt_below={self.halt_below:g}"


@dataclass
class _Hop:
    """One hop, as a routed layer."""

    router: nn.Module
    losses: tuple[AuxLoss, ...]
    routing_pass: RoutingPass
    site: str
    layer_index: int
    training: bool


class _Halted(nn.Module):
    """A router whose halted tokens have empty slots."""

    def __init__(self, router: nn.Module, halted: Tensor) -> None:
        super().__init__()
        self.router, self.halted = router, halted

    def forward(self, router_input: RouterInput) -> RouterOutput:
        """Route (T, H) tokens."""
        routing = self.router(router_input)
        halted = self.halted[:, None]
        return replace(
            routing,
            routing_weights=routing.routing_weights.masked_fill(halted, 0.0),
            selected_experts=torch.where(halted, routing.num_experts, routing.selected_experts),
        )
