"""The mixture-of-experts layer: a router, experts, and perhaps a shared expert, as siblings."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moeroute.layers.experts import SwiGLUExperts
from moeroute.layers.routed import route
from moeroute.routers.families import mixtral_router
from moeroute.routing_pass import RoutingPass
from moeroute.types import AuxLoss


class MoELayer(nn.Module):
    """Routes every token to some experts and sums their weighted outputs.

        y = sum_k w_k expert_{e_k}(x)  [+ sigmoid(gate(x)) * shared(x)]

    Args:
        router: A `moeroute.types.Router`.
        experts: A `moeroute.types.Experts` over as many experts.
        shared_expert: A module that every token passes, (T, H) to (T, H).
        shared_expert_gate: A linear, H to 1, whose sigmoid weighs the shared expert (Qwen2-MoE).
        losses: What this layer asks to be charged in training; `moeroute.aux_losses(model)` adds
            them up over a model.
        site: Name of the layer in records; found by `moeroute.track_routing` if left empty.
        layer_index: Position in depth, -1 if it has none.

    Shapes:
        hidden_states: (B, S, H) or (T, H), any floating dtype; the output has its shape and dtype.

    Raises:
        ValueError: Router and experts count differently, or a gate comes without a shared expert.

    Example:
        >>> layer = MoELayer.build(hidden_size=64, intermediate_size=128, num_experts=8, top_k=2)
        >>> y = layer(torch.randn(2, 5, 64))
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
        if router.num_experts != experts.num_experts:
            raise ValueError(
                f"the router chooses among {router.num_experts} experts but there are "
                f"{experts.num_experts}; give both the same num_experts"
            )
        if shared_expert_gate is not None and shared_expert is None:
            raise ValueError("shared_expert_gate has no shared_expert to weigh; pass one")
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
        losses: tuple[AuxLoss, ...] = (),
    ) -> MoELayer:
        """The common case: softmax top-k routing, renormalised, over SwiGLU experts (Mixtral).

        Args:
            hidden_size: H.
            intermediate_size: I of one expert.
            num_experts: E.
            top_k: Experts a token.
            losses: As for the layer.
        """
        return cls(
            router=mixtral_router(hidden_size, num_experts, top_k),
            experts=SwiGLUExperts(num_experts, hidden_size, intermediate_size),
            losses=losses,
        )

    def forward(self, hidden_states: Tensor) -> Tensor:
        """(..., H) to (..., H)."""
        routing = route(self, hidden_states, self.experts)
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])  # (T, H)
        mixed = self.experts(tokens, routing)
        if self.shared_expert is not None:
            shared = self.shared_expert(tokens)
            if self.shared_expert_gate is not None:
                shared = torch.sigmoid(self.shared_expert_gate(tokens)) * shared
            mixed = mixed + shared
        return mixed.reshape(hidden_states.shape)
