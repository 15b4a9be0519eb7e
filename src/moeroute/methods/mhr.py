"""MHR: Poly with heads, each of which averages the skills for its slice of input and output.

    w_q = normalised relaxed Bernoulli (in eval, sigmoid) of Z[task, q],  q a head
    A'[:, slice q] = sum_e w_qe A_e[:, slice q],  B'[slice q] = sum_e w_qe B_e[slice q]
    y = W0 x + (1 / r) * B' A' x

Source: Multi-Head Adapter Routing for Cross-Task Generalization, Caccia et al., 2022, arXiv
2211.03831; read from microsoft/mttl and PEFT's PolyConfig (n_splits), with whose numbers ours
agree. Every linear has a table Z of its own, the
paper's choice for T5, unless `coarse`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from moeroute.layers.averaged_bank import AveragedLoRABank
from moeroute.layers.averaged_mixture import AveragedLoRAMixture
from moeroute.layers.frozen import freeze_parameters
from moeroute.methods.checks import check_expert_fields, load_tasks
from moeroute.routers.task_skills import TaskSkills
from moeroute.types import Paper

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from moeroute.types import Site, SiteKind


@dataclass(frozen=True, kw_only=True)
class MHR:
    """A task's average of LoRA skills, head by head, beside every targeted linear.

    Args:
        num_tasks: How many tasks there are; task_ids are below it.
        task_names: Their names in the order of their ids, saved with the adapter; they then count
            the tasks.
        coarse: One table Z for all linears together, the paper's "coarse"; else one a linear.
        freeze_skills: Train the table alone: with skills that exist already, MHR-z; see
            `moeroute.transfer_skills`.
        r: Rank of one skill. Typical in the paper: 16.
        lora_dropout: Dropout on the skills' input, in training.
        num_experts: Skills per linear. Typical in the paper: 8.
        heads: Slices of input and output with weights of their own; they divide both widths. 1 is
            Poly.

    Shapes:
        hidden_states: (B, S, in_features), any floating dtype.
        task_ids: (B,), given to the model's forward or by `moeroute.routing_inputs`.
        router_logits: (T, heads * E) float32.
        routing_weights, selected_experts: (T, heads * E), slot q * E + e for skill e in head q; the
            weights of each head sum to 1 and are equal within a sample.

    Raises:
        ValueError: A field is out of range, or heads do not divide a linear's widths; in forward,
            no task_ids or one out of range.

    Cost: one LoRA of rank r a linear and sample, and the average of E. Adds E * r * (in + out) +
        num_tasks * heads * E parameters a linear.
    Trains: the table and the skills; give the table a rate of its own, the paper's is 100 times
        the skills'. Inference: supported. Merging: one plain LoRA a task.

    Example:
        >>> wrapped = moeroute.wrap_model(model, MHR(num_tasks=3, heads=4))
        >>> loss = wrapped(**batch, task_ids=torch.tensor([0, 2])).loss
    """

    paper: ClassVar[Paper] = Paper(
        title="Multi-Head Adapter Routing for Cross-Task Generalization",
        arxiv="2211.03831",
        year=2022,
    )
    site_kind: ClassVar[SiteKind] = "linear"

    num_tasks: int = 1
    task_names: tuple[str, ...] = ()
    coarse: bool = False
    freeze_skills: bool = False
    r: int = 16
    lora_dropout: float = 0.0
    num_experts: int = 8
    heads: int = 4

    def __post_init__(self) -> None:
        """Check every field."""
        check_expert_fields(self)
        load_tasks(self)
        if self.heads < 1:
            raise ValueError(f"MHR: heads={self.heads} is below 1; set heads to at least 1")

    def build_shared(self, sites: Sequence[Site], /) -> nn.Module | None:
        """The table of all linears, if it is coarse."""
        return self._table() if self.coarse else None

    def build(self, site: Site, shared: nn.Module | None, /) -> AveragedLoRAMixture:
        """A table and a bank for the linear."""
        bank = AveragedLoRABank(
            num_experts=self.num_experts,
            r=self.r,
            in_features=site.in_features,
            out_features=site.out_features,
            scaling=1 / self.r,
            heads=self.heads,
            lora_dropout=self.lora_dropout,
        )
        if self.freeze_skills:
            freeze_parameters(bank)
        router = (
            shared
            if isinstance(shared, TaskSkills)
            else TaskSkills(self.num_tasks, self.num_experts, self.heads)
        )
        return AveragedLoRAMixture(
            router=router,
            bank=bank,
            site=site.name,
            layer_index=site.layer_index,
        )

    def _table(self) -> TaskSkills:
        return TaskSkills(self.num_tasks, self.num_experts, self.heads)
