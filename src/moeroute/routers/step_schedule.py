"""A number that moves with the optimizer's steps: a temperature that falls, a sharpness that grows.

One can serve one router, or all that share it.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moeroute.ops.ranks import sum_over_ranks
from moeroute.types import RoutingRecord


class StepSchedule(nn.Module):
    """Goes in a straight line: start + (end - start) * min(steps taken / steps, 1).

    A step is one of the optimizer's in which routers learnt: `moeroute.post_step(model)` takes it
    if any rank has seen a training forward since the last one, once however many batches were
    accumulated. The number of steps taken is a buffer, saved with the model.

    Args:
        start: Before the first step.
        end: From the last step on.
        steps: How many steps it takes; 0 begins at the end.

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
        if not self.steps:
            return torch.full_like(self.steps_taken, self.end, dtype=torch.float32)
        part = (self.steps_taken.float() / self.steps).clamp(max=1.0)
        return self.start + (self.end - self.start) * part

    def observe(self, record: RoutingRecord) -> None:
        """Take note that routers were trained on something."""
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


class SharedSchedule(nn.Module):
    """The schedule of one wrap, and the name of the site that owns it."""

    def __init__(self, schedule: StepSchedule, owner: str) -> None:
        super().__init__()
        self.schedule = schedule
        self.owner = owner
