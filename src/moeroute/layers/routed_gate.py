"""A router in the place of a checkpoint's gate: it routes, and somebody else runs the experts."""

from __future__ import annotations

from torch import Tensor, nn

from moeroute.layers.routed import route
from moeroute.routing_pass import RoutingPass
from moeroute.types import AuxLoss, RouterOutput, Site


class RoutedGate(nn.Module):
    """Routes tokens for experts that are not its own; what methods build for a gate.

    Args:
        router: A `moeroute.types.Router`.
        losses: What this gate asks to be charged in training.
        site: Name of the gate in records.
        layer_index: Position in depth, -1 if it has none.

    Shapes:
        hidden_states: (B, S, H) or (T, H).

    Example:
        >>> gate = RoutedGate.at(site, Switch().router(64, 8), losses=(BalanceLoss(),))
    """

    def __init__(
        self,
        *,
        router: nn.Module,
        losses: tuple[AuxLoss, ...] = (),
        site: str = "",
        layer_index: int = -1,
    ) -> None:
        super().__init__()
        self.router = router
        self.losses = tuple(losses)
        self.site = site
        self.layer_index = layer_index
        self.routing_pass = RoutingPass()

    @classmethod
    def at(cls, site: Site, router: nn.Module, losses: tuple[AuxLoss, ...] = ()) -> RoutedGate:
        """Build it for a site."""
        return cls(router=router, losses=losses, site=site.name, layer_index=site.layer_index)

    def forward(self, hidden_states: Tensor, experts: nn.Module | None = None) -> RouterOutput:
        """Route the tokens; `experts` is what the record names."""
        return route(self, hidden_states, experts)

    def extra_repr(self) -> str:
        """Losses and place, for `print(model)`."""
        told = {"losses": self.losses, "site": self.site}
        return ", ".join(f"{name}={value!r}" for name, value in told.items() if value)
