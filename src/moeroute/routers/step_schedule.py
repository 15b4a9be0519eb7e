"""A number that moves with the optimizer's steps."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moeroute.ops.ranks import sum_over_ranks
from moeroute.types import RoutingRecord


class StepSchedule(nn.Module):
    """Goes in a straight line: start + (end - start) * min(steps taken / steps, 1).

    `moeroute.post_step(model)` takes a step if a rank has seen a training forward of the router
    since the last one, however many batches were accumulated. The number of steps taken is a
    buffer, saved with the model.

    Args:
        start: Before the first step.
        end: From the last step on.
        steps: Optimizer steps between them; 0 begins at the end.

    Shapes:
        steps_taken: () int64.

    Raises:
        ValueError: steps is below 0.
    """

    steps_taken: Tensor

    def __init__(self, *, start: float, end: float, steps: int) -> None:
        super().__init__()
        if steps < 0:
            raise ValueError(f"steps={steps} is below 0; use 0 to begin at the end")
        self.start, self.end, self.steps = start, end, steps
        self.register_buffer("steps_taken", torch.zeros((), dtype=torch.int64))
        self._seen = False

    def forward(self) -> Tensor:
        """The number now, () float32."""
        taken = self.steps_taken.float()
        part = (taken / self.steps).clamp(max=1.0) if self.steps else torch.ones_like(taken)
        return self.start + (self.end - self.start) * part

    def observe(self, record: RoutingRecord) -> None:
        """Take note of a training forward."""
        self._seen = True

    @torch.no_grad()
    def post_step(self) -> None:
        """Take a step, if any rank has something to step for."""
        seen = torch.tensor(int(self._seen), device=self.steps_taken.device)
        self.steps_taken += (sum_over_ranks(seen) > 0).to(torch.int64)
        self._seen = False

    def extra_repr(self) -> str:
        """Settings, for `print(model)`."""
        return f"start={self.start:g}, end={self.end:g}, steps={self.steps}"
