"""Means over windows of the real tokens of each sequence.

Axes: B batch, S sequence, H hidden, W windows.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def window_means(values: Tensor, real: Tensor, windows: int) -> tuple[Tensor, Tensor]:
    """Cut the real tokens of each sequence into windows of one length and take their means.

    A sequence of n real tokens has W' = min(W, n) windows of n // W' tokens; the tokens behind the
    last window are left out. Padding, wherever it stands, changes nothing.

    Args:
        values: (B, S, H) floating; summed in float32 or wider.
        real: (B, S) bool, False leaves a token out.
        windows: W, at least 1.

    Returns:
        (B, W, H) means, zero where there is no window, and the (B, W) bool mask of those there are.
    """
    dtype = torch.promote_types(values.dtype, torch.float32)
    count = real.sum(1, keepdim=True)  # (B, 1)
    used = count.clamp(max=windows)
    length = (count // used.clamp(min=1)).clamp(min=1)
    window = (real.cumsum(1) - 1) // length
    inside = real & (window < used)
    member = functional.one_hot(torch.where(inside, window, windows), windows + 1)[..., :windows]
    known = values.to(dtype).masked_fill(~inside[..., None], 0.0)
    means = member.to(dtype).transpose(1, 2) @ known / length[..., None]
    return means, torch.arange(windows, device=real.device) < used
