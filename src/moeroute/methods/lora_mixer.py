"""LoRA-Mixer: LoRA experts of domains, mixed softly in training and sparsely in inference.

    training, sample labelled e:  y = W0 x + s_e B_e A_e x
    training, unlabelled:         y = W0 x + sum_e p_e s_e B_e A_e x,  p = softmax(W_g x)
    eval:                         the top-k of p, renormalised
    L = L_task + a * L_balance + b * mean H(p) / log E + c * sum_e ||theta_e - theta_e^0||^2

Source: LoRA-Mixer, 2025, arXiv 2507.00029; read from reviews and notes, the code is not released.
Our own reading: the renormalisation, the coefficients, and the sign of the entropy, which the text
wants small ("specialise") and the printed formula large; a negative `entropy_coef` is the formula
as printed. Differences: entropy as a share of its maximum, L_balance times E.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from moeroute.losses.entropy import EntropyLoss
from moeroute.losses.preserve import PreserveLoss
from moeroute.losses.soft_balance import SoftBalanceLoss
from moeroute.methods.checks import check_lora_fields
from moeroute.methods.existing import (
    LoRAExpert,
    check_sites,
    check_slots,
    expert_bank,
    load_experts,
    present_score,
)
from moeroute.methods.parts import linear_mixture, lora_bank
from moeroute.routers.by_label import HardOrSoft
from moeroute.routers.scores import LinearScore
from moeroute.types import Paper

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from moeroute.layers.lora_mixture import LoRAMixture
    from moeroute.types import AuxLoss, Site, SiteKind


@dataclass(frozen=True, kw_only=True)
class LoRAMixer:
    """A library of LoRA experts with a small router a linear.

    With `moeroute.mix_adapters` the experts are adapters that exist: frozen, or lightly tuned. With
    `wrap_model` it has experts of its own: first train them with each sample's domain as its task
    id (the hard stage, in which no router learns), then all of it without task ids (the soft
    stage). `moeroute convert` writes such experts as adapters, to mix them frozen.

    Args:
        top_k: Experts per token in eval; fewer where there are fewer. The paper's: 3.
        r: Rank of one expert of its own, as the next four; adapters that exist keep theirs.
        lora_alpha: Scaling is lora_alpha / r.
        lora_dropout: Dropout on the experts' input, in training.
        use_rslora: Scaling lora_alpha / sqrt(r) instead.
        num_experts: Experts per linear.
        train_experts: Whether adapters that exist are tuned too; experts of its own always are.
        router_aux_loss_coef: Weight of the balance loss, averaged over linears.
        entropy_coef: Weight of the router's entropy: above 0 sharpens, below 0 flattens.
        preserve_coef: Weight of the distance to the adapters that were given, if they are tuned.
        sites: Filled in by `moeroute.mix_adapters`, and so is:
        experts: The adapters.

    Shapes:
        hidden_states: (..., in_features), any floating dtype; the router computes in float32.
        router_logits: (T, E) float32, -inf for an adapter that does not adapt this linear.
        routing_weights, selected_experts: (T, E) in training, (T, K) in eval; weights sum to 1.
        task_ids: (B,) in training, an expert's index, or below 0 for an unlabelled sample.

    Raises:
        ValueError: A field is out of range, or a label that no expert has.

    Cost: one LoRA of rank E * r a linear. Adds E * r * (in + out) + E * in parameters a linear.
    Trains: router and experts; routers alone over adapters that exist. Inference: supported.
        Merging: undefined, the weights depend on the token.

    Example:
        >>> method = LoRAMixer(num_experts=2, top_k=2)
        >>> wrapped = moeroute.wrap_model(model, method, target_modules=["q_proj", "o_proj"])
        >>> wrapped(**batch, task_ids=torch.tensor([0, 1])).loss.backward()  # the hard stage
    """

    paper: ClassVar[Paper] = Paper(
        title="LoRA-Mixer: Coordinate Modular LoRA Experts Through Serial Attention Routing",
        arxiv="2507.00029",
        year=2025,
    )
    site_kind: ClassVar[SiteKind] = "linear"

    top_k: int = 3
    r: int = 8
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0
    use_rslora: bool = False
    num_experts: int = 4
    train_experts: bool = False
    router_aux_loss_coef: float = 1e-2
    entropy_coef: float = 1e-3
    preserve_coef: float = 1e-4
    sites: tuple[str, ...] = ()
    experts: tuple[LoRAExpert, ...] = ()

    def __post_init__(self) -> None:
        """Check every field."""
        load_experts(self)
        check_lora_fields(self)
        check_slots(self, self.top_k)
        if self.preserve_coef < 0:
            raise ValueError(
                f"LoRAMixer: preserve_coef={self.preserve_coef} is below 0 and would drive experts "
                "away from what they were; use 0 or more"
            )

    def build_shared(self, sites: Sequence[Site], /) -> nn.Module | None:
        """Linears share nothing."""
        if self.experts:
            check_sites(self, sites)
        return None

    def build(self, site: Site, shared: nn.Module | None, /) -> LoRAMixture:
        """A router, and a bank of adapters or of experts of its own."""
        size = len(self.experts) or self.num_experts
        score = LinearScore(site.in_features, size, init_std=0.02)
        if self.experts:
            tuned = self.train_experts
            bank = expert_bank(self, site, trainable=tuned, anchored=tuned)
            score = present_score(score, bank)
        else:
            bank = lora_bank(self, (site.in_features, site.out_features), size)
        return linear_mixture(site, HardOrSoft(score, min(self.top_k, size)), bank, self._losses())

    def _losses(self) -> tuple[AuxLoss, ...]:
        losses: list[AuxLoss] = [
            SoftBalanceLoss(weight=self.router_aux_loss_coef, top_k=self.top_k),
            EntropyLoss(weight=self.entropy_coef, index=1.0),
        ]
        if self.experts and self.train_experts:
            losses.append(PreserveLoss(weight=self.preserve_coef))
        return tuple(loss for loss in losses if loss.weight)
