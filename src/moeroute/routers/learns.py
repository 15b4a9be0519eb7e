"""What learns is what has `requires_grad`: stages of training are told by it."""

from __future__ import annotations

from torch import nn


def learns(module: nn.Module) -> bool:
    """True if any parameter of a module is to be trained."""
    return any(parameter.requires_grad for parameter in module.parameters())
