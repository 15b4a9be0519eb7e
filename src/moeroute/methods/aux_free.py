"""Auxiliary-loss-free balance: a bias for choosing only, moved once a step against the load.

    s = probs(W x);  ids = the k highest of s + b;  w = s[ids], renormalised
    b_e <- b_e + update_rate * sign(mean(c) - c_e),  c_e = tokens of expert e in the step

Source: Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts, Wang et al., 2024, arXiv
2408.15664, algorithm 1. Differences from the paper: at a checkpoint's gate its own probabilities
and weights stay (the paper's are sigmoids); in a layer of one's own the weights are renormalised,
as DeepSeek-V3 does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from moeroute.layers.routed_gate import RoutedGate
from moeroute.methods.gate_parts import (
    biased_select,
    check_slots,
    innermost,
    own_router,
    slots_of,
)
from moeroute.ops.probs import sigmoid_probs
from moeroute.routers.composed import ComposedRouter
from moeroute.routers.scores import LinearScore
from moeroute.routers.select import TopK
from moeroute.routers.selection_bias import SelectionBias
from moeroute.types import Paper

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from moeroute.types import AuxLoss, Site, SiteKind


@dataclass(frozen=True, kw_only=True)
class AuxFree:
    """A balancing bias on the gate of an MoE block, or in a `MoELayer`.

    A fresh method keeps the checkpoint's routing: it starts from its rows, its selection and, if it
    has one, its bias. Call `moeroute.post_step(model)` after every optimizer step, or give
    `Trainer` a `moeroute.PostStepCallback`.

    Args:
        update_rate: Step of the bias, in units of probability (of logits, at gates that add their
            bias to logits). Default of the paper: 0.001; 0 keeps the bias as it is.
        top_k: Slots per token. 1 <= top_k <= num_experts of a site; None for the checkpoint's.

    Shapes:
        hidden_states: (T, H), any floating dtype; computed in float32.
        router_logits: (T, E) float32.
        routing_weights, selected_experts: (T, K), weighed as the host's gate does.

    Raises:
        ValueError: A field is out of range, or top_k exceeds the experts of a site.

    Cost: one product with (E, H), and a count a step. Adds E * H parameters and E numbers a gate.
    Trains: router; the bias moves by itself. Inference: supported.

    Example:
        >>> wrapped = moeroute.wrap_model(model, AuxFree())
        >>> wrapped(**batch).loss.backward(); optimizer.step(); moeroute.post_step(wrapped)
    """

    paper: ClassVar[Paper] = Paper(
        title="Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts",
        arxiv="2408.15664",
        year=2024,
    )
    site_kind: ClassVar[SiteKind] = "gate"

    update_rate: float = 1e-3
    top_k: int | None = None

    def __post_init__(self) -> None:
        """Check every field."""
        check_slots(self)
        if self.update_rate < 0:
            raise ValueError(
                f"AuxFree: update_rate={self.update_rate} would feed the fullest experts; use 0 or "
                "more"
            )

    def build_shared(self, sites: Sequence[Site], /) -> nn.Module | None:
        """Gates share nothing."""
        return None

    def build(self, site: Site, shared: nn.Module | None, /) -> RoutedGate:
        """The checkpoint's own router with a bias that moves."""
        own = own_router(site)
        innermost(own.select).top_k = slots_of(self, site)
        select = biased_select(own.select, site.out_features, self.update_rate)
        return RoutedGate.at(site, ComposedRouter(own.score, select))

    def router(self, in_features: int, num_experts: int) -> ComposedRouter:
        """A fresh router for a layer of one's own; top_k is 2 where the method has None."""
        bias = SelectionBias(num_experts, update_rate=self.update_rate)
        select = TopK(self.top_k or 2, probs=sigmoid_probs, selection_bias=bias)
        return ComposedRouter(LinearScore(in_features, num_experts), select)

    def losses(self) -> tuple[AuxLoss, ...]:
        """Nothing: the bias balances."""
        return ()
