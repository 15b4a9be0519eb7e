"""MoLA: top-k mixtures of LoRA experts whose number of experts differs from layer to layer.

    p = softmax(W_g x)
    w = p over the top-k experts, renormalised
    y = W0 x + scaling * sum_k w_k B_{e_k} A_{e_k} x,  e_k among the experts of this layer

Source: Higher Layers Need More LoRA Experts, Gao et al., 2024, arXiv 2402.08562; read from the
official code. Differences from the code: one rank and one top_k for all layers, not lists of them;
the balance loss is averaged over the linears that have a router. Digits of a host whose layers four
does not divide: layer i of n takes digit 4 * i // n, our own reading.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from moeroute.layers.expert_schedule import Schedule, check_schedule, experts_at
from moeroute.methods.checks import check_adapter_fields, check_balance_weight
from moeroute.methods.parts import balance_losses, linear_mixture, lora_bank
from moeroute.routers.composed import ComposedRouter
from moeroute.routers.scores import LinearScore
from moeroute.routers.select import TopK
from moeroute.routers.sole import SoleExpert
from moeroute.types import Paper, Site

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from moeroute.layers.lora_mixture import LoRAMixture
    from moeroute.types import SiteKind


@dataclass(frozen=True, kw_only=True)
class MoLA:
    """Top-k mixture of LoRA experts beside every targeted linear, sized by its depth.

    A linear with one expert is a plain LoRA without a router.

    Args:
        r: Rank of one expert. Default of the paper: 8.
        lora_alpha: Scaling is lora_alpha / r. Default of the paper: 16.
        lora_dropout: Dropout on the experts' input, in training. The paper uses 0.05.
        use_rslora: Scaling lora_alpha / sqrt(r) instead.
        num_experts: Experts of a linear: one number for all layers, a tuple with one number a
            decoder layer, or four digits, one for each quarter of the layers from the input up.
            Default of the paper: "2468", more experts in higher layers.
        top_k: Slots per token; fewer where a layer has fewer experts. Default of the paper: 2.
        router_aux_loss_coef: Weight of the Switch balance loss, averaged over linears with a
            router; 0 turns it off. The paper uses 1e-3 for instruction tuning and 0 for one task.

    Shapes:
        hidden_states: (..., in_features), any floating dtype; the router computes in float32.
        router_logits: (T, E) float32, E the experts of this layer.
        routing_weights, selected_experts: (T, K), K = min(top_k, E); weights sum to 1 per token.

    Raises:
        ValueError: A field is out of range; num_experts speaks of layers and the site is in none,
            or of another number of layers than the host has.

    Cost: one LoRA of rank E * r a linear while E * r is small. Adds E * r * (in + out) + E * in
        parameters a linear.
    Trains: router and experts. Inference: supported. Merging: undefined, the weights depend on the
        token.

    Example:
        >>> method = MoLA(num_experts="2468")
        >>> wrapped = moeroute.wrap_model(model, method, target_modules="all-linear")
    """

    paper: ClassVar[Paper] = Paper(
        title="Higher Layers Need More LoRA Experts", arxiv="2402.08562", year=2024
    )
    site_kind: ClassVar[SiteKind] = "linear"

    r: int = 8
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0
    use_rslora: bool = False
    num_experts: Schedule = "2468"
    top_k: int = 2
    router_aux_loss_coef: float = 0.0

    def __post_init__(self) -> None:
        """Check every field; a list, as a config file holds it, becomes a tuple."""
        check_adapter_fields(self)
        check_balance_weight(self)
        if not isinstance(self.num_experts, int | str):
            object.__setattr__(self, "num_experts", tuple(self.num_experts))
        check_schedule(self.num_experts, "MoLA")
        if self.top_k < 1:
            raise ValueError(f"MoLA: top_k={self.top_k} is below 1; every token needs a slot")

    def build_shared(self, sites: Sequence[Site], /) -> nn.Module | None:
        """Linears share nothing."""
        return None

    def build(self, site: Site, shared: nn.Module | None, /) -> LoRAMixture:
        """One router and one bank for the linear, or one LoRA."""
        num_experts = experts_at(self.num_experts, site, "MoLA")
        bank = lora_bank(self, (site.in_features, site.out_features), num_experts)
        if num_experts == 1:
            return linear_mixture(site, SoleExpert(), bank)
        score = LinearScore(site.in_features, num_experts, init_std=None)
        select = TopK(min(self.top_k, num_experts), normalize=True)
        losses = balance_losses(self.router_aux_loss_coef)
        return linear_mixture(site, ComposedRouter(score, select), bank, losses)
