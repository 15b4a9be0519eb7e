"""How far one model's logits are from another's on given text."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Batch = Mapping[str, Any]
Text = Tensor | Batch | Sequence[Tensor | Batch]
"""(B, S) token ids, or what a model's forward takes by name (input_ids, attention_mask, task_ids),
or several of these."""


@dataclass(frozen=True, kw_only=True, slots=True)
class LogitError:
    """The difference of two models' logits, padding left out.

    Attributes:
        tokens: Tokens compared.
        max_abs: Largest absolute difference of a logit.
        mean_abs: Mean absolute difference over tokens and vocabulary.
        kl: Mean over tokens of KL(first || second) of the next token, in nats.
        same_top: Share of tokens for which both models prefer the same next token.
    """

    tokens: int
    max_abs: float
    mean_abs: float
    kl: float
    same_top: float

    def __str__(self) -> str:
        """One line."""
        return (
            f"over {self.tokens} tokens: logits differ by {self.mean_abs:.3g} in the mean, "
            f"{self.max_abs:.3g} at most; KL {self.kl:.3g} nats; same first choice for "
            f"{self.same_top:.1%}"
        )


def as_batches(text: Text) -> list[Batch]:
    """The text as keyword arguments of one forward each.

    Raises:
        ValueError: It holds no token that is not padding, or ids that are not (B, S).
    """
    batches = []
    for part in [text] if isinstance(text, Tensor | Mapping) else text:
        batch = dict(part) if isinstance(part, Mapping) else {"input_ids": part}
        ids = batch.get("input_ids")
        if not isinstance(ids, Tensor) or ids.ndim != 2:
            raise ValueError(
                "text must be (B, S) token ids, or mappings with such input_ids, not "
                f"{type(ids).__name__} {tuple(ids.shape) if isinstance(ids, Tensor) else ''}"
            )
        batches.append(batch)
    if not any(bool(token_mask(batch).any()) for batch in batches):
        raise ValueError("text holds no tokens; give some that look like what the model is for")
    return batches


def token_mask(batch: Batch) -> Tensor:
    """(B, S) bool, False for padding."""
    mask = batch.get("attention_mask")
    return torch.ones_like(batch["input_ids"], dtype=torch.bool) if mask is None else mask.bool()


def run(model: nn.Module, batch: Batch) -> Tensor:
    """The logits of one batch, on the model's own device, without a gradient."""
    device = next(model.parameters()).device
    moved = {
        name: value.to(device) if isinstance(value, Tensor) else value
        for name, value in batch.items()
    }
    with torch.no_grad():
        return model(**moved).logits


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in eval mode inside the block, each in its own mode again after it."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def logit_error(
    model: nn.Module,
    batches: Sequence[Batch],
    changed: Callable[[], AbstractContextManager[object]],
) -> LogitError:
    """Compare a model with itself changed.

    Args:
        model: Called in eval mode, its `logits` are compared in float32.
        batches: What to call it with.
        changed: Makes a context in which the model is the other one.
    """
    tokens, largest, absolute, divergence, same = 0, 0.0, 0.0, 0.0, 0
    with evaluating(model):
        for batch in batches:
            first = run(model, batch).float()
            with changed():
                second = run(model, batch).float()
            mask = token_mask(batch).to(first.device)
            first, second = first[mask], second[mask]  # (T, V)
            if not first.shape[0]:
                continue
            difference = (first - second).abs()
            one, other = first.log_softmax(-1), second.log_softmax(-1)
            tokens += first.shape[0]
            largest = max(largest, float(difference.max()))
            absolute += float(difference.mean(-1).sum())
            divergence += float((one.exp() * (one - other)).sum())
            same += int((first.argmax(-1) == second.argmax(-1)).sum())
    return LogitError(
        tokens=tokens,
        max_abs=largest,
        mean_abs=absolute / tokens,
        kl=max(divergence / tokens, 0.0),
        same_top=same / tokens,
    )
