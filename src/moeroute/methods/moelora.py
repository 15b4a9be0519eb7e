"""MOELoRA: one mixture of LoRA experts a task, the same for all of its tokens.

    w = softmax(V e_task),  e_task a learned embedding
    y = W0 x + (lora_alpha / r) * sum_e w_e B_e A_e x,  B_e A_e of rank r / E

Source: When MOE Meets LLMs: Parameter Efficient Fine-tuning for Multi-task Medical Applications,
Liu et al., 2023, arXiv 2310.18339; read from the official code, whose embedding width (64), split
of the rank and scaling are kept. Others use the same name for other equations (CoIN's MoELoRA
routes by token). Differences from the code: A starts as in PEFT instead of normal with 0.01.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from moeroute.layers.lora_bank import LoRABank
from moeroute.methods.checks import check_expert_fields, load_tasks
from moeroute.methods.parts import linear_mixture
from moeroute.routers.composed import ComposedRouter
from moeroute.routers.granularity import TaskScore
from moeroute.routers.select import All
from moeroute.types import Paper

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from moeroute.layers.lora_mixture import LoRAMixture
    from moeroute.types import Site, SiteKind


@dataclass(frozen=True, kw_only=True)
class MOELoRA:
    """A task's own soft mixture of LoRA experts beside every targeted linear.

    Args:
        num_tasks: How many tasks there are; task_ids are below it.
        task_names: Their names in the order of their ids, saved with the adapter; they then count
            the tasks.
        r: Rank of all experts together; each has r / num_experts. Default of the code: 16.
        lora_alpha: Scaling is lora_alpha / r.
        lora_dropout: Dropout on the experts' input, in training.
        use_rslora: Scaling lora_alpha / sqrt(r) instead.
        num_experts: Experts per linear; divides r. Default of the code: 8.
        task_embedding_dim: Width of a task's embedding. Default of the code: 64.

    Shapes:
        hidden_states: (B, S, in_features), any floating dtype.
        task_ids: (B,), given to the model's forward or by `moeroute.routing_inputs`.
        router_logits: (T, E) float32.
        routing_weights, selected_experts: (T, E); weights sum to 1 and are equal within a sample.

    Raises:
        ValueError: A field is out of range, or num_experts does not divide r; in forward, no
            task_ids or one out of range.

    Cost: one LoRA of rank r a linear. Adds r * (in + out) + (num_tasks + E) * 64 parameters a
        linear.
    Trains: task embeddings, gate and experts. Inference: supported. Merging: one plain LoRA a task.

    Example:
        >>> wrapped = moeroute.wrap_model(model, MOELoRA(num_tasks=3))
        >>> loss = wrapped(**batch, task_ids=torch.tensor([0, 2])).loss
    """

    paper: ClassVar[Paper] = Paper(
        title="When MOE Meets LLMs: Parameter Efficient Fine-tuning for Multi-task Medical "
        "Applications",
        arxiv="2310.18339",
        year=2023,
    )
    site_kind: ClassVar[SiteKind] = "linear"

    num_tasks: int = 1
    task_names: tuple[str, ...] = ()
    r: int = 16
    lora_alpha: float = 32.0
    lora_dropout: float = 0.0
    use_rslora: bool = False
    num_experts: int = 8
    task_embedding_dim: int = 64

    def __post_init__(self) -> None:
        """Check every field."""
        check_expert_fields(self)
        load_tasks(self)
        if self.task_embedding_dim < 1:
            raise ValueError(
                f"MOELoRA: task_embedding_dim={self.task_embedding_dim} is below 1; set it to at "
                "least 1"
            )
        if self.r % self.num_experts:
            raise ValueError(
                f"MOELoRA: num_experts={self.num_experts} does not divide r={self.r}; the experts "
                "share the rank in equal parts"
            )

    def build_shared(self, sites: Sequence[Site], /) -> nn.Module | None:
        """Linears share nothing."""
        return None

    def build(self, site: Site, shared: nn.Module | None, /) -> LoRAMixture:
        """A task gate and a bank for the linear."""
        score = TaskScore(self.num_tasks, self.num_experts, embedding_dim=self.task_embedding_dim)
        rank = self.r // self.num_experts
        scaling = self.lora_alpha / (self.r**0.5 if self.use_rslora else self.r)
        bank = LoRABank(
            num_experts=self.num_experts,
            r=rank,
            in_features=site.in_features,
            out_features=site.out_features,
            lora_alpha=scaling * rank,
            lora_dropout=self.lora_dropout,
        )
        return linear_mixture(site, ComposedRouter(score, All()), bank)
