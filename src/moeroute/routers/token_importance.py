"""What routers of depth know of a token's importance: four numbers, and a rule on one of them.

Axes: B batch, S sequence.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moeroute.ops.token_ranks import PromptScores, ends_of, num_kept, prompt_scores, ranks, scaled
from moeroute.routers.prompt_windows import prompt_tokens
from moeroute.types import RouterInput

SCORES, LENGTH = "prompt_scores", "prompt_length"


@dataclass(frozen=True, kw_only=True, slots=True)
class Importance:
    """Where each token stands among those of its prompt.

    Attributes:
        factors: (B, S, 4) float32: place in the prompt; importance, scaled; rank, as a share of the
            prompt; sparsity. All in [0, 1].
        least: (B, S) bool, the tokens that a rule leaves out: those of least rank.
        real: (B, S) bool, False marks padding.
        prompt: (B, S) bool.
        ends: (B, S) bool, the first and the last token of the prompt.
    """

    factors: Tensor
    least: Tensor
    real: Tensor
    prompt: Tensor
    ends: Tensor


def importance_of(router_input: RouterInput, sparsity: float) -> Importance:
    """Compare the tokens of a call with their prompt.

    The tokens of a generation's first call are the prompt, or the first `prompt_lengths` of them;
    what is known of it stays in `memory` for later calls. Tokens behind the prompt each look at
    themselves and at the prompt, never at each other. Where no attention was seen yet (`state` is
    None), all are equal.

    Args:
        router_input: `state` is (T, 1), the importance of each token.
        sparsity: The share of the prompt that is to be left out.
    """
    shape = router_input.sequence_shape
    state, memory = router_input.state, router_input.memory
    hidden = router_input.hidden_states
    importance = torch.zeros(shape, device=hidden.device) if state is None else state.reshape(shape)
    mask = router_input.token_mask
    real = torch.ones(shape, dtype=torch.bool, device=hidden.device)
    real = real if mask is None else mask.reshape(shape)
    if memory:
        prompt = torch.zeros_like(real)
        known = PromptScores(scores=memory[SCORES], length=memory[LENGTH])
    else:
        prompt = prompt_tokens(router_input)
        known = prompt_scores(importance, prompt)
        if memory is not None:
            memory[SCORES], memory[LENGTH] = known.scores, known.length
    rank = ranks(importance, prompt, known)
    length = known.length.clamp(min=1)
    place = (prompt.cumsum(1) - 1) / (length - 1).clamp(min=1)
    factors = [
        torch.where(prompt & (length > 1), place, 1.0),
        scaled(importance, known),
        rank / length,
        torch.full(shape, sparsity, device=hidden.device),
    ]
    ends = ends_of(prompt)
    return Importance(
        factors=torch.stack([factor.float() for factor in factors], -1),
        least=(rank < known.length - num_kept(known.length, sparsity)) & real & ~ends,
        real=real,
        prompt=prompt,
        ends=ends,
    )
