"""ReLU routing (ReMoE): every expert of positive logit, its weight the logit itself.

    w = relu(W x);  L = lambda * E / (k T^2) * sum_e (sum_t w_te) * c_e
    lambda <- lambda * 1.2 if more than k experts a token are active on average, else / 1.2

Source: ReMoE: Fully Differentiable Mixture-of-Experts with ReLU Routing, Wang et al., 2024, arXiv
2412.14711, equations 4-10; read with the official code. Differences from the paper: each layer has
its own lambda, steered by its own density, and the loss is averaged over layers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from moeroute.layers.routed_gate import RoutedGate
from moeroute.losses.active_weight import ActiveWeightLoss
from moeroute.methods.gate_parts import check_slots, own_router, scaled_as, slots_of
from moeroute.routers.composed import ComposedRouter
from moeroute.routers.density import DensityControl
from moeroute.routers.positive import Positive
from moeroute.routers.scores import LinearScore
from moeroute.types import Paper

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from moeroute.types import AuxLoss, Site, SiteKind


@dataclass(frozen=True, kw_only=True)
class ReLURouting:
    """ReLU in the place of softmax and top-k, on the gate of an MoE block, or in a `MoELayer`.

    A fresh method does not keep the checkpoint's routing: it starts from its rows, but other
    experts are active and their weights are of another size. About half of all experts are active
    at first, until the loss has grown: plan memory for it. Call `moeroute.post_step(model)` after
    every optimizer step, or give `Trainer` a `moeroute.PostStepCallback`; else lambda stays.

    Args:
        top_k: k, experts a token should have on average; None for the checkpoint's (2 in a layer of
            one's own).
        sparsity_loss_coef: lambda at first. Default of the paper: 1e-8.
        sparsity_step: Factor of one update of lambda. Default of the paper: 1.2.

    Shapes:
        hidden_states: (T, H), any floating dtype; computed in float32.
        router_logits: (T, E) float32.
        routing_weights, selected_experts: (T, E), expert e in slot e, else an empty slot.

    Raises:
        ValueError: A field is out of range, or top_k exceeds the experts of a site.

    Cost: one product with (E, H), and an expert for each positive logit. Adds E * H parameters and
        one number a gate.
    Trains: router; lambda moves by itself. Inference: supported, exactly the training's routing.

    Example:
        >>> wrapped = moeroute.wrap_model(model, ReLURouting())
        >>> wrapped(**batch).loss.backward(); optimizer.step(); moeroute.post_step(wrapped)
    """

    paper: ClassVar[Paper] = Paper(
        title="ReMoE: Fully Differentiable Mixture-of-Experts with ReLU Routing",
        arxiv="2412.14711",
        year=2024,
    )
    site_kind: ClassVar[SiteKind] = "gate"

    top_k: int | None = None
    sparsity_loss_coef: float = 1e-8
    sparsity_step: float = 1.2

    def __post_init__(self) -> None:
        """Check every field."""
        check_slots(self)
        if self.sparsity_loss_coef <= 0 or self.sparsity_step <= 1:
            raise ValueError(
                f"ReLURouting: sparsity_loss_coef={self.sparsity_loss_coef} must be above 0 and "
                f"sparsity_step={self.sparsity_step} above 1, or nothing ever becomes sparse"
            )

    def build_shared(self, sites: Sequence[Site], /) -> nn.Module | None:
        """Gates share nothing."""
        return None

    def build(self, site: Site, shared: nn.Module | None, /) -> RoutedGate:
        """The checkpoint's own score, whose positive logits choose."""
        own = own_router(site)
        router = ComposedRouter(own.score, self._select(slots_of(self, site)))
        router.select = scaled_as(own.select, router.select)
        return RoutedGate.at(site, router, self.losses())

    def router(self, in_features: int, num_experts: int) -> ComposedRouter:
        """A fresh router for a layer of one's own."""
        score = LinearScore(in_features, num_experts)
        return ComposedRouter(score, self._select(self.top_k or 2))

    def losses(self) -> tuple[AuxLoss, ...]:
        """What a layer with this router is charged."""
        return (ActiveWeightLoss(),)

    def _select(self, slots: int) -> DensityControl:
        return DensityControl(
            Positive(), slots, coefficient=self.sparsity_loss_coef, step=self.sparsity_step
        )
