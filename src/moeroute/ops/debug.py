"""Checks that wait for the device, made only where the environment sets MOEROUTE_DEBUG=1."""

from __future__ import annotations

import os

import torch
from torch import Tensor


def debugging() -> bool:
    """True if the environment asks for checks; read at every call, so that it can be switched."""
    return os.environ.get("MOEROUTE_DEBUG", "0") not in ("", "0")


def check_router_logits(router_logits: Tensor) -> None:
    """Raise if a router's logits are not numbers; does nothing unless MOEROUTE_DEBUG=1.

    Without the switch, and inside `torch.compile`, NaN is no error: it sorts above all numbers, so
    such a token keeps ids inside [0, E), its weights and its output are NaN, and no other token
    notices.

    Args:
        router_logits: (T, E).

    Raises:
        ValueError: A logit is NaN; names the first such token.
    """
    if torch.compiler.is_compiling() or not debugging():
        return
    bad = torch.isnan(router_logits).any(dim=-1)
    if bool(bad.any()):
        raise ValueError(
            f"{int(bad.sum())} of {bad.numel()} tokens have NaN router logits, the first is token "
            f"{int(bad.nonzero()[0, 0])}; look for NaN or overflow in the layers before this "
            "router and in the router's weights"
        )
