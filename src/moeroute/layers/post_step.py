"""State that learns without a gradient: it watches every training forward and moves once a step.

A part of a router that has such state (a bias for choosing, a moving average) says so by having the
two methods of `Stateful`. A routed layer shows it each record once: a recomputation under
activation checkpointing is not shown. `post_step` then moves it, once an optimizer step.
"""

from __future__ import annotations

from typing import Protocol, TypeGuard

import torch
from torch import nn

from moeroute.ops.ranks import sum_over_ranks as sum_over_ranks
from moeroute.types import RoutingRecord


class Stateful(Protocol):
    """A module with state that no gradient reaches."""

    def observe(self, record: RoutingRecord, /) -> None:
        """Take note of one training forward; nothing moves yet."""
        ...

    def post_step(self) -> None:
        """Move the state by everything observed since the last call, over all ranks."""
        ...


def is_stateful(module: nn.Module) -> TypeGuard[Stateful]:
    """Tell whether a module has both methods of `Stateful`."""
    return callable(vars(type(module)).get("observe")) and callable(
        vars(type(module)).get("post_step")
    )


def stateful_parts(router: nn.Module) -> list[Stateful]:
    """The parts of a router that want to see what it routed."""
    return [module for module in router.modules() if is_stateful(module)]


def in_backward() -> bool:
    """True while autograd runs, which is when activation checkpointing recomputes a forward."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._current_graph_task_id() != -1


def post_step(model: nn.Module) -> None:
    """Move all state that learns without a gradient; call once after every `optimizer.step()`.

    Under data parallelism call it on every rank: what was observed is summed over them. With
    `Trainer` add `moeroute.PostStepCallback()` instead.

    Args:
        model: A wrapped model, or any model that holds routed layers.
    """
    for module in model.modules():
        if is_stateful(module):
            module.post_step()
