"""One feed-forward block as a union of experts, each a slice of its hidden units.

    block(x) = W2 h + c = sum_i W2_i h_i + c,  h = act(W1 x) * (W3 x), cut into E equal parts

Axes: T tokens, E experts, H hidden, I intermediate.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from moeroute.layers.experts import SwiGLUExperts
from moeroute.layers.feed_forward import SwiGLUFeedForward
from moeroute.layers.lora_ffn import hidden_units
from moeroute.layers.routed import route
from moeroute.ops.gates import expert_table
from moeroute.routing_pass import RoutingPass
from moeroute.types import AuxLoss


class UnionFeedForward(nn.Module):
    """A frozen block whose slices a router weighs: nothing is added to it but the router.

        y = W2 (w * h) + c,  w the weight of the slice that a hidden unit is of

    With every slice at weight 1 it is the block. The whole hidden activation is computed and then
    weighed, so that any linear will do, quantised ones too; no compute is saved (experts made by
    `slice_block` save it).

    Args:
        router: Of as many experts as slices; a slice nobody chose has weight 0.
        parts: Role -> attribute name in the block, "gate" (absent if ungated), "up", "down", "act".
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
        parts: Mapping[str, str],
        losses: tuple[AuxLoss, ...] = (),
        site: str = "",
        layer_index: int = -1,
    ) -> None:
        super().__init__()
        self.router = router
        self.parts = dict(parts)
        self.losses = losses
        self.site = site
        self.layer_index = layer_index
        self.routing_pass = RoutingPass()

    def forward(self, hidden_states: Tensor, base: nn.Module) -> Tensor:
        """Answer in place of `base(hidden_states)`."""
        routing = route(self, hidden_states, None)
        size = routing.num_experts
        table = expert_table(routing.selected_experts, routing.routing_weights, size)  # (T, E)
        hidden = hidden_units(base, self.parts, hidden_states)  # (..., I)
        weights = table.reshape(*hidden.shape[:-1], size, 1).to(hidden.dtype)
        weighed = (hidden.unflatten(-1, (size, -1)) * weights).flatten(-2)
        return base.get_submodule(self.parts["down"])(weighed)


@torch.no_grad()
def slice_block(block: SwiGLUFeedForward, num_slices: int) -> SwiGLUExperts:
    """The experts whose sum, each at weight 1, is a block.

    Args:
        block: Whose weights are copied.
        num_slices: E; divides the block's intermediate size.

    Returns:
        E experts of I / E hidden units each.

    Raises:
        ValueError: E does not divide I.
    """
    width = check_slices(block.gate_proj.weight.shape[0], num_slices, "the block")
    experts = SwiGLUExperts(num_slices, block.hidden_size, width)
    gate = block.gate_proj.weight.unflatten(0, (num_slices, width))
    up = block.up_proj.weight.unflatten(0, (num_slices, width))
    experts.gate_up_proj.copy_(torch.cat([gate, up], dim=1))
    experts.down_proj.copy_(block.down_proj.weight.unflatten(1, (num_slices, width)).movedim(1, 0))
    return experts.to(block.down_proj.weight)


def check_slices(intermediate_size: int, num_slices: int, where: str) -> int:
    """Hidden units of one slice.

    Raises:
        ValueError: The slices are not equal.
    """
    if intermediate_size % num_slices:
        raise ValueError(
            f"num_experts={num_slices} does not divide the {intermediate_size} hidden units of "
            f"{where}; slices are equal, so choose a divisor"
        )
    return intermediate_size // num_slices
