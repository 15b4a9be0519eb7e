"""What both forms of `gated_lora` ask of the slots.

Axes: T tokens, K slots per token, E experts.
"""

from __future__ import annotations

from torch import Tensor

__all__ = ["all_filled"]


def all_filled(ids: Tensor, experts: int) -> bool:
    """Tell whether it is known that no slot is empty.

    Args:
        ids: (T, K).
        experts: E.

    Returns:
        False if there is an empty slot, and always on another device than a CPU, where the answer
        would have to be waited for.
    """
    if ids.numel() == 0:
        return True
    if ids.device.type != "cpu":
        return False
    low, high = ids.aminmax()
    return int(low) >= 0 and int(high) < experts
