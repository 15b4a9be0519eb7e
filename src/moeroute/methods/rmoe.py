"""RMoE: routing in a layer sees what the routers of the layers before made of the token.

    h_i = GRU(W1_i x_i, h_{i-1}),  h_0 = 0,  one GRU for all layers
    logits_i = W2_i h_i,  then the host's own selection and weights

Source: Layerwise Recurrent Router for Mixture-of-Experts, Qiu et al., 2024, arXiv 2408.06793,
section 3. Differences from the paper: none in the equations; the GRU's biases start at 0, and the
selection is that of the host (the paper's is Mixtral's).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from torch import nn

from moeroute.layers.routed_gate import RoutedGate
from moeroute.methods.checks import check_balance_weight
from moeroute.methods.gate_parts import balance_losses, check_slots, fresh_select, own_probs
from moeroute.routers.recurrent import RecurrentRouter, shared_cell
from moeroute.routers.select import TopK
from moeroute.types import Paper

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moeroute.types import AuxLoss, Site, SiteKind


class SharedCell(nn.Module):
    """The GRU of one wrap, and the name of the site that owns it."""

    def __init__(self, cell: nn.GRUCell, owner: str) -> None:
        super().__init__()
        self.cell = cell
        self.owner = owner


@dataclass(frozen=True, kw_only=True)
class RMoE:
    """A recurrent router over depth at the gates of an MoE model, or in `MoELayer`s.

    A fresh method does not keep the checkpoint's routing: all of its weights are new, and its
    logits are close to 0. A checkpoint's bias for choosing is left out, for it belongs to other
    logits.

    Args:
        state_size: Width of the state, in features. Default of the paper: 128.
        top_k: Slots per token. 1 <= top_k <= num_experts of a site; None for the checkpoint's.
        router_aux_loss_coef: Weight of the balance loss, 1.0 at perfect balance; 0 turns it off.

    Shapes:
        hidden_states: (T, H), any floating dtype; computed in float32.
        router_logits: (T, E) float32. state: (T, state_size) float32.
        routing_weights, selected_experts: (T, K), weighed as the host's gate does.

    Raises:
        ValueError: A field is out of range, or top_k exceeds the experts of a site; in forward,
            layers see different tokens.
        RuntimeError: Under reentrant activation checkpointing, where the state loses its gradient.

    Cost: one GRU step per token and layer. Adds state_size * (H + E) parameters a gate, and
        6 * state_size * (state_size + 1) once.
    Trains: router. Inference: supported; the state lives in one forward, nothing is cached.

    Example:
        >>> wrapped = moeroute.wrap_model(model, RMoE(state_size=128))
    """

    paper: ClassVar[Paper] = Paper(
        title="Layerwise Recurrent Router for Mixture-of-Experts", arxiv="2408.06793", year=2024
    )
    site_kind: ClassVar[SiteKind] = "gate"

    state_size: int = 128
    top_k: int | None = None
    router_aux_loss_coef: float = 0.01

    def __post_init__(self) -> None:
        """Check every field."""
        check_slots(self)
        check_balance_weight(self)
        if self.state_size < 1:
            raise ValueError(f"RMoE: state_size={self.state_size} is below 1; set it to at least 1")

    def build_shared(self, sites: Sequence[Site], /) -> SharedCell:
        """One GRU for all gates; the first owns it."""
        return SharedCell(shared_cell(self.state_size), sites[0].name)

    def build(self, site: Site, shared: nn.Module | None, /) -> RoutedGate:
        """A recurrent router with the selection of the checkpoint's gate."""
        if not isinstance(shared, SharedCell):
            raise ValueError("RMoE routes with what build_shared made; pass it on")
        select = fresh_select(self, site)
        router = RecurrentRouter(
            site.in_features,
            site.out_features,
            select,
            cell=shared.cell,
            owns_cell=shared.owner == site.name,
        )
        losses = balance_losses(self.router_aux_loss_coef, own_probs(select)[0])
        return RoutedGate.at(site, router, losses)

    def routers(self, in_features: int, num_experts: int, num_layers: int) -> list[RecurrentRouter]:
        """Fresh routers for layers of one's own, the GRU shared; the first owns it.

        Connect the layers by `moeroute.connect_layers(model)`, so that the state reaches the next.
        """
        cell, slots = shared_cell(self.state_size), self.top_k or 2
        return [
            RecurrentRouter(in_features, num_experts, TopK(slots), cell=cell, owns_cell=not layer)
            for layer in range(num_layers)
        ]

    def losses(self) -> tuple[AuxLoss, ...]:
        """What a layer with this router is charged."""
        return balance_losses(self.router_aux_loss_coef)
