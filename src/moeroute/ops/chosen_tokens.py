"""Some tokens of every sequence, gathered to the front.

Axes: B batch, S sequence, K chosen tokens a sequence.
"""

from __future__ import annotations

import torch
from torch import Tensor


def chosen_tokens(kept: Tensor) -> tuple[Tensor, Tensor]:
    """(B, K) positions of the tokens of a (B, S) mask in order, and which of them are real.

    K is the largest number in a row; other rows fill up with tokens that are not in the mask.
    """
    count = int(kept.sum(1).max())
    index = (~kept).to(torch.int8).argsort(dim=1, stable=True)[:, :count]
    return index, kept.gather(1, index)
