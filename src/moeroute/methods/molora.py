"""MoLoRA: a soft mixture of LoRA experts on every linear, routed by the linear's own input.

    p = softmax(W_g x)
    y = W0 x + scaling * sum_e p_e B_e A_e x

Source: Pushing Mixture of Experts to the Limit: Extremely Parameter Efficient MoE for Instruction
Tuning, Zadouri et al., 2023, arXiv 2309.05444, section 2; the equation is read from the paper's
abstract and from later descriptions of it. Differences from the paper: the paper routes by the
token's hidden state in T5; here the linear's input routes. `top_k` is our option: the top-k
probabilities, renormalised.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from moeroute.methods.checks import check_lora_fields, check_top_k
from moeroute.methods.parts import balance_losses, linear_mixture, lora_bank
from moeroute.routers.composed import ComposedRouter
from moeroute.routers.scores import LinearScore
from moeroute.routers.select import All, TopK
from moeroute.types import Paper, Site

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from moeroute.layers.lora_mixture import LoRAMixture
    from moeroute.types import SiteKind


@dataclass(frozen=True, kw_only=True)
class MoLoRA:
    """Soft (or top-k) mixture of LoRA experts beside every targeted linear.

    Args:
        r: Rank of one expert.
        lora_alpha: Scaling is lora_alpha / r.
        lora_dropout: Dropout on the experts' input, in training.
        use_rslora: Scaling lora_alpha / sqrt(r) instead.
        num_experts: Experts per linear.
        top_k: Slots per token; None mixes all experts, as the paper does.
        router_aux_loss_coef: Weight of the Switch balance loss, averaged over linears; 0, the
            paper's choice, turns it off. It needs top_k: a soft mixture loads every expert alike.

    Shapes:
        hidden_states: (..., in_features), any floating dtype; the router computes in float32.
        router_logits: (T, E) float32.
        routing_weights, selected_experts: (T, K) with K = top_k or E; weights sum to 1 per token.

    Raises:
        ValueError: A field is out of range.

    Cost: one LoRA of rank E * r a linear while E * r is small. Adds E * r * (in + out) + E * in
    parameters a linear.
    Trains: router and experts. Inference: supported. Merging: undefined, the weights depend on the
        token.

    Example:
        >>> method = MoLoRA(r=4, num_experts=8)
        >>> wrapped = moeroute.wrap_model(model, method, target_modules=["q_proj"])
    """

    paper: ClassVar[Paper] = Paper(
        title="Pushing Mixture of Experts to the Limit: Extremely Parameter Efficient MoE for "
        "Instruction Tuning",
        arxiv="2309.05444",
        year=2023,
    )
    site_kind: ClassVar[SiteKind] = "linear"

    r: int = 4
    lora_alpha: float = 8.0
    lora_dropout: float = 0.0
    use_rslora: bool = False
    num_experts: int = 8
    top_k: int | None = None
    router_aux_loss_coef: float = 0.0

    def __post_init__(self) -> None:
        """Check every field."""
        check_lora_fields(self)
        check_top_k(self, self.num_experts if self.top_k is None else self.top_k)
        if self.router_aux_loss_coef and self.top_k is None:
            raise ValueError(
                f"MoLoRA: router_aux_loss_coef={self.router_aux_loss_coef} has no effect on a soft "
                "mixture, whose experts all carry the same load; set top_k, or "
                "router_aux_loss_coef=0"
            )

    def build_shared(self, sites: Sequence[Site], /) -> nn.Module | None:
        """Linears share nothing."""
        return None

    def build(self, site: Site, shared: nn.Module | None, /) -> LoRAMixture:
        """One router and one bank for the linear."""
        select = All() if self.top_k is None else TopK(self.top_k, normalize=True)
        score = LinearScore(site.in_features, self.num_experts, init_std=0.02)
        bank = lora_bank(self, (site.in_features, site.out_features), self.num_experts)
        losses = balance_losses(self.router_aux_loss_coef)
        return linear_mixture(site, ComposedRouter(score, select), bank, losses)
