"""When layers are dropped and exits are taught: what changes from one training step to the next.

Source: LayerSkip: Enabling Early Exit Inference and Self-Speculative Decoding, Elhoushi et al.,
2024, arXiv 2404.16710, section 4.1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from moeroute.losses.early_exit import exit_weights


@dataclass(frozen=True, kw_only=True, slots=True)
class ExitSchedule:
    """The rates and weights of a step.

    Exits are numbered by the layers that have run. That of the first layer has weight 0 in the
    paper's formula and is never taught.

    Args:
        num_layers: L.
        layer_dropout: p_max, the rate at which the last layer is dropped.
        dropout_steps: Steps over which the rates rise from 0; 0: they stand from the start.
        loss_scale: The weight of early exits against that of the whole model.
        every: R, an exit in so many is taught at a step, each in its turn.
        gradual_steps: T; of them every T / 2L steps one more exit joins, the last first; 0: all
            take part from the start.
    """

    num_layers: int
    layer_dropout: float = 0.0
    dropout_steps: int = 0
    loss_scale: float = 0.2
    every: int = 1
    gradual_steps: int = 0

    def dropout(self, layer_index: int, step: int) -> float:
        """The probability that a sequence skips a layer.

        p = p_max (2^{l / (L - 1)} - 1) (2^{t / (T - 1)} - 1), the last factor at most 1
        """
        depth = layer_index / max(self.num_layers - 1, 1)
        rise = min(step / max(self.dropout_steps - 1, 1), 1.0) if self.dropout_steps else 1.0
        return self.layer_dropout * _from_0_to_1(depth) * _from_0_to_1(rise)

    def taught(self) -> range:
        """All exits that have a weight."""
        return range(2, self.num_layers) if self.loss_scale else range(0)

    def exits(self, step: int) -> list[int]:
        """The exits that are taught at a step: at least one, if there is any."""
        known = self.taught()
        if self.gradual_steps:
            joined = 1 + step * 2 * self.num_layers // self.gradual_steps
            known = known[-joined:]
        turns = min(self.every, len(known))
        return [known[place] for place in range(len(known)) if (place - step) % turns == 0]

    def weight(self, exit_layer: int, step: int) -> float:
        """What an exit's loss weighs at a step; 0 where it is not taught."""
        exits = self.exits(step)
        return exit_weights(self.num_layers, self.loss_scale, exits).get(exit_layer, 0.0)


class ExitClock(nn.Module):
    """Counts the training forwards of a model; its first layer ticks, all others look.

    Args:
        owner: Name of the site that ticks.

    Attributes:
        steps: () int64 buffer, the forwards so far, saved with the adapter.
        now: The step that the current forward is.
    """

    steps: torch.Tensor

    def __init__(self, owner: str) -> None:
        super().__init__()
        self.owner = owner
        self.now = 0
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def tick(self) -> None:
        """Begin a forward."""
        self.now = int(self.steps)
        self.steps += 1

    def extra_repr(self) -> str:
        """Where it stands, for `print(model)`."""
        return f"now={self.now}"


def _from_0_to_1(place: float) -> float:
    """2^x - 1: 0 at 0, 1 at 1."""
    return math.expm1(place * math.log(2))
