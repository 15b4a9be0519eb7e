"""A router of depth that executes one unit of a layer for some tokens and not for others.

Axes: B batch, S sequence, T tokens = B * S, H hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moeroute.depth_types import DepthOutput
from moeroute.ops.gumbel import hard_gumbel_softmax
from moeroute.routers.learns import learns
from moeroute.routers.scores import linear_logits
from moeroute.routers.step_schedule import StepSchedule
from moeroute.types import RouterInput

EXECUTE = 1


class UnitGateRouter(nn.Module):
    """Two logits a token by a small MLP: leave the unit out, or execute it.

        z = W2 relu(W1 u + b1) + b2
        training: g = hard Gumbel-softmax of z at the schedule's temperature
        evaluation, and while it is frozen: the larger of the two; a tie executes

    Weights are Kaiming-uniform at first, biases zero.

    Args:
        in_features: H.
        width: Between the two linears.
        schedule: The temperature of training.
        owns_schedule: Whether the schedule is part of this router; of the routers that share one,
            one should own it, so that a state dict holds it once.

    Shapes:
        hidden_states: (T, H), any floating dtype; computed in float32.
        router_logits: (B, S, 2), by the number of executions: 0, 1.
        num_executions: (B, S) in {0, 1}.
        routing_weights: (B, S) float32 g while it learns, exactly 0 or 1, with a gradient; None
            else.

    Raises:
        ValueError: A size is below 1.
    """

    num_actions = 2

    def __init__(
        self,
        in_features: int,
        *,
        width: int,
        schedule: StepSchedule,
        owns_schedule: bool = True,
    ) -> None:
        super().__init__()
        if in_features < 1 or width < 1:
            raise ValueError(f"in_features={in_features} and width={width} must be at least 1")
        self.in_features = in_features
        self.down = nn.Linear(in_features, width)
        self.up = nn.Linear(width, self.num_actions)
        self._schedule = (schedule,)  # a tuple keeps it from being a submodule
        if owns_schedule:
            self.schedule = schedule
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights Kaiming-uniform, biases zero."""
        for linear in (self.down, self.up):
            nn.init.kaiming_uniform_(linear.weight, nonlinearity="relu")
            nn.init.zeros_(linear.bias)

    def forward(self, router_input: RouterInput) -> DepthOutput:
        """Decide for each token."""
        hidden = linear_logits(
            router_input.hidden_states, self.down.weight, self.down.bias, None
        ).relu()
        logits = linear_logits(hidden, self.up.weight, self.up.bias, None)
        logits = logits.unflatten(0, router_input.sequence_shape)
        if not (self.training and learns(self)):
            executes = logits[..., EXECUTE] >= logits[..., 1 - EXECUTE]
            return DepthOutput(router_logits=logits, num_executions=executes.long())
        temperature: Tensor = self._schedule[0]()
        drawn = hard_gumbel_softmax(logits, temperature.to(logits.device))[..., EXECUTE]
        return DepthOutput(
            router_logits=logits,
            num_executions=drawn.detach().to(torch.int64),
            routing_weights=drawn,
        )

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        return f"in_features={self.in_features}, owns_schedule={'schedule' in self._modules}"
