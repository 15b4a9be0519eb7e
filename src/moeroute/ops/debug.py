"""Checks that cost a device synchronisation, made only where MOEROUTE_DEBUG=1 is set."""

from __future__ import annotations

import os

import torch
from torch import Tensor


def debugging() -> bool:
    """True if the environment asks for checked routing; it is read at every call."""
    return os.environ.get("MOEROUTE_DEBUG", "0") not in ("", "0")


def check_finite(router_logits: Tensor) -> None:
    """Raise if a router's logits are not numbers.

    Args:
        router_logits: (T, E).

    Raises:
        ValueError: MOEROUTE_DEBUG=1 is set and a logit is NaN. Without it, NaN sorts above all
            numbers: such a token keeps ids inside [0, E) and its output is NaN.
    """
    if torch.compiler.is_compiling() or not debugging():
        return
    bad = torch.isnan(router_logits).any(dim=-1)
    if bool(bad.any()):
        first = int(bad.nonzero()[0, 0])
        raise ValueError(
            f"{int(bad.sum())} of {bad.numel()} tokens have NaN router logits, first token "
            f"{first}; look for "
            "NaN or overflow in the layers before this router"
        )
