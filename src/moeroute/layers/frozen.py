"""Parts that do not train: their parameters become buffers.

A buffer is saved and moved like a parameter, but nothing that switches gradients on, such as PEFT
when an adapter is activated or loaded, can make it learn.
"""

from __future__ import annotations

from torch import nn

from moeroute.routers.fixed import fixed


def freeze_parameters(module: nn.Module) -> None:
    """Turn every parameter of a module, and of what it holds, into a buffer of its name."""
    fixed(module)
