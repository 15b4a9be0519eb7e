"""Scores that nobody trains."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

ScoreModule = TypeVar("ScoreModule", bound=nn.Module)


def fixed(score: ScoreModule) -> ScoreModule:
    """Make every parameter of a score a buffer: saved and moved with the model, never trained.

    A random router that stays as it was drawn is the baseline that a trained one must beat
    (Equifinality in Mixture of Experts, arXiv 2604.14419). The gradient still passes to the tokens.

    Args:
        score: Changed in place, such as `LinearScore` or `CosineScore`.

    Returns:
        The score.

    Example:
        >>> router = ComposedRouter(fixed(LinearScore(64, 8)), TopK(2))
    """
    for module in score.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            delattr(module, name)
            module.register_buffer(name, parameter.detach())
    return score
