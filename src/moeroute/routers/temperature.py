"""A temperature that falls with the optimizer's steps, one for all routers that share it."""

from __future__ import annotations

from torch import nn

from moeroute.routers.step_schedule import StepSchedule


class SharedSchedule(nn.Module):
    """The schedule of one wrap, and the name of the site that owns it."""

    def __init__(self, schedule: StepSchedule, owner: str) -> None:
        super().__init__()
        self.schedule = schedule
        self.owner = owner


def temperature_schedule(
    *, start: float = 5.0, end: float = 1.0, steps: int = 2000
) -> StepSchedule:
    """A `StepSchedule` from one temperature to another.

    Raises:
        ValueError: A temperature is not above 0, or steps is below 0.
    """
    if not (start > 0.0 and end > 0.0) or steps < 0:
        raise ValueError(
            f"start={start}, end={end}, steps={steps}: temperatures must be above 0, steps 0 or "
            "more"
        )
    return StepSchedule(start=start, end=end, steps=steps)
