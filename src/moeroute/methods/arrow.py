"""Arrow: a router over existing LoRA adapters that needs no training.

    v_e = top right singular vector of B_e A_e
    z_e = |v_e . x|
    w   = softmax over the top-k of z / temperature
    y   = W0 x + sum_k w_k s_{e_k} B_{e_k} A_{e_k} x

Source: Towards Modular LLMs by Building and Reusing a Library of LoRAs, Ostapenko et al., 2024,
arXiv 2405.11157, section 4; defaults of PEFT's ArrowConfig. Differences from PEFT: the
singular vector is exact (PEFT iterates 15 times); ranks and targets of the adapters may differ; the
mixture saves and loads like any adapter; `cosine` is an option of ours. GenKnowSub is done at
mixing time, `moeroute.mix_adapters(..., subtract=...)`, and leaves the adapters' files alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from moeroute.methods.existing import (
    LoRAExpert,
    check_sites,
    check_slots,
    expert_bank,
    load_experts,
    present_score,
)
from moeroute.methods.parts import linear_mixture
from moeroute.routers.composed import ComposedRouter
from moeroute.routers.prototypes import PrototypeScore
from moeroute.routers.select import TopKSoftmax
from moeroute.types import Paper

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from moeroute.layers.lora_mixture import LoRAMixture
    from moeroute.types import Site, SiteKind


@dataclass(frozen=True, kw_only=True)
class Arrow:
    """Existing LoRA adapters, mixed token by token along the directions that they amplify.

    Args:
        top_k: Adapters per token; fewer where fewer adapt a linear. Default of PEFT: 3.
        temperature: Divides the logits before the softmax.
        cosine: Divide the logits by the token's norm.
        sites: Filled in by `moeroute.mix_adapters`, and so is:
        experts: The adapters.

    Shapes:
        hidden_states: (..., in_features), any floating dtype; the router computes in float32.
        router_logits: (T, E) float32, -inf for an adapter that does not adapt this linear.
        routing_weights, selected_experts: (T, K); weights sum to 1 per token.

    Raises:
        ValueError: A field is out of range, or there are no adapters to mix.

    Cost: one LoRA of the adapters' joint rank a linear. Adds E * in a linear beside the adapters.
    Trains: nothing. Inference: supported. Merging: undefined, the weights depend on the token.

    Example:
        >>> paths = {"math": "adapters/math", "code": "adapters/code"}
        >>> mixed = moeroute.mix_adapters(model, paths, router=Arrow(top_k=1))
    """

    paper: ClassVar[Paper] = Paper(
        title="Towards Modular LLMs by Building and Reusing a Library of LoRAs",
        arxiv="2405.11157",
        year=2024,
    )
    site_kind: ClassVar[SiteKind] = "linear"

    top_k: int = 3
    temperature: float = 1.0
    cosine: bool = False
    sites: tuple[str, ...] = ()
    experts: tuple[LoRAExpert, ...] = ()

    def __post_init__(self) -> None:
        """Check every field."""
        load_experts(self)
        check_slots(self, self.top_k)
        if self.temperature <= 0:
            raise ValueError(f"Arrow: temperature={self.temperature} is not above 0")

    def build_shared(self, sites: Sequence[Site], /) -> nn.Module | None:
        """Linears share nothing."""
        check_sites(self, sites)
        return None

    def build(self, site: Site, shared: nn.Module | None, /) -> LoRAMixture:
        """A bank of the adapters and their directions."""
        bank = expert_bank(self, site)
        score = PrototypeScore(
            site.in_features, bank.num_experts, cosine=self.cosine, temperature=self.temperature
        )
        slots = min(self.top_k, bank.num_experts)
        return linear_mixture(
            site, ComposedRouter(present_score(score, bank), TopKSoftmax(slots)), bank
        )
