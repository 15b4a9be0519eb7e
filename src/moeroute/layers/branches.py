"""Several layers side by side, each giving some of the features."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Branches(nn.Module):
    """y = concat(branch_1(x), ..., branch_n(x)): every branch sees all features and gives some.

    Args:
        branches: Modules, (..., H) to (..., O_i).

    Shapes:
        hidden_states: (..., H); the output is (..., O_1 + ... + O_n).

    Raises:
        ValueError: There are none.
    """

    def __init__(self, branches: Sequence[nn.Module]) -> None:
        super().__init__()
        if not branches:
            raise ValueError("branches is empty; pass at least one module")
        self.branches = nn.ModuleList(branches)

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Apply all branches."""
        return torch.cat([branch(hidden_states) for branch in self.branches], dim=-1)
