"""Routers that decide once a sample or once a task, out of routers and tables.

Axes: B samples, S tokens of a sample, T = B * S, H hidden, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from moeroute.routers.samples import (
    output_to_tokens,
    require_task_ids,
    sample_means,
    to_tokens,
)
from moeroute.routers.scores import linear_logits
from moeroute.types import Router, RouterInput, RouterOutput

MEANS = "sample_means"


class PerSequence(nn.Module):
    """One routing for all tokens of a sample, from the mean of its real tokens.

    While text is generated the prompt's mean decides for every later token: what the first call
    with a cache saw is remembered.

    Args:
        router: Any router over (B, H) means.

    Shapes:
        As the router's, each sample's row repeated for its tokens.

    Raises:
        ValueError: In forward, if a cache holds decisions of another number of samples.
    """

    router: Router

    def __init__(self, router: nn.Module) -> None:
        super().__init__()
        self.router = router  # pyright: ignore[reportAttributeAccessIssue]
        self.num_experts = self.router.num_experts

    def forward(self, router_input: RouterInput) -> RouterOutput:
        """Route (T, H) tokens."""
        shape = router_input.sequence_shape
        routing = self.router(
            RouterInput(hidden_states=self._means(router_input), sequence_shape=(shape[0], 1))
        )
        return output_to_tokens(routing, shape)

    def _means(self, router_input: RouterInput) -> Tensor:
        memory = router_input.memory
        if memory is None:
            return sample_means(router_input)
        if MEANS not in memory:
            memory[MEANS] = sample_means(router_input).detach()
        if memory[MEANS].shape[0] != router_input.sequence_shape[0]:
            raise ValueError(
                f"the cache was filled with {memory[MEANS].shape[0]} samples but this call has "
                f"{router_input.sequence_shape[0]}; start with a fresh cache"
            )
        return memory[MEANS]


class TaskScore(nn.Module):
    """Logits by task: a table that is learned as it is, or through a small embedding.

    Args:
        num_tasks: How many tasks there are.
        num_experts: E, at least 1.
        embedding_dim: None: one row of logits a task. A number: an embedding of that width a task,
            and one linear from it to the logits.
        init_range: The table starts uniform within it; an embedding starts as torch's.

    Shapes:
        router_logits: (T, E) float32, or float64.

    Raises:
        ValueError: A size below 1; in forward, no task_ids or one out of range.
    """

    def __init__(
        self,
        num_tasks: int,
        num_experts: int,
        *,
        embedding_dim: int | None = None,
        init_range: float = 1e-3,
    ) -> None:
        super().__init__()
        if min(num_tasks, num_experts, 1 if embedding_dim is None else embedding_dim) < 1:
            raise ValueError(
                f"num_tasks={num_tasks}, num_experts={num_experts}, embedding_dim={embedding_dim}: "
                "all are at least 1"
            )
        self.num_tasks = num_tasks
        self.num_experts = num_experts
        self.init_range = init_range
        width = num_experts if embedding_dim is None else embedding_dim
        self.task_table = nn.Embedding(num_tasks, width)
        self.to_logits = nn.Identity()
        if embedding_dim is None:
            nn.init.uniform_(self.task_table.weight, -init_range, init_range)
        else:
            self.to_logits = nn.Linear(embedding_dim, num_experts, bias=False)

    def of_samples(self, router_input: RouterInput) -> Tensor:
        """(B, E) logits."""
        ids = require_task_ids(router_input, self.num_tasks, type(self).__name__)
        return self.of_tasks(ids).to(router_input.hidden_states.device)

    def of_tasks(self, task_ids: Tensor) -> Tensor:
        """(N,) task ids in range to (N, E) logits on the table's device, autocast or not."""
        table = self.task_table.weight
        rows = functional.embedding(task_ids.to(table.device), table)
        if isinstance(self.to_logits, nn.Linear):
            return linear_logits(rows, self.to_logits.weight, None, None)
        return rows.to(torch.promote_types(rows.dtype, torch.float32))

    def forward(self, router_input: RouterInput) -> Tensor:
        """Answer (T, E) logits."""
        return to_tokens(self.of_samples(router_input), router_input.sequence_shape)
