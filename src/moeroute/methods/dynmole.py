"""DynMoLE: few LoRA experts for tokens the router is sure of, all of them for the others.

    p = softmax(W_g x), highest first;  c = their cumulative sum;  H = Tsallis entropy of p
    w = p where c <= top_p, or among the first keep_top_k, or everywhere if H > entropy_threshold
    y = W0 x + scaling * sum_e w_e B_e A_e x

Source: DynMoLE: Boosting Mixture of LoRA Experts Fine-Tuning with a Hybrid Routing Mechanism, Li et
al., 2025, arXiv 2504.00661; read from the official code. As there, weights are not renormalised.
Differences from the code: padding is left out of the entropy loss, too; the entropy in that loss is
clamped to [0, 1]; the balance loss is the mean over linears of products, not a product of means
over the tokens of all linears.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from moeroute.losses.entropy import EntropyLoss
from moeroute.losses.weight_balance import WeightBalanceLoss
from moeroute.methods.checks import check_lora_fields
from moeroute.methods.parts import linear_mixture, lora_bank
from moeroute.routers.composed import ComposedRouter
from moeroute.routers.entropy_gated import EntropyGated
from moeroute.routers.scores import LinearScore
from moeroute.types import Paper, Site

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from moeroute.layers.lora_mixture import LoRAMixture
    from moeroute.types import AuxLoss, SiteKind


@dataclass(frozen=True, kw_only=True)
class DynMoLE:
    """Mixture of LoRA experts beside every targeted linear, sparse or soft by the token's entropy.

    The paper adapts the gate, up and down projections. A fresh router is unsure of nearly every
    token, so that training starts as a soft mixture.

    Args:
        r: Rank of one expert. Default of the paper: 24.
        lora_alpha: Scaling is lora_alpha / r. Default of the paper: 48.
        lora_dropout: Dropout on the experts' input, in training. The paper uses 0.05.
        use_rslora: Scaling lora_alpha / sqrt(r) instead.
        num_experts: Experts per linear. Default of the paper: 6.
        keep_top_k: Experts that a token keeps in any case. 1 <= keep_top_k <= num_experts.
        top_p: Probability that the experts of a sure token may reach together, in [0, 1].
        entropy_threshold: Entropy, as a fraction of its maximum, above which a token gets all
            experts; 1 or more switches that off, below 0 mixes all experts softly.
        entropy_index: q of the Tsallis entropy, above 0; 1 is Shannon's.
        entropy_eps: Added to every probability in the entropy.
        entropy_loss_coef: Weight of the mean entropy; 0 turns it off.
        router_aux_loss_coef: Weight of the paper's balance loss; 0 turns it off.

    Shapes:
        hidden_states: (..., in_features), any floating dtype; the router computes in float32.
        router_logits: (T, E) float32.
        routing_weights, selected_experts: (T, E), slots of experts left out empty; weights sum to
            at most 1 per token.

    Raises:
        ValueError: A field is out of range.

    Cost: one LoRA of rank E * r a linear while E * r is small. Adds E * r * (in + out) + E * in
        parameters a linear.
    Trains: router and experts. Inference: supported. Merging: undefined, the weights depend on the
        token.

    Example:
        >>> targets = ["gate_proj", "up_proj", "down_proj"]
        >>> wrapped = moeroute.wrap_model(model, DynMoLE(), target_modules=targets)
    """

    paper: ClassVar[Paper] = Paper(
        title="DynMoLE: Boosting Mixture of LoRA Experts Fine-Tuning with a Hybrid Routing "
        "Mechanism",
        arxiv="2504.00661",
        year=2025,
    )
    site_kind: ClassVar[SiteKind] = "linear"

    r: int = 24
    lora_alpha: float = 48.0
    lora_dropout: float = 0.0
    use_rslora: bool = False
    num_experts: int = 6
    keep_top_k: int = 2
    top_p: float = 0.75
    entropy_threshold: float = 0.9
    entropy_index: float = 1.1
    entropy_eps: float = 1e-5
    entropy_loss_coef: float = 0.01
    router_aux_loss_coef: float = 1e-3

    def __post_init__(self) -> None:
        """Check every field."""
        check_lora_fields(self)
        allowed = {
            "keep_top_k": (1 <= self.keep_top_k <= self.num_experts, f"1..{self.num_experts}"),
            "top_p": (0.0 <= self.top_p <= 1.0, "[0, 1]"),
            "entropy_index": (self.entropy_index > 0.0, "(0, inf)"),
            "entropy_eps": (self.entropy_eps > 0.0, "(0, inf)"),
            "entropy_loss_coef": (self.entropy_loss_coef >= 0.0, "[0, inf)"),
        }
        for name, (fits, interval) in allowed.items():
            if not fits:
                raise ValueError(f"DynMoLE: {name}={vars(self)[name]} is outside {interval}")

    def build_shared(self, sites: Sequence[Site], /) -> nn.Module | None:
        """Linears share nothing."""
        return None

    def build(self, site: Site, shared: nn.Module | None, /) -> LoRAMixture:
        """One router and one bank for the linear."""
        index, eps = self.entropy_index, self.entropy_eps
        select = EntropyGated(
            self.keep_top_k,
            top_p=self.top_p,
            entropy_threshold=self.entropy_threshold,
            index=index,
            eps=eps,
        )
        losses: tuple[AuxLoss, ...] = (
            EntropyLoss(weight=self.entropy_loss_coef, index=index, eps=eps),
            WeightBalanceLoss(weight=self.router_aux_loss_coef),
        )
        score = LinearScore(site.in_features, self.num_experts, init_std=None)
        bank = lora_bank(self, (site.in_features, site.out_features), self.num_experts)
        charged = tuple(loss for loss in losses if loss.weight)
        return linear_mixture(site, ComposedRouter(score, select), bank, charged)
