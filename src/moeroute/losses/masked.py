"""Means over real tokens, shared by the losses."""

from __future__ import annotations

from torch import Tensor


def masked_mean(values: Tensor, token_mask: Tensor | None) -> Tensor:
    """Mean over tokens, padding left out.

    Args:
        values: (T, ...) one value a token.
        token_mask: (T,) bool, False marks padding; None means all real.

    Returns:
        (...) the mean; 0 if there is no real token.
    """
    if token_mask is None:
        return values.sum(dim=0) / max(values.shape[0], 1)
    mask = token_mask.reshape(-1, *(1,) * (values.ndim - 1))
    return values.masked_fill(~mask, 0.0).sum(dim=0) / mask.sum().clamp(min=1)
