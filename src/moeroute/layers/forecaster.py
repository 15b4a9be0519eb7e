"""A small network that foretells what a unit of a decoder layer would answer.

Axes: H hidden.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn.functional import silu

INIT_STD = 1e-3


class FeatureForecaster(nn.Module):
    """LFF(u) = A2 silu(A1 u + a1) + a2, nearly 0 at first.

    Weights are normal with a standard deviation of 1e-3 at first, biases zero.

    Args:
        in_features: H.
        width: Between the two linears.

    Shapes:
        tokens: (..., H), any floating dtype; the output has its shape, in the dtype of the weights.

    Raises:
        ValueError: A size is below 1.
    """

    def __init__(self, in_features: int, *, width: int = 100) -> None:
        super().__init__()
        if in_features < 1 or width < 1:
            raise ValueError(f"in_features={in_features} and width={width} must be at least 1")
        self.down = nn.Linear(in_features, width)
        self.up = nn.Linear(width, in_features)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weights normal, biases zero."""
        for linear in (self.down, self.up):
            nn.init.normal_(linear.weight, std=INIT_STD)
            nn.init.zeros_(linear.bias)

    def forward(self, tokens: Tensor) -> Tensor:
        """Foretell the unit's output."""
        return self.up(silu(self.down(tokens.to(self.down.weight.dtype))))
