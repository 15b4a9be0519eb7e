"""Which tokens of a prompt matter least, and how later tokens compare with them.

Axes: B batch, S tokens of the call, P tokens of the prompt's call.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

TINY = 1e-12
ENDS = 2


@dataclass(frozen=True, kw_only=True, slots=True)
class PromptScores:
    """The importance of a prompt's tokens, in order.

    Attributes:
        scores: (B, P) float32, rising; infinite behind the last token that may be left out.
        length: (B, 1) int64, the real tokens.
    """

    scores: Tensor
    length: Tensor


def ends_of(prompt: Tensor) -> Tensor:
    """(B, S) bool: the first and the last token of each sequence's (B, S) prompt."""
    forward, backward = prompt.cumsum(1), prompt.flip(1).cumsum(1).flip(1)
    return prompt & ((forward == 1) | (backward == 1))


def prompt_scores(importance: Tensor, prompt: Tensor) -> PromptScores:
    """Of (B, S) importance, that of the prompt's tokens but its ends."""
    free = prompt & ~ends_of(prompt)
    scores = importance.masked_fill(~free, torch.inf).sort(1).values
    return PromptScores(scores=scores, length=prompt.sum(1, keepdim=True))


def ranks(importance: Tensor, prompt: Tensor, known: PromptScores) -> Tensor:
    """How many of the prompt's tokens matter less than each token.

    The ends of the prompt are ahead of all. Of equal tokens of the prompt the earlier one is
    behind; a later token is behind those of the prompt that equal it.

    Args:
        importance: (B, S) float32.
        prompt: (B, S) bool.
        known: Of the prompt, of this call or an earlier one.

    Returns:
        (B, S) int64.
    """
    ends = ends_of(prompt)
    order = importance.masked_fill(~prompt | ends, torch.inf).argsort(dim=1, stable=True)
    place = torch.arange(importance.shape[1], device=importance.device).expand_as(order)
    among = torch.empty_like(order).scatter_(1, order, place)
    later = torch.searchsorted(known.scores, importance.contiguous())
    rank = torch.where(prompt, among, later)
    return torch.where(ends, (known.length - 1).clamp(min=0), rank)


def scaled(importance: Tensor, known: PromptScores) -> Tensor:
    """(B, S) importance between the least, 0, and the most, 1, of those that may be left out."""
    finite = known.scores.isfinite()
    low = known.scores[:, :1].masked_fill(~finite[:, :1], 0.0)
    high = known.scores.masked_fill(~finite, -torch.inf).amax(1, keepdim=True)
    return ((importance - low) / (high - low).clamp(min=TINY)).clamp(0.0, 1.0)


def num_kept(length: Tensor, sparsity: float) -> Tensor:
    """(B, 1) int64: round((1 - s) n), a half to the even number, but at least the ends."""
    kept = ((1.0 - sparsity) * length).round().to(torch.int64)
    return torch.maximum(kept, length.clamp(max=ENDS))
