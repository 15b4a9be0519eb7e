"""A frozen linear with LoRA experts beside it that are averaged once a sample."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from moeroute.layers.routed import route
from moeroute.routers.task_skills import TaskSkills
from moeroute.routing_pass import RoutingPass

if TYPE_CHECKING:
    from moeroute.layers.averaged_bank import AveragedLoRABank
    from moeroute.types import AuxLoss


class AveragedLoRAMixture(nn.Module):
    """A mixture of LoRA by the average of the experts' matrices, one average a sample.

    Args:
        router: Weights by task; as many heads and experts as the bank has.
        bank: The experts.
        losses: What this layer asks to be charged in training.
        site: Full module name of the linear.
        layer_index: Its position in depth, -1 if it has none.

    Shapes:
        hidden_states: (B, S, in_features), any floating dtype.
        output: (B, S, out_features) in the dtype that base answers in.

    Raises:
        ValueError: In forward, if the samples cannot be told apart: an input of two axes.
    """

    router: nn.Module

    def __init__(
        self,
        *,
        router: TaskSkills,
        bank: AveragedLoRABank,
        losses: tuple[AuxLoss, ...] = (),
        site: str = "",
        layer_index: int = -1,
    ) -> None:
        super().__init__()
        self.router = router
        self.bank = bank
        self.losses = losses
        self.site = site
        self.layer_index = layer_index
        self.routing_pass = RoutingPass()

    def forward(self, hidden_states: Tensor, base: nn.Module) -> Tensor:
        """Answer in place of `base(hidden_states)`."""
        base_out = base(hidden_states)
        if hidden_states.ndim != 3:
            raise ValueError(
                f"{self.site}: the input has shape {tuple(hidden_states.shape)}, which does not "
                "tell samples apart; this mixture averages its experts once a sample and takes "
                "(B, S, features). Leave the linear out of target_modules"
            )
        routing = route(self, hidden_states, self.bank)
        if not hidden_states.shape[:2].numel():
            return base_out
        # every token of a sample has its sample's weights
        weights = routing.routing_weights.unflatten(0, hidden_states.shape[:2])[:, 0]
        weights = weights.unflatten(1, (self.bank.heads, self.bank.num_experts))
        return self.bank(base_out, hidden_states, weights)

    @torch.no_grad()
    def task_delta(self, task_id: int) -> Tensor:
        """What this layer adds to its linear's weight for one task: (out_features, in_features)."""
        assert isinstance(self.router, TaskSkills)
        mean_a, mean_b = self.bank.average(self.router.task_weights(task_id)[None])
        return self.bank.scaling * mean_b[0] @ mean_a[0]
