"""ReMix: a drawn subset of LoRA experts, all with one constant weight.

    q = softmax(P x);  I = k experts drawn from q without replacement (in eval: the k most likely)
    y = W0 x + omega * sum over I of B_i A_i x,  omega = lora_alpha / sqrt(k r)
    the router learns by RLOO: 1/(M-1) sum_m (L_m - mean(L)) grad log Q(I_m) over M draws

Source: ReMix: Reinforcement Routing for Mixtures of LoRAs in LLM Finetuning, Qiu et al., 2026,
arXiv 2603.10160, read from the paper; no official code was found. Differences from the paper: none.
Our own reading: a draw a token or a sample (the paper says "layer input"), the small start of P,
and that the policy gradient stops at the router's input, so that experts learn from the loss alone.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from moeroute.layers.lora_bank import LoRABank
from moeroute.losses.policy_gradient import NeedsCopies
from moeroute.methods.checks import check_expert_fields, check_top_k
from moeroute.methods.parts import linear_mixture
from moeroute.routers.granularity import PerSequence
from moeroute.routers.scores import LinearScore
from moeroute.routers.subset import SubsetRouter
from moeroute.types import Paper, Site

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from moeroute.layers.lora_mixture import LoRAMixture
    from moeroute.types import SiteKind

GRANULARITIES = ("token", "sequence")


@dataclass(frozen=True, kw_only=True)
class ReMix:
    """Constant-weight mixture of LoRA experts beside every targeted linear, routed by drawing.

    Train on `moeroute.policy_gradient_loss(model, lambda: model(**batch).loss)`, or with a Trainer
    of `moeroute.PolicyGradientMixin`; the loss of a single training forward raises.

    Args:
        r: Rank of one expert. Default of the paper: 8.
        num_experts: Experts per linear. Default of the paper: 8.
        top_k: k, active experts. 1 <= top_k <= num_experts; the paper tries 1 to 4.
        lora_alpha: 2 in the paper.
        lora_dropout: Dropout on the experts' input, in training.
        use_rslora: omega is lora_alpha / sqrt(top_k * r), the paper's better choice, or else
            lora_alpha / (top_k * r).
        granularity: One draw a "token", or one a "sequence" from the mean of its real tokens. The
            log-probability sums over all draws, so that a "token" router's gradient varies more.
        detach_router_input: Whether the policy gradient stops at the router's input.

    Shapes:
        hidden_states: (..., in_features), any floating dtype; the router computes in float32.
        router_logits: (T, E) float32.
        routing_weights, selected_experts: (T, K); weights are 1, omega is the bank's scaling.

    Raises:
        ValueError: A field is out of range.
        RuntimeError: In training, a loss without the policy gradient.

    Cost: k of E LoRA of rank r a linear; a training step runs the model once a copy, two at least.
    Adds E * r * (in + out) + E * in parameters a linear.
    Trains: router (by policy gradient) and experts. Inference: supported, without drawing. Merging:
        undefined, the subset depends on the token.

    Example:
        >>> wrapped = moeroute.wrap_model(model, ReMix(), target_modules=["gate_proj", "up_proj"])
        >>> loss = moeroute.policy_gradient_loss(wrapped, lambda: wrapped(**batch).loss)
    """

    paper: ClassVar[Paper] = Paper(
        title="ReMix: Reinforcement Routing for Mixtures of LoRAs in LLM Finetuning",
        arxiv="2603.10160",
        year=2026,
    )
    site_kind: ClassVar[SiteKind] = "linear"

    r: int = 8
    num_experts: int = 8
    top_k: int = 2
    lora_alpha: float = 2.0
    lora_dropout: float = 0.0
    use_rslora: bool = True
    granularity: Literal["token", "sequence"] = "token"
    detach_router_input: bool = True

    def __post_init__(self) -> None:
        """Check every field."""
        check_expert_fields(self)
        check_top_k(self, self.top_k)
        if self.granularity not in GRANULARITIES:
            raise ValueError(
                f"ReMix: granularity={self.granularity!r} is none of {', '.join(GRANULARITIES)}"
            )

    def build_shared(self, sites: Sequence[Site], /) -> nn.Module | None:
        """Linears share nothing."""
        return None

    def build(self, site: Site, shared: nn.Module | None, /) -> LoRAMixture:
        """One router and one bank for the linear."""
        score = LinearScore(site.in_features, self.num_experts, init_std=0.02)
        router = SubsetRouter(score, self.top_k, detach_input=self.detach_router_input)
        bank = LoRABank(
            num_experts=self.num_experts,
            r=self.r,
            in_features=site.in_features,
            out_features=site.out_features,
            lora_alpha=self.lora_alpha / (math.sqrt(self.top_k) if self.use_rslora else self.top_k),
            lora_dropout=self.lora_dropout,
            use_rslora=self.use_rslora,
        )
        routed = PerSequence(router) if self.granularity == "sequence" else router
        return linear_mixture(site, routed, bank, (NeedsCopies(),))
