"""A temperature that falls with the optimizer's steps, one for all routers that share it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moeroute.types import RoutingRecord


class TemperatureSchedule(nn.Module):
    """Falls in a straight line: start + (end - start) * min(steps taken / steps, 1).

    A step is one of the optimizer's in which routers learnt: `moeroute.post_step(model)` takes it
    if a training forward was seen since the last one, once however many batches were accumulated.
    The number of steps taken is a buffer, saved with the model.

    Args:
        start: Before the first step.
        end: From the last step on.
        steps: How many steps it takes; 0 begins at the end.

    Shapes:
        steps_taken: () int64.

    Raises:
        ValueError: A temperature is not above 0, or steps is below 0.
    """

    steps_taken: Tensor

    def __init__(self, *, start: float = 5.0, end: float = 1.0, steps: int = 2000) -> None:
        super().__init__()
        if not (start > 0.0 and end > 0.0) or steps < 0:
            raise ValueError(
                f"start={start}, end={end}, steps={steps}: temperatures must be above 0, steps 0 "
                "or more"
            )
        self.start, self.end, self.steps = start, end, steps
        self.register_buffer("steps_taken", torch.zeros((), dtype=torch.int64))
        self._seen = False

    def forward(self) -> Tensor:
        """The temperature now, () float32."""
        if not self.steps:
            return torch.full_like(self.steps_taken, self.end, dtype=torch.float32)
        part = (self.steps_taken.float() / self.steps).clamp(max=1.0)
        return self.start + (self.end - self.start) * part

    def observe(self, record: RoutingRecord) -> None:
        """Take note that routers were trained on something."""
        self._seen = True

    @torch.no_grad()
    def post_step(self) -> None:
        """Take a step, if there was a training forward."""
        if self._seen:
            self.steps_taken += 1
        self._seen = False

    def extra_repr(self) -> str:
        """Settings, for `print(model)`."""
        return f"start={self.start:g}, end={self.end:g}, steps={self.steps}"


class SharedSchedule(nn.Module):
    """The schedule of one wrap, and the name of the site that owns it."""

    def __init__(self, schedule: TemperatureSchedule, owner: str) -> None:
        super().__init__()
        self.schedule = schedule
        self.owner = owner
