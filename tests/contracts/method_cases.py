"""How the contract suite builds each method small, and which of its tests cannot apply to it.

A new method is a row here only if it is an exception: others are built from `SMALL`.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from types import MappingProxyType
from typing import Any

import pytest
import torch
from transformers import Trainer

import moeroute

SMALL: Mapping[str, Any] = MappingProxyType({"r": 3, "num_experts": 4})
NUM_EXPERTS, RANK = 4, 3
NUM_TASKS = 5


def permute_experts(key: str, parameter: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """A parameter of a mixture of stacked banks with its experts in another order."""
    if key.endswith("lora_a"):
        return parameter.unflatten(0, (NUM_EXPERTS, RANK))[order].flatten(0, 1)
    if key.endswith("lora_b"):
        return parameter.unflatten(1, (NUM_EXPERTS, RANK))[:, order].flatten(1)
    return parameter[order]


def loss_of_output(model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """What the model says its loss is."""
    return model(**batch).loss


def loss_of_draws(model: torch.nn.Module, batch: Mapping[str, torch.Tensor]) -> torch.Tensor:
    """The policy gradient loss, of the same draws at every call."""
    torch.manual_seed(11)
    return moeroute.policy_gradient_loss(model, lambda: model(**batch).loss)


class DrawingTrainer(moeroute.PolicyGradientMixin, Trainer):
    """Trains routers that draw."""


@dataclass(frozen=True, kw_only=True)
class MethodCase:
    """One method in the suite.

    Attributes:
        fields: Of the small method.
        second: Fields that another small method of the kind has.
        by_task: Whether its routers need task_ids.
        loss_of: (model, batch) to the loss that the method trains on, the same at every call.
        trainer: What makes a Trainer that trains all of the method.
        permute: (key, parameter, order) to the parameter with its experts in another order.
        exceptions: Name of a test of the suite -> why it cannot hold for this method.
    """

    fields: Mapping[str, Any] = field(default_factory=lambda: SMALL)
    second: Mapping[str, Any] = field(default_factory=lambda: {"r": 2})
    by_task: bool = False
    loss_of: Callable[[torch.nn.Module, Mapping[str, torch.Tensor]], torch.Tensor] = loss_of_output
    trainer: Callable[..., Trainer] = Trainer
    permute: Callable[[str, torch.Tensor, torch.Tensor], torch.Tensor] = permute_experts
    exceptions: Mapping[str, str] = field(default_factory=dict)


CASES: Mapping[str, MethodCase] = MappingProxyType(
    {
        "remix": MethodCase(loss_of=loss_of_draws, trainer=DrawingTrainer),
        "smora": MethodCase(
            fields={"r": NUM_EXPERTS * RANK, "rank_partition": RANK, "top_k": 2 * RANK},
            second={"r": 2 * RANK},
            trainer=partial(Trainer, callbacks=[moeroute.PostStepCallback()]),
        ),
    }
)


def case_of(name: str) -> MethodCase:
    """The case of a registered method."""
    return CASES.get(name, MethodCase())


def skip_exceptions(name: str, test: str) -> None:
    """Skip a test that the method's paper rules out, with the reason."""
    reason = case_of(name).exceptions.get(test.partition("[")[0])
    if reason:
        pytest.skip(f"{name}: {reason}")


def small(name: str, **fields: Any) -> moeroute.types.Method:
    """A small method."""
    return moeroute.get_method(name)(**{**case_of(name).fields, **fields})


def with_tasks(name: str, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The batch with what the method's routers need to know of its samples."""
    if not case_of(name).by_task:
        return batch
    return {**batch, "task_ids": torch.arange(batch["input_ids"].shape[0]) % NUM_TASKS}
