"""State that must not be rounded when a model is cast."""

from __future__ import annotations

from torch import Tensor


def uncast(kept: Tensor, moved: Tensor) -> Tensor:
    """A buffer after `module.to(...)`: moved as asked, in the dtype that it had.

    Args:
        kept: The buffer before.
        moved: The buffer after.
    """
    return moved if moved.dtype == kept.dtype else kept.to(moved.device)
