"""A frozen linear with a mixture of LoRA experts beside it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor, nn

from moeroute.layers.routed import route
from moeroute.routing_pass import RoutingPass

if TYPE_CHECKING:
    from moeroute.types import AuxLoss


class LoRAMixture(nn.Module):
    """A mixture of LoRA experts over one linear, routed by the linear's own input.

        y = base(x) + scaling * sum_k w_k(x) B_{e_k} A_{e_k} x

    Args:
        router: A `moeroute.types.Router` over the linear's input.
        bank: The experts: a module that is called as `LoRABank` is.
        losses: What this layer asks to be charged in training.
        site: Full module name of the linear.
        layer_index: Its position in depth, -1 if it has none.

    Shapes:
        hidden_states: (..., in_features), any floating dtype.
        output: (..., out_features) in the dtype that base answers in.

    Example:
        >>> mixture = LoRAMixture(router=router, bank=bank)
        >>> y = mixture(x, linear)
    """

    def __init__(
        self,
        *,
        router: nn.Module,
        bank: nn.Module,
        losses: tuple[AuxLoss, ...] = (),
        site: str = "",
        layer_index: int = -1,
    ) -> None:
        super().__init__()
        self.router = router
        self.bank = bank
        self.losses = losses
        self.site = site
        self.layer_index = layer_index
        self.routing_pass = RoutingPass()

    def forward(self, hidden_states: Tensor, base: nn.Module) -> Tensor:
        """Answer in place of `base(hidden_states)`."""
        base_out = base(hidden_states)
        routing = route(self, hidden_states, self.bank)
        mixed = self.bank(
            base_out.reshape(-1, base_out.shape[-1]),
            hidden_states.reshape(-1, hidden_states.shape[-1]),
            routing.selected_experts,
            routing.routing_weights,
        )  # (T, O)
        return mixed.reshape(base_out.shape)
