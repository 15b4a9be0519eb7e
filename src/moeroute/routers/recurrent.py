"""A router that remembers what it thought of a token in the layers before.

Axes: T tokens, H hidden, E experts, P width of the state.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from moeroute.ops.debug import check_router_logits
from moeroute.routers.scores import LinearScore, linear_logits
from moeroute.routers.select import Select, choose
from moeroute.types import RouterInput, RouterOutput


class RecurrentRouter(nn.Module):
    """One step of a GRU over depth, for each token by itself, then logits and a selection.

        h_i = GRU(W1_i x, h_{i-1}),  h_0 = 0
        logits_i = W2_i h_i

    The GRU is shared by all layers; one layer owns it, so that a state dict holds it once, and the
    others refer to it. Its gradient goes back through the states of all layers before.

    Source: Layerwise Recurrent Router for Mixture-of-Experts, Qiu et al., 2024, arXiv 2408.06793,
    section 3.

    Args:
        in_features: H.
        num_experts: E.
        select: Logits to who and how much.
        cell: The GRU, P wide on both sides.
        owns_cell: Whether the cell is part of this router's parameters.

    Shapes:
        down.weight: (P, H); head.weight: (E, P).
        state: (T, P) float32, handed to the next routed layer.
        router_logits: (T, E) float32 (float64 for float64 tokens).

    Raises:
        ValueError: The selection does not fit, or the cell has two widths; in forward, a state of
            other tokens than these.
    """

    select: Select

    def __init__(
        self,
        in_features: int,
        num_experts: int,
        select: Select,
        *,
        cell: nn.GRUCell,
        owns_cell: bool = True,
    ) -> None:
        super().__init__()
        select.check(num_experts)
        if cell.input_size != cell.hidden_size:
            raise ValueError(
                f"the GRU takes {cell.input_size} features and keeps {cell.hidden_size}; a router "
                "needs nn.GRUCell(size, size)"
            )
        self.in_features = in_features
        self.num_experts = num_experts
        self.down = LinearScore(in_features, cell.hidden_size)
        self.head = LinearScore(cell.hidden_size, num_experts)
        self.select = select
        self._cell = (cell,)  # a tuple keeps it from being a submodule
        if owns_cell:
            self.cell = cell

    def forward(self, router_input: RouterInput) -> RouterOutput:
        """Route (T, H) tokens, and hand the new state on."""
        update = self.down(router_input)
        state = gru_step(self._cell[0], update, _state_of(router_input, update))
        router_logits = linear_logits(state, self.head.weight, None, None)
        check_router_logits(router_logits)
        selection = choose(self.select, router_logits, router_input.token_mask)
        return RouterOutput(
            router_logits=router_logits,
            routing_weights=selection.routing_weights,
            selected_experts=selection.selected_experts,
            max_assignments=selection.max_assignments,
            state=state,
        )

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        return (
            f"in_features={self.in_features}, num_experts={self.num_experts}, "
            f"state_size={self._cell[0].hidden_size}, owns_cell={'cell' in self._modules}"
        )


def shared_cell(state_size: int) -> nn.GRUCell:
    """A GRU for all routers of a model: matrices as `nn.GRUCell` draws them, biases zero."""
    cell = nn.GRUCell(state_size, state_size)
    for name, parameter in cell.named_parameters():
        if name.startswith("bias"):
            nn.init.zeros_(parameter)
        else:
            nn.init.uniform_(parameter, -1 / math.sqrt(state_size), 1 / math.sqrt(state_size))
    return cell


def gru_step(cell: nn.GRUCell, inputs: Tensor, state: Tensor) -> Tensor:
    """One step of `nn.GRUCell`, in float32 or wider, autocast or not, on the inputs' device.

    Args:
        cell: The weights.
        inputs: (T, P).
        state: (T, P).

    Returns:
        (T, P), the new state.
    """
    weights = (cell.weight_ih, cell.bias_ih, cell.weight_hh, cell.bias_hh)
    weight_ih, bias_ih, weight_hh, bias_hh = (weight.to(inputs.device) for weight in weights)
    r_in, z_in, n_in = linear_logits(inputs, weight_ih, bias_ih, None).chunk(3, dim=-1)
    r_old, z_old, n_old = linear_logits(state, weight_hh, bias_hh, None).chunk(3, dim=-1)
    reset, keep = torch.sigmoid(r_in + r_old), torch.sigmoid(z_in + z_old)
    new = torch.tanh(n_in + reset * n_old)
    return (1 - keep) * new + keep * state


def _state_of(router_input: RouterInput, update: Tensor) -> Tensor:
    state = router_input.state
    if state is None:
        return torch.zeros_like(update)
    if state.shape != update.shape:
        raise ValueError(
            f"the layer before handed on a state of {tuple(state.shape)}, but this one has tokens "
            f"and a state of {tuple(update.shape)}: recurrent routers stand at layers that see the "
            "same tokens. Keep target_modules to one stack of layers"
        )
    return state.to(update)
