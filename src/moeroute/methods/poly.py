"""Poly: skills shared by tasks, each a LoRA; a task averages the skills that it uses.

    z = relaxed Bernoulli of Z[task] in training, sigmoid(Z[task]) in eval
    w = z / sum_e z
    y = W0 x + (1 / r) * (sum_e w_e B_e) (sum_e w_e A_e) x

Source: Combining Modular Skills in Multitask Learning, Ponti et al., 2022, arXiv 2202.13914; read
from microsoft/mttl and PEFT's PolyConfig, with whose numbers ours agree. Every linear has a table Z
of its own. `mix="output"` is our option: the experts' answers are averaged instead of their
matrices, which leaves the cross terms B_e A_f out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from moeroute.layers.averaged_bank import AveragedLoRABank
from moeroute.layers.averaged_mixture import AveragedLoRAMixture
from moeroute.layers.frozen import freeze_parameters
from moeroute.layers.lora_bank import LoRABank
from moeroute.methods.checks import check_expert_fields, load_tasks
from moeroute.methods.parts import linear_mixture
from moeroute.routers.task_skills import TaskSkills
from moeroute.types import Paper

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from moeroute.types import Site, SiteKind


@dataclass(frozen=True, kw_only=True)
class Poly:
    """A task's average of LoRA skills beside every targeted linear.

    Args:
        num_tasks: How many tasks there are; task_ids are below it.
        task_names: Their names in the order of their ids, saved with the adapter; they then count
            the tasks.
        coarse: One table Z for all linears together, the paper's "coarse"; else one a linear.
        freeze_skills: Train the table alone: with skills that exist already, MHR-z; see
            `moeroute.transfer_skills`.
        r: Rank of one skill. Default of PEFT: 8.
        lora_dropout: Dropout on the skills' input, in training.
        num_experts: Skills per linear. Default of PEFT: 4.
        mix: "parameter", the paper's: A and B are averaged; "output": the answers are.

    Shapes:
        hidden_states: (B, S, in_features), any floating dtype.
        task_ids: (B,), given to the model's forward or by `moeroute.routing_inputs`.
        router_logits: (T, E) float32.
        routing_weights, selected_experts: (T, E); weights sum to 1 and are equal within a sample.

    Raises:
        ValueError: A field is out of range; in forward, no task_ids or one out of range.

    Cost: one LoRA of rank r a linear and sample, and the average of E. Adds E * r * (in + out) +
        num_tasks * E parameters a linear.
    Trains: the table and the skills; give the table a rate of its own, the paper's is 100 times
        the skills'. Inference: supported. Merging: one plain LoRA a task.

    Example:
        >>> wrapped = moeroute.wrap_model(model, Poly(num_tasks=3))
        >>> loss = wrapped(**batch, task_ids=torch.tensor([0, 2])).loss
    """

    paper: ClassVar[Paper] = Paper(
        title="Combining Modular Skills in Multitask Learning", arxiv="2202.13914", year=2022
    )
    site_kind: ClassVar[SiteKind] = "linear"

    num_tasks: int = 1
    task_names: tuple[str, ...] = ()
    coarse: bool = False
    freeze_skills: bool = False
    r: int = 8
    lora_dropout: float = 0.0
    num_experts: int = 4
    mix: Literal["parameter", "output"] = "parameter"

    def __post_init__(self) -> None:
        """Check every field."""
        check_expert_fields(self)
        load_tasks(self)
        if self.mix not in ("parameter", "output"):
            raise ValueError(f"Poly: mix={self.mix!r}; use 'parameter' or 'output'")

    def build_shared(self, sites: Sequence[Site], /) -> nn.Module | None:
        """The table of all linears, if it is coarse."""
        return self._table() if self.coarse else None

    def build(self, site: Site, shared: nn.Module | None, /) -> nn.Module:
        """A table and a bank for the linear."""
        router = (
            shared
            if isinstance(shared, TaskSkills)
            else TaskSkills(self.num_tasks, self.num_experts)
        )
        sizes = {
            "num_experts": self.num_experts,
            "r": self.r,
            "in_features": site.in_features,
            "out_features": site.out_features,
            "lora_dropout": self.lora_dropout,
        }
        if self.mix == "output":
            bank = LoRABank(**sizes, lora_alpha=1.0)
            mixture = linear_mixture(site, router, bank)
        else:
            bank = AveragedLoRABank(**sizes, scaling=1 / self.r)
            mixture = AveragedLoRAMixture(
                router=router, bank=bank, site=site.name, layer_index=site.layer_index
            )
        if self.freeze_skills:
            freeze_parameters(bank)
        return mixture

    def _table(self) -> TaskSkills:
        return TaskSkills(self.num_tasks, self.num_experts)
