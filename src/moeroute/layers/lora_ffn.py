"""A frozen feed-forward block whose experts are LoRA variants of itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from moeroute.layers.routed import route
from moeroute.routing_pass import RoutingPass

if TYPE_CHECKING:
    from collections.abc import Mapping

    from moeroute.types import AuxLoss


class LoRAFeedForwardMixture(nn.Module):
    """E experts that share one frozen feed-forward block and differ by LoRA on its projections.

        h_e = act(W1 x + D1_e x) * (W3 x + D3_e x)
        y   = sum_k w_k (W2 h_{e_k} + D2_{e_k} h_{e_k}),  D = scaling * B A

    Computed in a cheaper form that is equal wherever a token's weights sum to 1 (the router must be
    a normalising one): with h the frozen block's own hidden activation,

        y = W2 (h + sum_k w_k (h_{e_k} - h)) + sum_k w_k D2_{e_k} h_{e_k}

    so W1, W2 and W3 run once a token instead of once a slot, and with every B at zero y equals the
    frozen block bit for bit.

    Args:
        router: A `moeroute.types.Router` over the block's input whose weights sum to 1.
        banks: Role -> `LoRABank` for the roles "gate" (absent in an ungated block), "up" and
            "down".
        parts: Role -> attribute name in the frozen block, for the same roles and "act".
        losses: What this layer asks to be charged in training.
        site: Full module name of the block.
        layer_index: Its position in depth, -1 if it has none.

    Shapes:
        hidden_states: (..., H), any floating dtype; the output has its shape.
    """

    def __init__(
        self,
        *,
        router: nn.Module,
        banks: Mapping[str, nn.Module],
        parts: Mapping[str, str],
        losses: tuple[AuxLoss, ...] = (),
        site: str = "",
        layer_index: int = -1,
    ) -> None:
        super().__init__()
        self.router = router
        self.banks = nn.ModuleDict(dict(banks))
        self.parts = dict(parts)
        self.losses = losses
        self.site = site
        self.layer_index = layer_index
        self.routing_pass = RoutingPass()

    def forward(self, hidden_states: Tensor, base: nn.Module) -> Tensor:
        """Answer in place of `base(hidden_states)`."""
        routing = route(self, hidden_states, self.banks)
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])  # (T, H)
        act = base.get_submodule(self.parts["act"])
        projected = {
            role: base.get_submodule(self.parts[role])(hidden_states).flatten(0, -2)
            for role in ("gate", "up")
            if role in self.parts
        }  # (T, I) each
        shared = _activate(act, projected)
        weights = routing.routing_weights.to(shared.dtype)
        certain = torch.ones_like(routing.routing_weights[:, :1])
        mixed, expert_hidden = shared, []
        for slot in range(weights.shape[1]):
            chosen = routing.selected_experts[:, slot : slot + 1]
            hidden = _activate(
                act,
                {
                    role: self.banks[role](out, tokens, chosen, certain)
                    for role, out in projected.items()
                },
            )
            expert_hidden.append(hidden)
            mixed = mixed + weights[:, slot : slot + 1] * (hidden - shared)
        mixed = mixed.reshape(*hidden_states.shape[:-1], mixed.shape[-1])
        out = base.get_submodule(self.parts["down"])(mixed).flatten(0, -2)
        for slot, hidden in enumerate(expert_hidden):
            chosen = routing.selected_experts[:, slot : slot + 1]
            out = self.banks["down"](
                out, hidden, chosen, routing.routing_weights[:, slot : slot + 1]
            )
        return out.reshape(hidden_states.shape)


def feed_forward(base: nn.Module, parts: Mapping[str, str], x: Tensor) -> Tensor:
    """The frozen block as this layer understands it: act(gate(x)) * up(x), then down."""
    return base.get_submodule(parts["down"])(hidden_units(base, parts, x))


def hidden_units(base: nn.Module, parts: Mapping[str, str], x: Tensor) -> Tensor:
    """What the block's last linear is given: act(gate(x)) * up(x), or act(up(x))."""
    projected = {
        role: base.get_submodule(parts[role])(x) for role in ("gate", "up") if role in parts
    }
    return _activate(base.get_submodule(parts["act"]), projected)


def _activate(act: nn.Module, projected: Mapping[str, Tensor]) -> Tensor:
    if "gate" in projected:
        return act(projected["gate"]) * projected["up"]
    return act(projected["up"])
