"""LoRAMoE: a soft mixture of LoRA experts in two groups, one to keep what the model knows.

    w = softmax(W_g x)
    y = W0 x + scaling * sum_e w_e B_e A_e x

Source: LoRAMoE: Alleviate World Knowledge Forgetting in Large Language Models via MoE-Style Plugin,
Dou et al., 2023, arXiv 2312.09979; read from the official code. Differences from the code: the
balance loss takes the mean over a sample's real tokens, not the sum over all, and the mean over
linears. Released scripts set its weight and delta to 0, which leaves the groups out; the defaults
0.1 and 0.1 are our own reading.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from moeroute.losses.localized_balance import LocalizedBalanceLoss
from moeroute.methods.checks import check_lora_fields
from moeroute.methods.parts import linear_mixture, lora_bank
from moeroute.routers.composed import ComposedRouter
from moeroute.routers.scores import LinearScore
from moeroute.routers.select import All
from moeroute.types import Paper, Site

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from moeroute.layers.lora_mixture import LoRAMixture
    from moeroute.types import SiteKind


@dataclass(frozen=True, kw_only=True)
class LoRAMoE:
    """Soft mixture beside every targeted linear whose two halves serve two types of samples.

    Train with the type of each sample as its task id: 1 for the first half of the experts, 0 for
    the second. Evaluation needs no task ids. The paper adapts the gate, up and down projections.

    Args:
        r: Rank of one expert. Default of the paper: 4.
        lora_alpha: Scaling is lora_alpha / r. Default of the paper: 32.
        lora_dropout: Dropout on the experts' input, in training.
        use_rslora: Scaling lora_alpha / sqrt(r) instead.
        num_experts: Experts per linear, even where the groups differ. Default of the paper: 8.
        delta: How far the groups differ in the balance loss, in [0, 1); 0 makes it an ordinary
            balance of importance that needs no task ids.
        router_aux_loss_coef: Weight of the localized balance loss, beta in the paper; 0 turns it
            off.

    Shapes:
        hidden_states: (..., in_features), any floating dtype; the router computes in float32.
        router_logits: (T, E) float32.
        routing_weights, selected_experts: (T, E); weights sum to 1 per token.

    Raises:
        ValueError: A field is out of range; when the loss is computed, no task_ids or one that is
            neither 0 nor 1.

    Cost: one LoRA of rank E * r a linear while E * r is small. Adds E * r * (in + out) + E * in
        parameters a linear.
    Trains: router and experts. Inference: supported. Merging: undefined, the weights depend on the
        token.

    Example:
        >>> targets = ["gate_proj", "up_proj", "down_proj"]
        >>> wrapped = moeroute.wrap_model(model, LoRAMoE(), target_modules=targets)
        >>> wrapped(**batch, task_ids=torch.tensor([0, 1])).loss.backward()
    """

    paper: ClassVar[Paper] = Paper(
        title="LoRAMoE: Alleviate World Knowledge Forgetting in Large Language Models via "
        "MoE-Style Plugin",
        arxiv="2312.09979",
        year=2023,
    )
    site_kind: ClassVar[SiteKind] = "linear"

    r: int = 4
    lora_alpha: float = 32.0
    lora_dropout: float = 0.0
    use_rslora: bool = False
    num_experts: int = 8
    delta: float = 0.1
    router_aux_loss_coef: float = 0.1

    def __post_init__(self) -> None:
        """Check every field."""
        check_lora_fields(self)
        if not 0.0 <= self.delta < 1.0:
            raise ValueError(f"LoRAMoE: delta={self.delta} is outside [0, 1)")
        if self.delta and self.router_aux_loss_coef and self.num_experts % 2:
            raise ValueError(
                f"LoRAMoE: num_experts={self.num_experts} cannot be cut into two groups; make it "
                "even, or set delta=0"
            )

    def build_shared(self, sites: Sequence[Site], /) -> nn.Module | None:
        """Linears share nothing."""
        return None

    def build(self, site: Site, shared: nn.Module | None, /) -> LoRAMixture:
        """One router and one bank for the linear."""
        score = LinearScore(site.in_features, self.num_experts, init_std=None)
        bank = lora_bank(self, (site.in_features, site.out_features), self.num_experts)
        loss = LocalizedBalanceLoss(weight=self.router_aux_loss_coef, delta=self.delta)
        losses = (loss,) if loss.weight else ()
        return linear_mixture(site, ComposedRouter(score, All()), bank, losses)
