"""PHATGOOSE: existing LoRA adapters, each with a gate that is trained by itself and then compared.

    training: y = W0 x + sigmoid(v_e . x) s_e B_e A_e x,  e the adapter of the sample
    eval:     z_e = LN(v_e) . LN(x) / sqrt(in)
              y = W0 x + sum_k w_k s_{e_k} B_{e_k} A_{e_k} x,  w = softmax over the top-k of z

Source: Learning to Route Among Specialized Experts for Zero-Shot Generalization, Muqeeth et al.,
2024, arXiv 2402.05859, section 3; read from the official code. Differences from the paper: all
gates train in one run if the batches hold samples of all adapters (no gate sees another's samples);
the softmax runs over the chosen logits, equal to softmax over all and renormalising; an adapter
without LoRA at a linear takes no part there. The paper trains the gates for 100 steps at a
learning rate of 5e-3 on the data of each adapter.
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
from moeroute.routers.by_label import OneGateInTraining
from moeroute.routers.expert_gates import GateScore
from moeroute.routers.select import TopKSoftmax
from moeroute.types import Paper

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from moeroute.layers.lora_mixture import LoRAMixture
    from moeroute.types import Site, SiteKind


@dataclass(frozen=True, kw_only=True)
class PHATGOOSE:
    """Existing LoRA adapters, mixed token by token by gates that were trained one by one.

    Train the gates with the adapter of each sample as its task id: its place in the mapping given
    to `moeroute.mix_adapters`. Evaluation needs no task ids. Gates that nobody trained are zero and
    tie: every token then gets the first adapters in equal parts.

    Args:
        top_k: Adapters per token in eval; fewer where fewer adapt a linear. Default of the paper:
            2.
        sites: Filled in by `moeroute.mix_adapters`, and so is:
        experts: The adapters.

    Shapes:
        hidden_states: (..., in_features), any floating dtype; the router computes in float32.
        router_logits: (T, E) float32, -inf for an adapter that does not adapt this linear.
        routing_weights, selected_experts: (T, 1) in training, the weight in (0, 1); (T, K) in eval,
            weights sum to 1 per token.

    Raises:
        ValueError: A field is out of range, or there are no adapters to mix; in training, no
            task_ids or one that no adapter has.

    Cost: one LoRA of the adapters' joint rank a linear. Adds E * in parameters a linear beside the
        adapters.
    Trains: the gates; the adapters are frozen. Inference: supported. Merging: undefined, the
        weights depend on the token.

    Example:
        >>> paths = {"math": "adapters/math", "code": "adapters/code"}
        >>> mixed = moeroute.mix_adapters(model, paths, router=PHATGOOSE())
        >>> mixed.train()(**batch, task_ids=torch.tensor([0, 1])).loss.backward()  # math, code
    """

    paper: ClassVar[Paper] = Paper(
        title="Learning to Route Among Specialized Experts for Zero-Shot Generalization",
        arxiv="2402.05859",
        year=2024,
    )
    site_kind: ClassVar[SiteKind] = "linear"

    top_k: int = 2
    sites: tuple[str, ...] = ()
    experts: tuple[LoRAExpert, ...] = ()

    def __post_init__(self) -> None:
        """Check every field."""
        load_experts(self)
        check_slots(self, self.top_k)

    def build_shared(self, sites: Sequence[Site], /) -> nn.Module | None:
        """Linears share nothing."""
        check_sites(self, sites)
        return None

    def build(self, site: Site, shared: nn.Module | None, /) -> LoRAMixture:
        """A bank of the adapters, frozen, and their gates."""
        bank = expert_bank(self, site)
        score = present_score(GateScore(site.in_features, bank.num_experts), bank)
        select = TopKSoftmax(min(self.top_k, bank.num_experts))
        return linear_mixture(site, OneGateInTraining(score, select), bank)
