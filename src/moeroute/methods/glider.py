"""GLIDER: PHATGOOSE's gates plus the likeness of the sample's instruction and the adapter's.

    loc_e  = LN(v_e) . LN(x) / sqrt(in)
    glob_e = cos(embedding of the instruction of adapter e, embedding of the sample's instruction)
    c      = gamma + beta * 1[max_e glob_e >= threshold]
    y      = W0 x + sum_k w_k s_{e_k} B_{e_k} A_{e_k} x
    w      = softmax over the top-k of loc + c * glob

Source: Glider: Global and Local Instruction-Driven Expert Router, Li et al., 2024, arXiv
2410.07172; read from the official code. The rule for c and its numbers (threshold 0.8, gamma 3,
beta 100) are recalled and unverified; they agree with the two constants of the released runs, 3 and
100 (`gamma=100, beta=0`). Differences from the release: one embedding a sample instead of one an
evaluated task; the softmax runs over the chosen logits, which cannot underflow at c = 100 and sums
to 1; instructions and embeddings are the caller's to make (the paper: GPT-4 and nomic-embed).
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
from moeroute.routers.instructions import InstructionScore, StepWeight
from moeroute.routers.select import TopKSoftmax
from moeroute.types import Paper

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from moeroute.layers.lora_mixture import LoRAMixture
    from moeroute.types import Site, SiteKind


@dataclass(frozen=True, kw_only=True)
class GLIDER:
    """Existing LoRA adapters, mixed by trained gates and by what the sample asks for.

    The gates are trained as PHATGOOSE's, with each sample's adapter as its task id and without
    embeddings. In eval every call needs `sample_embeddings`, and the adapters need theirs once:
    `moeroute.layers.set_instruction_embeddings`; they are saved with the mixture.

    Args:
        top_k: Adapters per token in eval; fewer where fewer adapt a linear. Default of the paper:
            2.
        instruction_dim: Width of the embeddings.
        gamma: How much likeness counts always. gamma=0, beta=0 is PHATGOOSE, without embeddings.
        beta: What is added where an adapter is near; 0 makes c the constant gamma.
        threshold: Cosine from which on an adapter is near.
        embedder: Name of what made the embeddings; kept for those who load the mixture.
        sites: Filled in by `moeroute.mix_adapters`, and so is:
        experts: The adapters.

    Shapes:
        hidden_states: (..., in_features), any floating dtype; the router computes in float32.
        sample_embeddings: (B, instruction_dim), any length.
        router_logits: (T, E) float32, -inf for an adapter that does not adapt this linear.
        routing_weights, selected_experts: (T, 1) in training, the weight in (0, 1); (T, K) in eval,
            weights sum to 1 per token.

    Raises:
        ValueError: A field is out of range, or there are no adapters to mix; in training, no
            task_ids; in eval, no embeddings of the samples or of the adapters.

    Cost: one LoRA of the adapters' joint rank a linear. Adds E * in parameters and
        E * instruction_dim numbers a linear beside the adapters.
    Trains: the gates; the adapters are frozen. Inference: needs sample embeddings. Merging:
        undefined, the weights depend on the token.

    Example:
        >>> mixed = moeroute.mix_adapters(model, paths, router=GLIDER(instruction_dim=768))
        >>> moeroute.layers.set_instruction_embeddings(mixed, {"math": math, "code": code})
        >>> mixed.eval()(**batch, sample_embeddings=embed(questions))
    """

    paper: ClassVar[Paper] = Paper(
        title="Glider: Global and Local Instruction-Driven Expert Router",
        arxiv="2410.07172",
        year=2024,
    )
    site_kind: ClassVar[SiteKind] = "linear"

    top_k: int = 2
    instruction_dim: int = 768
    gamma: float = 3.0
    beta: float = 100.0
    threshold: float = 0.8
    embedder: str = ""
    sites: tuple[str, ...] = ()
    experts: tuple[LoRAExpert, ...] = ()

    def __post_init__(self) -> None:
        """Check every field."""
        load_experts(self)
        check_slots(self, self.top_k)
        if self.instruction_dim < 1:
            raise ValueError(f"GLIDER: instruction_dim={self.instruction_dim} is below 1")
        if self.gamma < 0 or self.beta < 0:
            raise ValueError(
                f"GLIDER: gamma={self.gamma}, beta={self.beta}: below 0 the adapters least like "
                "the sample would be preferred"
            )
        if not -1 <= self.threshold <= 1:
            raise ValueError(f"GLIDER: threshold={self.threshold} is no cosine, -1 to 1")

    def build_shared(self, sites: Sequence[Site], /) -> nn.Module | None:
        """Linears share nothing: each may lie on a device of its own."""
        check_sites(self, sites)
        return None

    def build(self, site: Site, shared: nn.Module | None, /) -> LoRAMixture:
        """A bank of the adapters, frozen, their gates and their instructions."""
        bank = expert_bank(self, site)
        score = InstructionScore(
            GateScore(site.in_features, bank.num_experts),
            self.instruction_dim,
            [expert.name for expert in self.experts],
            StepWeight(gamma=self.gamma, beta=self.beta, threshold=self.threshold),
        )
        select = TopKSoftmax(min(self.top_k, bank.num_experts))
        return linear_mixture(site, OneGateInTraining(present_score(score, bank), select), bank)
