"""The mixture-of-experts layer: a router, experts, and perhaps a shared expert, as siblings."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from moeroute.layers.experts import SwiGLUExperts
from moeroute.layers.feed_forward import SwiGLUFeedForward
from moeroute.layers.routed import route
from moeroute.losses.balance import BalanceLoss
from moeroute.routers.composed import ComposedRouter
from moeroute.routers.families import mixtral_router
from moeroute.routing_pass import RoutingPass
from moeroute.types import AuxLoss, Experts, Router


class MoELayer(nn.Module):
    """Routes every token to some experts and sums their weighted outputs.

        y = sum_k w_k expert_{e_k}(x)  [+ shared(x)  or  + sigmoid(gate(x)) * shared(x)]

    In training a layer with losses keeps a `RoutingRecord` of its last forward in `routing_pass`;
    `moeroute.aux_losses(model)` turns the records of a model into a loss. Nothing adds it to your
    loss by itself. `torch.compile(fullgraph=True)` takes the layer with its losses; with activation
    checkpointing inside the graph as well, torch asks for
    `torch._dynamo.config.skip_fwd_side_effects_in_bwd_under_checkpoint = True`, because a record is
    kept.

    Args:
        router: A `moeroute.types.Router`, such as `moeroute.routers.mixtral_router(...)`.
        experts: A `moeroute.types.Experts` over as many experts, such as `SwiGLUExperts`.
        shared_expert: A module that every token passes, (T, H) to (T, H).
        shared_expert_gate: A module, (T, H) to (T, 1), whose sigmoid weighs the shared expert
            (Qwen2-MoE: a linear without bias).
        losses: What this layer asks to be charged in training.
        site: Name of the layer in records; left empty, it is found when it is needed.
        layer_index: Position in depth, -1 if it has none.

    Shapes:
        hidden_states: (B, S, H) or (T, H), any strides, any floating dtype that the experts take;
            the output has its shape, and its dtype (the autocast dtype under autocast).

    Raises:
        ValueError: Router and experts differ in the number of experts or in width, one of them is
            none, or a gate comes without a shared expert.

    Example:
        >>> layer = MoELayer.build(hidden_size=64, intermediate_size=128, num_experts=8, top_k=2)
        >>> y = layer(torch.randn(2, 5, 64))
        >>> loss = y.square().mean() + moeroute.aux_losses(layer).total
    """

    shared_expert: nn.Module | None
    shared_expert_gate: nn.Module | None

    def __init__(
        self,
        *,
        router: nn.Module,
        experts: nn.Module,
        shared_expert: nn.Module | None = None,
        shared_expert_gate: nn.Module | None = None,
        losses: tuple[AuxLoss, ...] = (),
        site: str = "",
        layer_index: int = -1,
    ) -> None:
        super().__init__()
        _check_pair(router, experts)
        if shared_expert_gate is not None and shared_expert is None:
            raise ValueError(
                "shared_expert_gate weighs a shared_expert, but there is none; pass one"
            )
        self.router = router
        self.experts = experts
        self.shared_expert = shared_expert
        self.shared_expert_gate = shared_expert_gate
        self.losses = tuple(losses)
        self.site = site
        self.layer_index = layer_index
        self.routing_pass = RoutingPass()

    @classmethod
    def build(
        cls,
        *,
        hidden_size: int,
        intermediate_size: int,
        num_experts: int,
        top_k: int,
        shared_intermediate_size: int | None = None,
        losses: tuple[AuxLoss, ...] = (BalanceLoss(weight=0.01),),
    ) -> MoELayer:
        """Build the common case: renormalised softmax top-k over SwiGLU experts (Mixtral).

        Args:
            hidden_size: H.
            intermediate_size: I of one expert.
            num_experts: E.
            top_k: Experts a token, 1 <= top_k <= num_experts.
            shared_intermediate_size: I of an ungated shared expert; None builds none.
            losses: As for the layer; by default a balance loss.

        Raises:
            ValueError: A size is below 1, or top_k is outside 1..num_experts.
        """
        shared = None
        if shared_intermediate_size is not None:
            shared = SwiGLUFeedForward(hidden_size, shared_intermediate_size)
        return cls(
            router=mixtral_router(hidden_size, num_experts, top_k),
            experts=SwiGLUExperts(num_experts, hidden_size, intermediate_size),
            shared_expert=shared,
            losses=losses,
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Apply the layer to (B, S, H) or (T, H)."""
        routing = route(self, hidden_states, self.experts)
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])  # (T, H)
        mixed = self.experts(tokens, routing)
        if self.shared_expert is not None:
            shared = self.shared_expert(tokens)
            if self.shared_expert_gate is not None:
                shared = torch.sigmoid(self.shared_expert_gate(tokens)) * shared
            mixed = mixed + shared
        return mixed.reshape(*hidden_states.shape[:-1], mixed.shape[-1])

    def extra_repr(self) -> str:
        """Losses and place, for `print(model)`."""
        told = {"losses": self.losses, "site": self.site}
        return ", ".join(f"{name}={value!r}" for name, value in told.items() if value)


@runtime_checkable
class _HasHiddenSize(Protocol):
    """Experts that take tokens of one width."""

    hidden_size: int


def _check_pair(router: nn.Module, experts: nn.Module) -> None:
    counts = []
    for role, part, protocol in (("router", router, Router), ("experts", experts, Experts)):
        if not isinstance(part, protocol):
            raise ValueError(
                f"{role} is a {type(part).__name__}, which has no num_experts; pass a "
                f"moeroute.types.{protocol.__name__}, or give it that attribute"
            )
        counts.append(part.num_experts)
    if counts[0] != counts[1]:
        raise ValueError(
            f"the router chooses among num_experts={counts[0]} but there are "
            f"num_experts={counts[1]}; give both the same"
        )
    expected = router.in_features if isinstance(router, ComposedRouter) else None
    width = experts.hidden_size if isinstance(experts, _HasHiddenSize) else None
    if None not in (expected, width) and expected != width:
        raise ValueError(
            f"the router takes tokens of in_features={expected} but the experts of "
            f"hidden_size={width}; give both the same"
        )
