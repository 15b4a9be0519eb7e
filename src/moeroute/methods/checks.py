"""Checks of hyperparameters that several methods have; they run when a method is made."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from moeroute.types import Site


class AdapterFields(Protocol):
    """The fields that every method of LoRA has."""

    @property
    def r(self) -> int:
        """Rank of one expert."""
        ...

    @property
    def lora_dropout(self) -> float:
        """Dropout on the experts' input."""
        ...


class CountFields(Protocol):
    """The field of a method that has a number of experts."""

    @property
    def num_experts(self) -> int:
        """Experts per site."""
        ...


class ExpertFields(AdapterFields, CountFields, Protocol):
    """The fields of a mixture of LoRA that has a number of experts."""


class BalancedFields(Protocol):
    """The field of a method with a balance loss."""

    @property
    def router_aux_loss_coef(self) -> float:
        """Weight of the balance loss."""
        ...


class LoRAFields(ExpertFields, BalancedFields, Protocol):
    """The fields of a mixture with a balance loss."""


def check_adapter_fields(method: AdapterFields) -> None:
    """Raise ValueError naming the field, the value seen and what is allowed."""
    name = type(method).__name__
    if method.r < 1:
        raise ValueError(f"{name}: r={method.r} is below 1; set r to at least 1")
    if not 0.0 <= method.lora_dropout < 1.0:
        raise ValueError(f"{name}: lora_dropout={method.lora_dropout} is outside [0, 1)")


def check_expert_fields(method: ExpertFields) -> None:
    """As `check_adapter_fields`, and the number of experts."""
    check_adapter_fields(method)
    if method.num_experts < 1:
        raise ValueError(
            f"{type(method).__name__}: num_experts={method.num_experts} is below 1; set "
            "num_experts to at least 1"
        )


def check_lora_fields(method: LoRAFields) -> None:
    """As `check_expert_fields`, and the weight of the balance loss."""
    check_expert_fields(method)
    check_balance_weight(method)


def check_balance_weight(method: BalancedFields) -> None:
    """Raise ValueError if the weight of the balance loss is negative."""
    if method.router_aux_loss_coef < 0.0:
        raise ValueError(
            f"{type(method).__name__}: router_aux_loss_coef={method.router_aux_loss_coef} would "
            "reward imbalance; use 0 or more"
        )


def check_top_k(method: CountFields, slots: int) -> None:
    """Raise ValueError unless 1 <= slots <= num_experts."""
    if not 1 <= slots <= method.num_experts:
        raise ValueError(
            f"{type(method).__name__}: top_k={slots} is outside 1..{method.num_experts} "
            f"(num_experts={method.num_experts}); lower top_k or raise num_experts"
        )


class TaskFields(Protocol):
    """The fields of a method that knows tasks."""

    @property
    def num_tasks(self) -> int:
        """How many tasks there are."""
        ...

    @property
    def task_names(self) -> tuple[str, ...]:
        """Their names in the order of their ids, or none."""
        ...


def load_tasks(method: TaskFields) -> None:
    """Make the tuple that a config file holds as a list; names, where given, count the tasks.

    Raises:
        ValueError: No task, two of one name, or another number of names than of tasks.
    """
    name, names = type(method).__name__, tuple(method.task_names)
    if len(set(names)) < len(names):
        raise ValueError(f"{name}: two tasks of one name in task_names={names}")
    if names and method.num_tasks not in (1, len(names)):
        raise ValueError(
            f"{name}: num_tasks={method.num_tasks} but task_names holds {len(names)}; leave "
            "num_tasks out, the names count the tasks"
        )
    if method.num_tasks < 1:
        raise ValueError(
            f"{name}: num_tasks={method.num_tasks} is below 1; set num_tasks to at least 1"
        )
    object.__setattr__(method, "task_names", names)
    object.__setattr__(method, "num_tasks", len(names) or method.num_tasks)


def check_units(method: object, site: Site) -> None:
    """Raise ValueError unless attention and feed-forward of a decoder layer can be told apart."""
    if site.parts:
        return
    raise ValueError(
        f"{type(method).__name__}: {site.name} ({type(site.module).__name__}) has no two units "
        "that can be told apart: one child whose forward takes hidden_states and a cache (the "
        "attention), and one other child with matrices that takes tokens alone and answers with "
        "them (the feed-forward). Leave this layer out of target_modules"
    )
