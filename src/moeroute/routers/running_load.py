"""A selection that remembers whom it chose since the last optimizer step.

Axes: T tokens, E experts.
"""

from __future__ import annotations

from torch import Tensor, nn

from moeroute.ops.load import tokens_per_expert
from moeroute.routers.select import Select, Selection, choose
from moeroute.types import RoutingRecord


class RunningLoad(nn.Module):
    """Another selection, with the counts of all micro-batches of the step, for losses over them.

    `moeroute.losses.GlobalBalanceLoss` reads them. `moeroute.post_step(model)`, called once after
    every optimizer step, forgets them; a step that is cut short by saving begins anew.

    Source: Demons in the Detail: On Implementing Load Balancing Loss for Training Specialized
    Mixture-of-Expert Models, Qiu et al., 2025, arXiv 2501.11873.

    Args:
        select: Who chooses.

    Shapes:
        counts_of_step: (E,) int64 of this rank, or None before the first forward of a step.
    """

    select: Select

    def __init__(self, select: Select) -> None:
        super().__init__()
        self.select = select
        self.counts_of_step: Tensor | None = None

    def check(self, num_experts: int) -> None:
        """Raise ValueError if the selection does not fit the number of experts."""
        self.select.check(num_experts)

    def forward(self, router_logits: Tensor) -> Selection:
        """Choose for each row of (T, E) logits."""
        return self.select(router_logits)

    def among(self, router_logits: Tensor, token_mask: Tensor | None) -> Selection:
        """Choose for (T, E) logits of which some are padding."""
        return choose(self.select, router_logits, token_mask)

    def observe(self, record: RoutingRecord) -> None:
        """Count the real tokens of one training forward by expert."""
        routing = record.routing
        counts = tokens_per_expert(routing.selected_experts, routing.num_experts, record.token_mask)
        self.counts_of_step = (
            counts
            if self.counts_of_step is None
            else self.counts_of_step.to(counts.device) + counts
        )

    def post_step(self) -> None:
        """Forget the counts."""
        self.counts_of_step = None
