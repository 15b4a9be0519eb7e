"""A router by task: each task draws its skills, or takes them in the mean.

Axes: B samples, S tokens of a sample, T = B * S, h heads, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moeroute.routers.granularity import TaskScore
from moeroute.routers.samples import to_tokens
from moeroute.types import RouterInput, RouterOutput

EPS = 1e-12


class TaskSkills(nn.Module):
    """Every head's weights over the experts, from a table of one logit a task, head and expert.

        z = sigmoid(logits + noise),  w = z / sum_e z  a head

    In training the noise is logistic, one draw a sample, head and expert: z is a relaxed Bernoulli
    variable at temperature 1. In eval there is none.

    Source: Combining Modular Skills in Multitask Learning, Ponti et al., 2022, arXiv 2202.13914;
    Multi-Head Adapter Routing, Caccia et al., 2022, arXiv 2211.03831.

    Args:
        num_tasks: How many tasks there are.
        num_experts: E.
        heads: h.

    Shapes:
        router_logits: (T, h * E) float32, without the noise.
        routing_weights, selected_experts: (T, h * E), slot q * E + e for expert e in head q; each
            head's weights sum to 1.
    """

    def __init__(self, num_tasks: int, num_experts: int, heads: int = 1) -> None:
        super().__init__()
        self.heads = heads
        self.num_experts = heads * num_experts
        self.score = TaskScore(num_tasks, self.num_experts)

    def forward(self, router_input: RouterInput) -> RouterOutput:
        """Route (T, H) tokens by their samples' tasks."""
        logits = self.score.of_samples(router_input)  # (B, h * E)
        noisy = logits
        if self.training:
            draw = torch.rand_like(logits).clamp(EPS, 1 - torch.finfo(logits.dtype).eps)
            noisy = logits + torch.log(draw) - torch.log1p(-draw)
        weights = self.normalized(noisy)
        slots = torch.arange(self.num_experts, device=logits.device)
        shape = router_input.sequence_shape
        return RouterOutput(
            router_logits=to_tokens(logits, shape),
            routing_weights=to_tokens(weights, shape),
            selected_experts=slots.expand(shape[0] * shape[1], -1),
        )

    def normalized(self, logits: Tensor) -> Tensor:
        """(B, h * E) logits to weights, each head's to a sum of 1."""
        skills = torch.sigmoid(logits).unflatten(1, (self.heads, -1))
        return (skills / (skills.sum(2, keepdim=True) + EPS)).flatten(1)

    @torch.no_grad()
    def task_weights(self, task_id: int) -> Tensor:
        """The weights (h, E) of one task in eval.

        Raises:
            ValueError: There is no such task.
        """
        if not 0 <= task_id < self.score.num_tasks:
            raise ValueError(f"task {task_id} is none of {self.score.num_tasks}")
        logits = self.score.task_table.weight[task_id].float()[None]
        return self.normalized(logits)[0].unflatten(0, (self.heads, -1))
