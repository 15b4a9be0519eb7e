"""Sums and means over real tokens, shared by the losses."""

from __future__ import annotations

import torch
from torch import Tensor


def real_tokens_only(values: Tensor, token_mask: Tensor | None) -> Tensor:
    """Set the rows of padding to 0; neither their values (NaN included) nor a gradient pass.

    Args:
        values: (T, ...) one row a token.
        token_mask: (T,) bool, False marks padding; None means all real.

    Returns:
        (T, ...).
    """
    if token_mask is None:
        return values
    padding = ~token_mask.to(torch.bool)
    return values.masked_fill(padding.reshape(-1, *(1,) * (values.ndim - 1)), 0.0)


def masked_mean(values: Tensor, token_mask: Tensor | None) -> Tensor:
    """Mean over real tokens.

    Args:
        values: (T, ...) one row a token.
        token_mask: (T,) bool, False marks padding; None means all real.

    Returns:
        (...) the mean; 0 if there is no real token.
    """
    if token_mask is None:
        return values.sum(dim=0) / max(values.shape[0], 1)
    count = token_mask.to(torch.bool).sum().clamp(min=1)
    return real_tokens_only(values, token_mask).sum(dim=0) / count
