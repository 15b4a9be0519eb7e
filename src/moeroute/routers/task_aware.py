"""A router that holds an embedding of each task, for a loss that tells tasks apart.

Axes: B samples, T tokens, E experts.
"""

from __future__ import annotations

import torch
from torch import nn

from moeroute.routers.composed import ComposedRouter
from moeroute.routers.samples import require_task_ids
from moeroute.types import RouterInput, RouterOutput


class TaskAwareRouter(nn.Module):
    """Any composed router, and one learned vector a task that `TaskContrastLoss` compares it with.

    The vectors take no part in the routing, and tasks are asked for in training alone.

    Args:
        composed: Routes, in training and in eval.
        num_tasks: How many tasks there are.

    Shapes:
        task_embeddings: (num_tasks, E), standard normal at first.
        Others as the composed router's.

    Raises:
        ValueError: num_tasks is below 1; in a training forward, no task_ids or one out of range.
    """

    def __init__(self, composed: ComposedRouter, *, num_tasks: int) -> None:
        super().__init__()
        if num_tasks < 1:
            raise ValueError(f"num_tasks={num_tasks} is below 1; a router needs at least one task")
        self.num_experts = composed.num_experts
        self.composed = composed
        self.task_embeddings = nn.Parameter(torch.randn(num_tasks, composed.num_experts))

    def forward(self, router_input: RouterInput) -> RouterOutput:
        """Route (T, H) tokens."""
        if self.training:
            require_task_ids(router_input, self.task_embeddings.shape[0], "training by task")
        return self.composed(router_input)
