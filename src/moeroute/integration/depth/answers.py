"""Questions, and how right a model's answers to them are.

Axes: O answers, S tokens of prompt and answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True, slots=True)
class Question:
    """A prompt and its right answer, as token ids.

    Args:
        prompt: At least one token.
        answer: At least one token.
        options: For multiple choice: all answers, the right one among them.

    Raises:
        ValueError: Something is empty, or the answer is no option.
    """

    prompt: tuple[int, ...]
    answer: tuple[int, ...]
    options: tuple[tuple[int, ...], ...] = ()

    def __post_init__(self) -> None:
        """Check the parts."""
        if not self.prompt or not self.answer or not all(self.options):
            raise ValueError(f"a question needs a prompt and answers of at least a token: {self}")
        if self.options and self.answer not in self.options:
            raise ValueError(f"the answer {self.answer} is none of the options {self.options}")


class Judged(NamedTuple):
    """What a model says of answers.

    Attributes:
        log_likelihoods: (O,) float32, the sum over each answer's tokens.
        is_greedy: (O,) bool, whether greedy decoding would give exactly this answer.
    """

    log_likelihoods: Tensor
    is_greedy: Tensor


def exact_match(model: nn.Module, question: Question) -> float:
    """1 if greedy decoding gives the answer, token by token, else 0; one forward, no generation."""
    return float(judge(model, question.prompt, [question.answer]).is_greedy[0])


def log_likelihood(model: nn.Module, question: Question) -> float:
    """The mean log-probability of the answer's tokens, in nats: at most 0."""
    total = judge(model, question.prompt, [question.answer]).log_likelihoods[0]
    return total.item() / len(question.answer)


def multiple_choice(model: nn.Module, question: Question) -> float:
    """1 if the answer is the likeliest of the options, else 0.

    Raises:
        ValueError: The question has no options.
    """
    if not question.options:
        raise ValueError("multiple_choice needs questions with options; use exact_match")
    found = judge(model, question.prompt, question.options).log_likelihoods
    return float(question.options[int(found.argmax())] == question.answer)


@torch.no_grad()
def judge(model: nn.Module, prompt: Sequence[int], answers: Sequence[Sequence[int]]) -> Judged:
    """Judge several answers to one prompt in one forward.

    Args:
        model: A transformers language model, in the mode and depth that it is to be judged in.
        prompt: Token ids.
        answers: Token ids of each.
    """
    device = next(model.parameters()).device
    rows = [torch.tensor([*prompt, *answer], device=device) for answer in answers]
    ids = nn.utils.rnn.pad_sequence(rows, batch_first=True)  # (O, S)
    lengths = torch.tensor([len(row) for row in rows], device=device)[:, None]
    place = torch.arange(ids.shape[1], device=device)
    logits = model(input_ids=ids, attention_mask=(place < lengths).long(), use_cache=False).logits[
        :, :-1
    ]
    log_probs = logits.float().log_softmax(-1)
    wanted = ids[:, 1:, None]
    inside = (place[1:] >= len(prompt)) & (place[1:] < lengths)  # answer tokens, as targets
    said = log_probs.gather(-1, wanted)[..., 0].masked_fill(~inside, 0.0).sum(1)
    right = (logits.argmax(-1) == wanted[..., 0]) | ~inside
    return Judged(log_likelihoods=said, is_greedy=right.all(1))
