"""Numbers that must not be rounded: state of a model that is cast, products under autocast."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor


def uncast(kept: Tensor, moved: Tensor) -> Tensor:
    """A buffer after `module.to(...)`: moved as asked, in the dtype that it had.

    Args:
        kept: The buffer before.
        moved: The buffer after.
    """
    return moved if moved.dtype == kept.dtype else kept.to(moved.device)


def without_autocast(device_type: str) -> AbstractContextManager[object]:
    """Switch autocast off where it is on (the meta device has none)."""
    if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()
