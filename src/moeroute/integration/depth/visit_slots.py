"""A layer's place in a key-value cache, with a slot of its own for every visit of the layer.

transformers keeps one slot a layer. A layer that runs twice has two different sets of keys, and one
that is skipped has none, so `VisitSlots` stands in the slot's place in `cache.layers` and holds one
slot a visit. It answers for lengths and masks as the plain slot would, whatever was skipped, so the
model's own loop, masks and positions stay right. Everything that a cache does to its layers
(reordering beams, cropping, resetting, copying) reaches all visits and the decisions alike.
"""

from __future__ import annotations

import copy
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin, DynamicSlidingWindowLayer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    Writer = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]


class VisitSlots(CacheLayerMixin):
    """The slots of one layer, by visit, and the decision that they were filled under.

    A slot holds the rows of those sequences alone that made the visit, so that no memory is spent
    on the others. Where no sequence runs the layer, the first slot holds one zero a token: its
    length is what the model builds masks and positions from.

    Args:
        slot: The layer's plain slot, empty.

    Attributes:
        actions: (B,) executions of each sequence; None before the first call, and where tokens
            decide one by one.
        visit: Which visit writes next.
        flags: By visit, a slot that holds 1 for every token that the visit keeps.
        hiding: The visits that do not keep all.
        notes: What a router keeps of the prompt by name, a row a sequence.
        writer: Turns the keys and values of some tokens into those of all; None leaves them.
    """

    def __init__(self, slot: Any) -> None:
        self._begin(slot)
        self._blank = _emptied(slot)

    def _begin(self, slot: Any) -> None:
        self.visits: list[Any] = [slot]
        self.flags: dict[int, Any] = {}
        self.hiding: set[int] = set()
        self.actions: tuple[int, ...] | None = None
        self.visit = 0
        self.notes: dict[str, Tensor] = {}
        self.writer: Writer | None = None
        self._tokens_decided_from: int | None = None

    def decide(self, actions: tuple[int, ...], *, tokens: int | None) -> None:
        """Keep the decision for the whole generation.

        Args:
            actions: (B,) executions.
            tokens: How many tokens it was taken from; None if it does not depend on them.

        Raises:
            ValueError: The slots were filled under other actions.
        """
        if self.actions is None:
            if self.length():
                raise ValueError(
                    f"the cache holds {self.length()} tokens whose layers were chosen token by "
                    "token; depth by sequence cannot continue it. Begin with a fresh cache"
                )
            self.actions, self._tokens_decided_from = actions, tokens
        elif self.actions != actions:
            raise ValueError(
                f"the cache was filled with executions {list(self.actions)} of this layer and "
                f"cannot go on with {list(actions)}: keys would be missing. Begin with a fresh "
                "cache"
            )

    def open_notes(self, tokens: int) -> dict[str, Tensor]:
        """The notes; they are empty on the first call, which is to write them.

        Args:
            tokens: Of this call.

        Raises:
            ValueError: There are tokens, but no notes of them.
        """
        if not self.notes:
            if self.length():
                raise ValueError(
                    f"the cache holds {self.length()} tokens that no prompt was noted of; a router "
                    "that compares new tokens with the prompt cannot join in. Begin with a fresh "
                    "cache"
                )
            self._tokens_decided_from = tokens
        return self.notes

    def length(self) -> int:
        """Tokens seen, run or skipped."""
        return int(self.visits[0].get_seq_length())

    def skip(self, tokens: Tensor) -> None:
        """Count (B, S, H) tokens that no sequence ran."""
        placeholder = tokens.new_zeros(1, 1, tokens.shape[1], 1)
        self.visits[0].update(placeholder, placeholder)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write to the slot of the current visit, and give what that visit may attend to."""
        if self.writer is not None:
            key_states, value_states = self.writer(key_states, value_states)
        while len(self.visits) <= self.visit:
            self.visits.append(copy.deepcopy(self._blank))
        return self.visits[self.visit].update(key_states, value_states, *args, **kwargs)

    @contextmanager
    def writing(self, writer: Writer) -> Iterator[None]:
        """Pass what is written inside the block through `writer`."""
        self.writer = writer
        try:
            yield
        finally:
            self.writer = None

    def flag(self, kept: Tensor, *, hides: bool) -> Tensor:
        """Note which of (B, S) tokens the current visit keeps.

        Args:
            kept: The mask.
            hides: Whether it leaves any out; the visit then counts as `hiding`.

        Returns:
            (B, 1, K) bool over the keys that `update` gives, in their order.
        """
        if hides:
            self.hiding.add(self.visit)
        slot = self.flags.setdefault(self.visit, copy.deepcopy(self._blank))
        column = kept[:, None, :, None].to(torch.float32)
        return slot.update(column, column)[0][..., 0] > 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """As the plain slot does."""
        self.visits[0].lazy_initialization(key_states, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """As the plain slot of a layer that ran."""
        return self.visits[0].get_mask_sizes(query_length)

    def get_seq_length(self) -> int:
        """As the plain slot of a layer that ran."""
        return self.visits[0].get_seq_length()

    def get_max_length(self) -> int:
        """As the plain slot."""
        return self.visits[0].get_max_length()

    def reset(self) -> None:
        """Forget the tokens and the decision."""
        self._begin(copy.deepcopy(self._blank))

    def crop(self, tokens_to_remove: int) -> None:
        """Remove the last tokens (a number below 0).

        Raises:
            ValueError: The decision was taken from tokens that go now, or that a draft model
                proposed: it would not be what the prompt alone decides.
        """
        decided_from = self._tokens_decided_from
        if decided_from is not None and self.length() - abs(tokens_to_remove) < decided_from:
            raise ValueError(_CROPPED)
        if decided_from is not None and self.length() == decided_from:
            raise ValueError(_CROPPED)
        for slot in (*self.visits, *self.flags.values()):
            slot.crop(tokens_to_remove)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Take rows, and their decisions, in another order."""
        self._select(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        rows = self._rows()
        self._select(torch.arange(rows).repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep some rows."""
        if indices.dtype == torch.bool:
            indices = indices.nonzero().flatten()
        self._select(indices)

    def offload(self) -> None:
        """Move every visit to the CPU."""
        for slot in self.visits:
            slot.offload()

    def prefetch(self) -> None:
        """Move every visit back."""
        for slot in self.visits:
            slot.prefetch()

    def activate_past_recording(self) -> None:
        """As a sliding slot does; the others have nothing to record."""
        for slot in (*self.visits, *self.flags.values(), self._blank):
            if isinstance(slot, DynamicSlidingWindowLayer):
                slot.activate_past_recording()

    def __getattr__(self, name: str) -> Any:
        """What kind of slot this is: the plain one's attributes."""
        if name.startswith("__") or "visits" not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.visits[0], name)

    @property
    def keys(self) -> Tensor | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Of the first visit."""
        return self.visits[0].keys

    @property
    def values(self) -> Tensor | None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Of the first visit."""
        return self.visits[0].values

    @property
    def is_initialized(self) -> bool:
        """Of the first visit."""
        return self.visits[0].is_initialized

    @property
    def is_compileable(self) -> bool:
        """As the plain slot."""
        return self.visits[0].is_compileable

    @property
    def is_croppable(self) -> bool:
        """As the plain slot."""
        return self.visits[0].is_croppable

    @property
    def batch_size(self) -> int:
        """Sequences, whether they ran the layer or not."""
        if self.actions is not None:
            return len(self.actions)
        return self.visits[0].batch_size

    def _rows(self) -> int:
        if self.actions is not None:
            return len(self.actions)
        keys = self.visits[0].keys
        return 0 if keys is None else keys.shape[0]

    def _select(self, index: Tensor) -> None:
        if self.actions is None or len(set(self.actions)) == 1:
            self._select_alike(index)
            return
        old, chosen = self.actions, index.tolist()
        for visit, slot in enumerate(self.visits):
            places = {row: place for place, row in enumerate(rows_of(old, visit))}
            stored = [places[row] for row in chosen if row in places]
            if places:
                slot.reorder_cache(torch.tensor(stored, dtype=torch.int64))
        self.actions = tuple(old[row] for row in chosen)

    def _select_alike(self, index: Tensor) -> None:
        """The same where all sequences do the same: nothing waits for the device."""
        if self.actions is None or self.actions[0]:
            for slot in (*self.visits, *self.flags.values()):
                slot.reorder_cache(index)
        if self.actions is not None:
            self.actions = (self.actions[0],) * index.shape[0]
        for name, rows in self.notes.items():
            self.notes[name] = rows.index_select(0, index.to(rows.device))


def rows_of(actions: tuple[int, ...], visit: int) -> tuple[int, ...]:
    """The sequences that make a visit, counted from 0."""
    return tuple(row for row, times in enumerate(actions) if times > visit)


def _emptied(slot: Any) -> Any:
    """A slot of the same kind and size that holds nothing, not even its tensors."""
    blank = copy.deepcopy(slot)
    blank.reset()
    blank.keys = blank.values = None
    blank.is_initialized = False
    return blank


_CROPPED = (
    "tokens are being removed from a cache right after the call that decided the depth from them. "
    "Assisted generation does so: the first call of the model holds the prompt and the draft, so "
    "the decision would depend on the draft. Generate without assistant_model and "
    "prompt_lookup_num_tokens, or fix the actions with moeroute.force_depth"
)
