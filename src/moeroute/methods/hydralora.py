"""HydraLoRA: LoRA experts that share A and differ in B, all mixed by the linear's own input.

    p = softmax(W_g x)
    y = W0 x + scaling * sum_e p_e B_e A x

Source: HydraLoRA: An Asymmetric LoRA Architecture for Efficient Fine-Tuning, Tian et al., 2024,
arXiv 2404.19245; read from the official code. Differences from the code: the router sees the input
before dropout. The paper finds the number of heads by k-means over embeddings of the corpus; here
it is given.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from moeroute.layers.shared_down_bank import SharedDownLoRABank
from moeroute.methods.checks import check_expert_fields
from moeroute.methods.parts import linear_mixture
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
class HydraLoRA:
    """One A and a soft mixture of several B beside every targeted linear.

    The paper adapts the linears of the feed-forward blocks.

    Args:
        r: Rank of A and of each B. Default of the paper's scripts: 4.
        lora_alpha: Scaling is lora_alpha / r. Default of the paper's scripts: 32.
        lora_dropout: Dropout on the LoRA's input, in training.
        use_rslora: Scaling lora_alpha / sqrt(r) instead.
        num_experts: Heads B per linear. The paper's clusters gave 4.

    Shapes:
        hidden_states: (..., in_features), any floating dtype; the router computes in float32.
        router_logits: (T, E) float32.
        routing_weights, selected_experts: (T, E); weights sum to 1 per token.

    Raises:
        ValueError: A field is out of range.

    Cost: per token, A of one LoRA of rank r and B of one of rank E * r. Adds
        r * in + E * r * out + E * in parameters a linear.
    Trains: router, A and all B. Inference: supported. Merging: undefined, the weights depend on the
        token.

    Example:
        >>> method = HydraLoRA(r=8, num_experts=3)
        >>> targets = ["gate_proj", "up_proj", "down_proj"]
        >>> wrapped = moeroute.wrap_model(model, method, target_modules=targets)
    """

    paper: ClassVar[Paper] = Paper(
        title="HydraLoRA: An Asymmetric LoRA Architecture for Efficient Fine-Tuning",
        arxiv="2404.19245",
        year=2024,
    )
    site_kind: ClassVar[SiteKind] = "linear"

    r: int = 4
    lora_alpha: float = 32.0
    lora_dropout: float = 0.0
    use_rslora: bool = False
    num_experts: int = 4

    def __post_init__(self) -> None:
        """Check every field."""
        check_expert_fields(self)

    def build_shared(self, sites: Sequence[Site], /) -> nn.Module | None:
        """Linears share nothing."""
        return None

    def build(self, site: Site, shared: nn.Module | None, /) -> LoRAMixture:
        """One router, one A and the heads for the linear."""
        # all B start equal at zero: only a router that tells tokens apart makes them differ
        score = LinearScore(site.in_features, self.num_experts, init_std=None)
        bank = SharedDownLoRABank(
            num_experts=self.num_experts,
            r=self.r,
            in_features=site.in_features,
            out_features=site.out_features,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            use_rslora=self.use_rslora,
        )
        return linear_mixture(site, ComposedRouter(score, All()), bank)
