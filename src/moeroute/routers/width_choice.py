"""A selection among a small feed-forward block, a big one and none.

Axes: T tokens, X widths: small, big and, where there are three, bypass.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moeroute.ops.widths import Width
from moeroute.routers.select import Selection
from moeroute.routers.step_schedule import StepSchedule


class WidthChoice(nn.Module):
    """In training all widths, weighed; in evaluation the one of highest logit, at weight 1.

        training: w = softmax(sharpness * logits);  evaluation: argmax, big before small before
        bypass where logits are equal

    Nothing is drawn. The sharper, the nearer training is to evaluation.

    Source: Duo-LLM: A Framework for Studying Adaptive Computation in Large Language Models, 2024,
    arXiv 2410.10846. Our own reading: the paper divides by a temperature that it says grows to
    harden the choice; the logits are multiplied by it here. The rule for ties.

    Args:
        sharpness: Of the softmax, as it moves with the optimizer's steps.

    Shapes:
        router_logits: (T, X); routing_weights, selected_experts: (T, X) in training, else (T, 1).

    Raises:
        ValueError: When a router is made, X is neither 2 nor 3.
    """

    def __init__(self, sharpness: StepSchedule) -> None:
        super().__init__()
        self.sharpness = sharpness

    def check(self, num_experts: int) -> None:
        """Raise ValueError if there are not two or three widths."""
        if num_experts not in (2, len(Width)):
            raise ValueError(f"{num_experts} widths; there are small, big and at most bypass")

    def forward(self, router_logits: Tensor) -> Selection:
        """Weigh or choose for each row of (T, X) logits."""
        if self.training:
            weights = torch.softmax(self.sharpness() * router_logits, dim=-1)
            places = torch.arange(router_logits.shape[1], device=router_logits.device)
            return Selection(
                routing_weights=weights, selected_experts=places.expand(router_logits.shape)
            )
        chosen = hardest(router_logits)[:, None]
        weights = torch.ones_like(chosen, dtype=router_logits.dtype)
        return Selection(routing_weights=weights, selected_experts=chosen)


def hardest(router_logits: Tensor) -> Tensor:
    """(T,) int64, the width of highest logit; among equal ones big, then small, then bypass."""
    highest = router_logits.amax(-1)
    last = router_logits.shape[1] - 1
    chosen = torch.full(highest.shape, last, dtype=torch.int64, device=router_logits.device)
    for width in (Width.SMALL, Width.BIG):
        chosen = torch.where(router_logits[:, width] >= highest, int(width), chosen)
    return chosen
