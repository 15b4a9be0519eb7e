"""A selection that watches how many experts a chunk of tokens uses, and steers a loss by it.

Axes: T tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from moeroute.ops.chunks import chunk_activation
from moeroute.ops.exact import uncast
from moeroute.ops.ranks import sum_over_ranks
from moeroute.routers.select import Select, Selection, choose
from moeroute.types import RoutingRecord

BUFFERS = ("chunk_coefficient", "start", "end", "position", "steps", "current", "previous")


class ChunkControl(nn.Module):
    """Another selection, with the coefficient of `moeroute.losses.ChunkSparsityLoss`.

    Every `period` optimizer steps, after the first `hold`, the mean loss of the last period is
    divided by that of the period before:

        growth <= 1: the coefficient goes to coefficient * growth over the next period
        growth > 1:  to coefficient * max(growth, least_growth), up to max_factor * its first value

    `moeroute.post_step(model)` counts the steps, over all accumulated batches and ranks. All of it
    is saved with the model, in float32.

    Source: BlockFFN: Towards End-Side Acceleration-Friendly Mixture-of-Experts with Chunk-Level
    Activation Sparsity, Song et al., 2025, arXiv 2507.08771, and its official code. Difference from
    the paper: each layer steers by its own loss, where the paper takes the mean over layers.

    Args:
        select: What is watched, such as `PositiveRMS(E)`.
        coefficient, chunk_size: At first, and as of the loss. Defaults are the paper's.
        hold, period: Steps without a change, and of one window.
        least_growth, max_factor: As above.

    Shapes:
        chunk_coefficient: () float32.

    Raises:
        ValueError: A number is out of range.
    """

    select: Select
    chunk_coefficient: Tensor
    start: Tensor
    end: Tensor
    position: Tensor
    steps: Tensor
    current: Tensor
    previous: Tensor

    def __init__(
        self,
        select: Select,
        *,
        coefficient: float = 5e-2,
        chunk_size: int = 64,
        hold: int = 1000,
        period: int = 100,
        least_growth: float = 1.025,
        max_factor: float = 4.0,
    ) -> None:
        super().__init__()
        if coefficient <= 0 or min(chunk_size, period) < 1 or min(least_growth, max_factor) < 1.0:
            raise ValueError(
                f"coefficient={coefficient} must be above 0; chunk_size={chunk_size}, "
                f"period={period}, least_growth={least_growth}, max_factor={max_factor} at least 1"
            )
        self.select, self.chunk_size, self.hold, self.period = select, chunk_size, hold, period
        self.least_growth, self.max_coefficient = least_growth, max_factor * coefficient
        for name in ("chunk_coefficient", "start", "end"):
            self.register_buffer(name, torch.tensor(coefficient, dtype=torch.float32))
        for name in ("position", "steps"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64))
        for name in ("current", "previous"):  # sum of losses and their number
            self.register_buffer(name, torch.zeros(2, dtype=torch.float32))
        self._seen: Tensor | None = None

    def check(self, num_experts: int) -> None:
        """Raise ValueError if the selection does not fit the number of experts."""
        self.select.check(num_experts)

    def forward(self, router_logits: Tensor) -> Selection:
        """Choose for each row of (T, E) logits."""
        return self.select(router_logits)

    def among(self, router_logits: Tensor, token_mask: Tensor | None) -> Selection:
        """Choose for (T, E) logits of which some are padding."""
        return choose(self.select, router_logits, token_mask)

    @torch.no_grad()
    def observe(self, record: RoutingRecord) -> None:
        """Take note of one training forward; one without samples is no evidence."""
        shape, logits = record.sequence_shape, record.routing.router_logits
        if shape is None:
            return
        loss = chunk_activation(logits.detach(), record.token_mask, shape, self.chunk_size)
        seen = torch.stack([loss, torch.ones_like(loss)]).float()
        self._seen = seen if self._seen is None else self._seen.to(seen.device) + seen

    @torch.no_grad()
    def post_step(self) -> None:
        """Count one step, and move along the line to the next coefficient."""
        seen = torch.zeros(2) if self._seen is None else self._seen
        total, number = sum_over_ranks(seen.to(self.current.device))
        self._seen = None
        some = (number > 0).to(torch.int64)
        self.steps += some
        self.position += some
        self.current += torch.stack([total / number.clamp(min=1.0), some.float()])
        now = self._value()
        growth = _mean(self.current) / _mean(self.previous)
        growth = torch.where(growth > 1.0, growth.clamp(min=self.least_growth), growth)
        due = (some > 0) & (self.steps % self.period == 0)
        moves = due & (self.steps >= self.hold) & (self.previous[1] > 0)
        target = (now * growth).clamp(max=self.max_coefficient)
        self.start.copy_(torch.where(moves, now, self.start))
        self.end.copy_(torch.where(moves, target, self.end))
        self.position.copy_(torch.where(moves, 0, self.position))
        self.previous.copy_(torch.where(due, self.current, self.previous))
        self.current.copy_(torch.where(due, 0.0, self.current))
        self.chunk_coefficient.copy_(self._value())

    def _value(self) -> Tensor:
        share = (self.position / self.period).clamp(max=1.0)
        return self.start + (self.end - self.start) * share

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:  # noqa: FBT001
        kept = {name: getattr(self, name) for name in BUFFERS}
        super()._apply(fn, recurse)
        for name, value in kept.items():
            setattr(self, name, uncast(value, getattr(self, name)))
        return self

    def extra_repr(self) -> str:
        """Settings, for `print(model)`."""
        return f"chunk_size={self.chunk_size}, hold={self.hold}, period={self.period}"


def _mean(window: Tensor) -> Tensor:
    """Of (2,) sum and number, never 0."""
    return (window[0] / window[1].clamp(min=1.0)).clamp(min=torch.finfo(window.dtype).tiny)
