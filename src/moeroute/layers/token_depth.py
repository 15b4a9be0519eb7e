"""A decoder layer that each token runs or skips."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor, nn

from moeroute.layers.depth_record import depth_record
from moeroute.routing_pass import RoutingPass

if TYPE_CHECKING:
    from moeroute.depth_types import DecoderCall, DepthOutput, KVPolicy
    from moeroute.types import AuxLoss


class TokenDepthLayer(nn.Module):
    """Asks a router of every call which tokens run a decoder layer; the others are not computed.

        y = x + w * (B(x) - x) where a token runs,  y = x elsewhere

    Tokens that run see each other and, by the policy, those that do not: with "all" the keys and
    values of skipped tokens are computed and kept, with "kept" skipped tokens are not seen.

    Args:
        router: A `moeroute.depth_types.DepthRouter` that answers for tokens, 0 or 1 times.
        kv_policy: What a skipped token leaves in the cache.
        losses: What this layer asks to be charged in training.
        site: Full module name of the decoder layer.
        layer_index: Its place among the decoder layers.

    Shapes:
        hidden_states: (B, S, H), any floating dtype; the output has its shape.

    Raises:
        ValueError: The router answers for sequences, or asks for more than one run.
    """

    def __init__(
        self,
        *,
        router: nn.Module,
        kv_policy: KVPolicy = "all",
        losses: tuple[AuxLoss, ...] = (),
        site: str = "",
        layer_index: int = -1,
    ) -> None:
        super().__init__()
        self.router = router
        self.kv_policy: KVPolicy = kv_policy
        self.losses = losses
        self.site = site
        self.layer_index = layer_index
        self.routing_pass = RoutingPass()

    def forward(self, hidden_states: Tensor, call: DecoderCall) -> Tensor:
        """Answer in place of the decoder layer."""
        router_input = self.routing_pass.router_input(hidden_states, self.site)
        depth = self.router(router_input)
        if depth.num_executions.ndim == 1 or depth.router_logits.shape[-1] != 2:
            raise ValueError(
                f"{type(self.router).__name__} must answer (B, S) tokens with 0 or 1 runs, but "
                f"gave {tuple(depth.num_executions.shape)} of {depth.router_logits.shape[-1]}"
            )
        if depth.state is not None:
            self.routing_pass.hand_on(self.site, depth.state)
        self._keep(hidden_states, depth)
        kept = depth.num_executions > 0  # (B, S)
        ran = call.run_tokens(hidden_states, kept, 0, self.kv_policy)
        if depth.routing_weights is None:
            return ran
        weights = depth.routing_weights[..., None].to(hidden_states.dtype)
        return hidden_states + weights * (ran - hidden_states)

    def _keep(self, hidden_states: Tensor, depth: DepthOutput) -> None:
        losses = self.losses if self.training else ()
        if self.routing_pass.wants(charged=bool(losses)):
            record = depth_record(
                self.routing_pass,
                hidden_states,
                depth.num_executions,
                site=self.site,
                layer_index=self.layer_index,
                depth=depth,
            )
            record = replace(record, router=self.router, losses=losses)
            self.routing_pass.keep(record, charged=bool(losses))

    def extra_repr(self) -> str:
        """Settings, for `print(model)`."""
        return f"kv_policy={self.kv_policy!r}"
