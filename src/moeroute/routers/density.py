"""A selection that watches how many experts are active, and steers by the weight of a loss.

Axes: T tokens, E experts.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from moeroute.ops.exact import uncast
from moeroute.ops.load import tokens_per_expert
from moeroute.ops.ranks import sum_over_ranks
from moeroute.routers.select import Select, Selection, choose
from moeroute.types import RoutingRecord


class DensityControl(nn.Module):
    """Another selection, with the coefficient of a loss on its density.

        coefficient <- coefficient * step where the density is above the target, else / step

    The density is the share of token-expert pairs that are active, among real tokens.
    `moeroute.losses.ActiveWeightLoss` is charged with the coefficient; `moeroute.post_step(model)`
    moves it once an optimizer step, by all accumulated batches and ranks. It is a float32 buffer,
    saved with the model.

    Source: ReMoE: Fully Differentiable Mixture-of-Experts with ReLU Routing, Wang et al., 2024,
    arXiv 2412.14711, equation 8. Difference from the paper: each layer steers its own density,
    where the paper takes the mean over layers.

    Args:
        select: What is watched, such as `Positive()`.
        slots: The target is slots / E.
        coefficient: At first.
        step: Factor of one update, above 1.

    Shapes:
        coefficient: () float32.

    Raises:
        ValueError: A number is out of range, or (when a router is made) slots exceeds E.
    """

    select: Select
    coefficient: Tensor

    def __init__(
        self, select: Select, slots: float, *, coefficient: float = 1e-8, step: float = 1.2
    ) -> None:
        super().__init__()
        if slots <= 0 or coefficient <= 0 or step <= 1.0:
            raise ValueError(
                f"slots={slots}, coefficient={coefficient}, step={step}: slots and coefficient "
                "must be above 0, step above 1"
            )
        self.select = select
        self.slots = slots
        self.step = step
        self.register_buffer("coefficient", torch.tensor(coefficient, dtype=torch.float32))
        self._seen: Tensor | None = None

    def check(self, num_experts: int) -> None:
        """Raise ValueError if the target or the selection does not fit the number of experts."""
        self.select.check(num_experts)
        if self.slots > num_experts:
            raise ValueError(
                f"slots={self.slots:g} exceeds the {num_experts} experts; a token cannot have more"
            )

    def forward(self, router_logits: Tensor) -> Selection:
        """Choose for each row of (T, E) logits."""
        return self.select(router_logits)

    def among(self, router_logits: Tensor, token_mask: Tensor | None) -> Selection:
        """Choose for (T, E) logits of which some are padding."""
        return choose(self.select, router_logits, token_mask)

    def observe(self, record: RoutingRecord) -> None:
        """Count the active pairs of one training forward."""
        routing, mask = record.routing, record.token_mask
        active = tokens_per_expert(routing.selected_experts, routing.num_experts, mask).sum()
        tokens = routing.selected_experts.shape[0] if mask is None else mask.to(torch.bool).sum()
        seen = torch.stack([active, torch.zeros_like(active) + tokens])
        self._seen = seen if self._seen is None else self._seen.to(seen.device) + seen

    @torch.no_grad()
    def post_step(self) -> None:
        """Move the coefficient by what was counted since the last step, over all ranks."""
        seen = self._seen
        if seen is None:  # other ranks may have counted
            seen = torch.zeros(2, dtype=torch.int64)
        active, tokens = sum_over_ranks(seen.to(self.coefficient.device))
        dense = active > self.slots * tokens
        factor = torch.where(dense, self.step, 1.0 / self.step)
        self.coefficient.mul_(torch.where(tokens > 0, factor, 1.0).to(self.coefficient))
        self._seen = None

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:  # noqa: FBT001
        kept = self.coefficient
        super()._apply(fn, recurse)
        self.coefficient = uncast(kept, self.coefficient)
        return self

    def extra_repr(self) -> str:
        """Settings, for `print(model)`."""
        return f"slots={self.slots:g}, step={self.step:g}"
