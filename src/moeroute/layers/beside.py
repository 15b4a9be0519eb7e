"""A mixture beside a frozen feed-forward block: what it gives is added to what the block gives."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moeroute.ops.gates import add_delta


class BesideFeedForward(nn.Module):
    """y = base(x) + gain * mixture(x): how new experts stand in a dense checkpoint.

    The block stays as it was trained and keeps running for every token: the mixture adds
    parameters and compute, and replaces nothing. Where the mixture starts at zero (see
    `start_at_zero`), or the gain, a fresh model equals the checkpoint bit for bit.

    Args:
        mixture: (..., H) to (..., H), such as a `MoELayer`.
        has_gain: Whether there is a gain to be trained; else it is 1.

    Shapes:
        gain: (1,), zero at first.
        hidden_states: (..., H), any floating dtype; the output has its shape, and the dtype of the
            block's.
    """

    def __init__(self, mixture: nn.Module, *, has_gain: bool = False) -> None:
        super().__init__()
        self.mixture = mixture
        self.gain = nn.Parameter(torch.zeros(1)) if has_gain else None

    def forward(self, hidden_states: Tensor, base: nn.Module) -> Tensor:
        """Answer in place of `base(hidden_states)`."""
        weight = next(self.mixture.parameters())
        added = self.mixture(hidden_states.to(weight.dtype))
        if self.gain is not None:
            added = self.gain.to(added.dtype) * added
        return add_delta(base(hidden_states), added)


def start_at_zero(experts: nn.Module) -> None:
    """Set the last matrices of experts, and their biases, to zero: they answer 0 at first."""
    for name, parameter in experts.named_parameters():
        if name.rpartition(".")[2] in ("down_proj", "down_proj_bias"):
            nn.init.zeros_(parameter)
