"""A decoder layer on some tokens of every sequence: gather, run, scatter.

Keys and values of every token keep their place in the cache, so that the model's own mask and
positions hold. What stands there for a token that skips the layer is the `KVPolicy`: with "all" the
keys of its input, for which the layer is run on it as far as the cache and no further; with "kept"
zeros, and a mask that hides them.

Axes: B batch, S tokens of the call, K chosen tokens a sequence, C keys.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from moeroute.integration.depth.arguments import MASK, full_mask, mask_of_tokens, of_tokens
from moeroute.integration.depth.arguments import take_tokens as take
from moeroute.integration.depth.visit_slots import VisitSlots
from moeroute.ops.chosen_tokens import chosen_tokens

if TYPE_CHECKING:
    from moeroute.depth_types import KVPolicy
    from moeroute.integration.depth.layer_call import LayerCall


class KeysTakenError(Exception):
    """Ends a layer's forward once it has handed its keys and values to the cache."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        super().__init__("keys and values were taken")
        self.keys, self.values = keys, values


def run_tokens(
    call: LayerCall, hidden_states: Tensor, kept: Tensor, visit: int, policy: KVPolicy
) -> Tensor:
    """The (B, S, H) hidden states with the layer applied where the (B, S) mask `kept` is True.

    Raises:
        ValueError: The attention's mask cannot be cut to tokens, or the layer writes no keys.
    """
    arguments, slots = _with_slots(call)
    slots.visit = visit
    everything = bool(kept.all())
    seen = slots.flag(kept, hides=not everything) if policy == "kept" else None
    if everything and (seen is None or visit not in slots.hiding):
        return call.run(hidden_states, call.arguments, call.slots, visit)
    spread = _Spread(hidden_states.shape[1])
    index, real = chosen_tokens(kept)
    if not index.shape[1] and call.slots is None:
        return hidden_states  # nobody will read the keys
    if policy == "all" and not everything:
        others, theirs = chosen_tokens(~kept)
        spread.add(*_keys_of(call, hidden_states, arguments, slots, others), others, theirs)
    if not index.shape[1]:
        if policy == "kept":  # one token tells how wide the zeros are
            first, nobody = torch.zeros_like(kept[:, :1], dtype=torch.int64), kept[:, :1]
            spread.add(*_keys_of(call, hidden_states, arguments, slots, first), first, nobody)
        slots.update(*spread.both())
        return hidden_states
    cut = of_tokens(arguments, index, hidden_states.shape[1])
    mask = full_mask(arguments.get(MASK), hidden_states)
    cut[MASK] = mask_of_tokens(mask, index, real, seen)
    with slots.writing(lambda keys, values: spread.add(keys, values, index, real).both()):
        ran = call.run(take(hidden_states, index), cut, slots, visit)
    return put_tokens(hidden_states, ran, index, real)


def put_tokens(hidden_states: Tensor, ran: Tensor, index: Tensor, real: Tensor) -> Tensor:
    """(B, S, H) with (B, K, H) at the real ones of (B, K) positions."""
    ran = torch.where(real[..., None], ran.to(hidden_states.dtype), take(hidden_states, index))
    return hidden_states.scatter(1, index[..., None].expand_as(ran), ran)


class _Spread:
    """Keys and values of some tokens in the places of all."""

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def add(self, keys: Tensor, values: Tensor, index: Tensor, real: Tensor) -> _Spread:
        """Put (B, heads, K, D) keys and values at (B, K) positions, those that are real."""
        self.keys = self._put(self.keys, keys, index, real)
        self.values = self._put(self.values, values, index, real)
        return self

    def both(self) -> tuple[Tensor, Tensor]:
        """(B, heads, S, D) keys and values."""
        if self.keys is None or self.values is None:
            raise RuntimeError("no token has handed in its keys")
        return self.keys, self.values

    def _put(self, whole: Tensor | None, part: Tensor, index: Tensor, real: Tensor) -> Tensor:
        if whole is None:
            whole = part.new_zeros(*part.shape[:2], self.tokens, part.shape[3])
        places = index[:, None, :, None].expand_as(part)
        return whole.scatter(
            2, places, torch.where(real[:, None, :, None], part, whole.gather(2, places))
        )


def _keys_of(
    call: LayerCall,
    hidden_states: Tensor,
    arguments: dict[str, Any],
    slots: VisitSlots,
    index: Tensor,
) -> tuple[Tensor, Tensor]:
    """Keys and values of (B, K) tokens: the layer is run on them up to its cache."""

    def hand_over(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        raise KeysTakenError(keys, values)

    cut = of_tokens(arguments, index, hidden_states.shape[1])
    cut[MASK] = None
    with slots.writing(hand_over):
        try:
            call.run(take(hidden_states, index), cut, slots, slots.visit)
        except KeysTakenError as taken:
            return taken.keys, taken.values
    raise ValueError(
        f"{call.facts.class_name} writes no keys to its cache (activation checkpointing takes the "
        "cache away), so that tokens cannot skip it one by one; turn checkpointing off, or decide "
        "by sequence"
    )


def _with_slots(call: LayerCall) -> tuple[dict[str, Any], VisitSlots]:
    """The arguments with a cache: the call's own, or one that is gone after it."""
    if call.slots is not None:
        return call.arguments, call.slots
    slots = VisitSlots(DynamicLayer())
    before: list[Any] = [DynamicLayer() for _ in range(call.facts.cache_index)]
    return {**call.arguments, call.facts.cache_name: Cache(layers=[*before, slots])}, slots
