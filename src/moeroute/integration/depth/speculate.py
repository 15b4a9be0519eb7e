"""Self-speculative decoding: the first layers of a model draft, its other layers verify.

A draft runs layers 0 to e - 1 and leaves through the output embedding. The verification takes the
states that the draft left with and runs layers e to L - 1 on all of them at once: no layer sees a
token twice, and there is one set of keys and values. What was not accepted is cut off the cache.

Source: LayerSkip: Enabling Early Exit Inference and Self-Speculative Decoding, Elhoushi et al.,
2024, arXiv 2404.16710, section 4.3. Our own reading: a verification gives no token beyond the
draft, for which the draft's first layers would have to run on its last token.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from moeroute.integration.depth.halves import Halves


@dataclass(frozen=True, kw_only=True, slots=True)
class Speculation:
    """What `speculate` wrote.

    Attributes:
        sequences: (1, S + N) int64, the prompt and N new tokens.
        drafted: Tokens that the first layers proposed.
        accepted: Those of them that the whole model would have written.
        verifications: Runs of the later layers, that on the prompt included.
    """

    sequences: Tensor
    drafted: int
    accepted: int
    verifications: int


@torch.no_grad()
def speculate(
    model: nn.Module,
    input_ids: Tensor,
    *,
    exit_layer: int,
    max_new_tokens: int,
    draft_length: int = 4,
    eos_token_id: int | None = None,
) -> Speculation:
    """Write greedily what the whole model would write, drafted by its first layers.

    A model that `EarlyExit` has wrapped drafts through the transform of the exit. How fast this is
    depends on how many tokens are accepted, and so on how the model was trained.

    Args:
        model: A causal decoder of transformers, or one wrapped with `EarlyExit`; in eval mode.
        input_ids: (1, S) int64, without padding.
        exit_layer: e, the layers that draft: 1 <= e < L.
        max_new_tokens: N at most, at least 1.
        draft_length: Tokens of a draft, at least 1.
        eos_token_id: Ends the text; None: nothing does.

    Raises:
        ValueError: A number is out of range, the model trains, is no decoder, keeps a state that
            cannot be cut off, or decides on its depth by itself.

    Example:
        >>> speculate(model, prompt, exit_layer=8, max_new_tokens=100).sequences
    """
    if input_ids.ndim != 2 or input_ids.shape[0] != 1 or not input_ids.shape[1]:
        raise ValueError(
            f"input_ids have shape {tuple(input_ids.shape)}; sequences accept different numbers of "
            "tokens, so give one at a time: (1, S)"
        )
    if max_new_tokens < 1 or draft_length < 1:
        raise ValueError(
            f"max_new_tokens={max_new_tokens} and draft_length={draft_length} must be at least 1"
        )
    halves = Halves(model, exit_layer)
    _, states = halves.draft(input_ids)
    tokens = [int(halves.verify(input_ids, states)[0, -1].argmax())]
    drafted = accepted = 0
    verifications = 1
    while len(tokens) < max_new_tokens and tokens[-1] != eos_token_id:
        length = min(draft_length, max_new_tokens - len(tokens))
        proposed, states = _propose(halves, input_ids.new_tensor([[tokens[-1]]]), length)
        read = input_ids.new_tensor([[tokens[-1], *proposed[:-1]]])
        verified = halves.verify(read, states)[0].argmax(-1).tolist()
        matches = _common(proposed, verified)
        new = verified[: matches + 1]
        halves.crop(length - len(new))
        if eos_token_id in new:
            new = new[: new.index(eos_token_id) + 1]
        tokens += new
        drafted, accepted, verifications = drafted + length, accepted + matches, verifications + 1
    return Speculation(
        sequences=torch.cat([input_ids, input_ids.new_tensor([tokens])], 1),
        drafted=drafted,
        accepted=accepted,
        verifications=verifications,
    )


def _propose(halves: Halves, token: Tensor, length: int) -> tuple[list[int], Tensor]:
    """Drafted tokens after a (1, 1) token, and the (1, length, H) states they were read off."""
    found, states = [], []
    for _ in range(length):
        logits, state = halves.draft(token)
        token = logits.argmax(-1, keepdim=True)
        found.append(token)
        states.append(state)
    return torch.cat(found, 1)[0].tolist(), torch.cat(states, 1)


def _common(proposed: list[int], verified: list[int]) -> int:
    """How many tokens two texts begin with alike."""
    pairs = enumerate(zip(proposed, verified, strict=True))
    return next((place for place, (one, other) in pairs if one != other), len(proposed))
