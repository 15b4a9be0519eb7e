"""AdaMoLE: LoRA experts above a threshold that each token sets for itself.

    p   = softmax(W_g x);  tau = max_threshold * sigmoid(w_t . x + b_t)
    w_e = relu(p_e - tau) / sum of relu(p - tau)
    y   = W0 x + scaling * sum_e w_e B_e A_e x

Source: AdaMoLE: Fine-Tuning Large Language Models with Adaptive Mixture of Low-Rank Adaptation
Experts, Liu and Luo, 2024, arXiv 2405.00361; read from the official code. Differences from the
code: the balance loss is averaged over linears and leaves padding out; it is there in every
training forward, whether or not the input has a gradient; the threshold's bias starts at 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from moeroute.losses.threshold_balance import ThresholdBalanceLoss
from moeroute.methods.checks import check_lora_fields
from moeroute.methods.parts import linear_mixture, lora_bank
from moeroute.routers.scores import LinearScore
from moeroute.routers.threshold import ThresholdRouter
from moeroute.types import Paper, Site

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from moeroute.layers.lora_mixture import LoRAMixture
    from moeroute.types import SiteKind


@dataclass(frozen=True, kw_only=True)
class AdaMoLE:
    """Mixture beside every targeted linear of as many LoRA experts as a token is sure of.

    The paper adapts the attention's q, k, v and o projections.

    Args:
        r: Rank of one expert. Default of the paper: 4, 32 over all experts.
        lora_alpha: Scaling is lora_alpha / r. Default of the paper: 16.
        lora_dropout: Dropout on the experts' input, in training.
        use_rslora: Scaling lora_alpha / sqrt(r) instead.
        num_experts: Experts per linear. Default of the paper: 8.
        max_threshold: The threshold's upper end, in [0, 1]. None, as in the paper: 1 / num_experts,
            which leaves every token an expert; above it tokens may have none. 0 mixes all experts
            softly and teaches the threshold nothing.
        router_aux_loss_coef: Weight of the paper's balance loss; 0 turns it off.

    Shapes:
        hidden_states: (..., in_features), any floating dtype; the router computes in float32.
        router_logits: (T, E) float32.
        routing_weights, selected_experts: (T, E), slots below the threshold empty; weights sum to 1
            per token, or to 0 where no expert lies above the threshold.

    Raises:
        ValueError: A field is out of range.

    Cost: one LoRA of rank E * r a linear while E * r is small. Adds
        E * r * (in + out) + (E + 1) * in + 1 parameters a linear.
    Trains: router, threshold and experts. Inference: supported. Merging: undefined, the weights
        depend on the token.

    Example:
        >>> targets = ["q_proj", "k_proj", "v_proj", "o_proj"]
        >>> wrapped = moeroute.wrap_model(model, AdaMoLE(), target_modules=targets)
    """

    paper: ClassVar[Paper] = Paper(
        title="AdaMoLE: Fine-Tuning Large Language Models with Adaptive Mixture of Low-Rank "
        "Adaptation Experts",
        arxiv="2405.00361",
        year=2024,
    )
    site_kind: ClassVar[SiteKind] = "linear"

    r: int = 4
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0
    use_rslora: bool = False
    num_experts: int = 8
    max_threshold: float | None = None
    router_aux_loss_coef: float = 1e-3

    def __post_init__(self) -> None:
        """Check every field."""
        check_lora_fields(self)
        if self.max_threshold is not None and not 0.0 <= self.max_threshold <= 1.0:
            raise ValueError(
                f"AdaMoLE: max_threshold={self.max_threshold} is outside [0, 1]; it is compared "
                "with probabilities"
            )

    def build_shared(self, sites: Sequence[Site], /) -> nn.Module | None:
        """Linears share nothing."""
        return None

    def build(self, site: Site, shared: nn.Module | None, /) -> LoRAMixture:
        """One router with its threshold and one bank for the linear."""
        upper = 1.0 / self.num_experts if self.max_threshold is None else self.max_threshold
        router = ThresholdRouter(
            LinearScore(site.in_features, self.num_experts, init_std=None),
            LinearScore(site.in_features, 1, bias=True, init_std=None),
            max_threshold=upper,
        )
        bank = lora_bank(self, (site.in_features, site.out_features), self.num_experts)
        weight = self.router_aux_loss_coef
        losses = (ThresholdBalanceLoss(weight=weight),) if weight else ()
        return linear_mixture(site, router, bank, losses)
