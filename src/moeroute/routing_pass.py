"""What one forward pass remembers: one record a routed layer, with one owner.

A `RoutingPass` is shared by reference by the routed layers of a model. With hooks on the model's
root it is opened before each forward and closed after it, so a recomputation under activation
checkpointing (which happens in the backward pass, when the pass is closed) cannot count a layer
twice. A layer used on its own holds a pass of its own that is always open and that its next forward
overwrites.
"""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, overload
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from moeroute.state_chain import StateChain
from moeroute.types import RouterInput

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from moeroute.types import RoutingRecord

    Listener = Callable[[RoutingRecord], None]
    Memory = dict[str, dict[str, Tensor]]


@dataclass(frozen=True, kw_only=True, slots=True)
class SampleInputs:
    """What the caller says of each sample, beside its tokens.

    Attributes:
        task_ids: (B,) int64.
        embeddings: (B, D) floating.
        prompt_lengths: (B,) int64, the real tokens that decisions about a sequence may look at.
        depth_labels: (B, L) int64, how often each decoder layer is to run.
    """

    task_ids: Tensor | None = None
    embeddings: Tensor | None = None
    prompt_lengths: Tensor | None = None
    depth_labels: Tensor | None = None


class RoutingPass:
    """The records of the current forward pass and the side inputs that routers need.

    Args:
        rooted: True if hooks on a root module open and close the pass.
    """

    def __init__(self, *, rooted: bool = False) -> None:
        self.rooted = rooted
        self.is_open = not rooted
        self.records: dict[str, RoutingRecord] = {}
        self.token_ids: Tensor | None = None
        self.token_mask: Tensor | None = None
        self.samples = SampleInputs()
        self.unsupervised: Tensor | None = None
        self.memory: Memory | None = None
        self.first_pass: Tensor | None = None
        self.read_out: Callable[[Tensor], Tensor] | None = None
        self.targets: Tensor | None = None
        self.rehearsing = False
        self.resting = False
        self._announced: SampleInputs | None = None
        self._standing = SampleInputs()
        self._memories: WeakKeyDictionary[Any, Memory] | None = None
        self._states = StateChain()
        self._batch_shape: tuple[int, int] | None = None
        self._unread_losses = False
        self._listeners: tuple[Listener, ...] = ()

    def begin(
        self,
        *,
        token_ids: Tensor | None = None,
        token_mask: Tensor | None = None,
        batch_shape: tuple[int, int] | None = None,
        samples: SampleInputs | None = None,
        unsupervised: Tensor | None = None,
        cache: Any = None,
        remembers: bool = False,
    ) -> None:
        """Open the pass for one forward.

        Args:
            token_ids: (B, S).
            token_mask: (B, S) bool.
            batch_shape: (B, S), for calls that have embeddings instead of ids.
            samples: What this call says of its samples; None takes what was announced for it, or
                what stands for every call.
            unsupervised: (B,) int64, the real tokens before the first label of each sequence.
            cache: The key-value cache that this call continues, or None.
            remembers: Whether sites may keep decisions for later calls with the same cache.
        """
        if self._unread_losses:
            warnings.warn(
                f"The auxiliary losses of {len(self.records)} routed layers reached no loss: the "
                "last training forward returned no `loss` and nobody asked for them. Pass `labels` "
                "to the model, or add `moeroute.aux_losses(model).total` to your loss.",
                stacklevel=2,
            )
        self.records = {}
        self._unread_losses = False
        self._states = StateChain()
        self.token_ids, self.token_mask = token_ids, token_mask
        if batch_shape is None and token_ids is not None and token_ids.ndim == 2:
            batch_shape = (token_ids.shape[0], token_ids.shape[1])
        self._batch_shape = batch_shape
        self.samples = samples or self._announced or self._standing
        self._announced = None
        self.unsupervised = unsupervised
        self.memory = (self._remembered(cache) or {}) if remembers else None
        self.first_pass = self.read_out = self.targets = None
        self.is_open = True

    def end(self, *, cache: Any = None) -> None:
        """Close the pass; records stay readable until the next `begin`.

        What routers look at in a recomputation (the mask, the samples, what a first pass said)
        stays until then as well: with activation checkpointing, a forward with other samples must
        wait for this one's backward.

        Args:
            cache: The key-value cache that the call returned, which takes the sites' memory along.
        """
        self.is_open = False
        if self.memory is not None:
            self.first_pass = None  # not in training, so nothing will be recomputed
        if self.memory and cache is not None:
            if self._memories is None:  # made late: it cannot be pickled
                self._memories = WeakKeyDictionary()
            self._memories[cache] = self.memory

    def _remembered(self, cache: Any) -> Memory | None:
        if self._memories is None or cache is None:
            return None
        return self._memories.get(cache)

    def announce(self, samples: SampleInputs) -> None:
        """Give the next call's samples to a root that will not be handed them."""
        self._announced = samples

    @contextmanager
    def standing(self, samples: SampleInputs) -> Iterator[None]:
        """Let `samples` hold for every call inside the block that says nothing of its own."""
        before, self._standing = self._standing, samples
        try:
            yield
        finally:
            self._standing = before

    @contextmanager
    def rehearsal(self, *, resting: bool) -> Iterator[None]:
        """A first pass of the model inside its forward: no record of it is kept.

        Args:
            resting: Whether the base modules answer; else the sites do, and their routers are told
                by a `first_pass` of no columns.
        """
        self.rehearsing, self.resting, self.is_open = True, resting, False
        try:
            yield
        finally:
            self.rehearsing, self.resting, self.is_open = False, False, True

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles start with no records: those hold tensors of an autograd graph."""
        fresh = type(self)(rooted=self.rooted)
        return fresh.__dict__

    def wants(self, *, charged: bool) -> bool:
        """True if a layer should keep a record now: its losses are due, or somebody listens."""
        return self.is_open and (charged or bool(self._listeners))

    def keep(self, record: RoutingRecord, *, charged: bool) -> None:
        """Remember a layer's record; a layer run twice in one open pass keeps both.

        Args:
            record: What the layer did.
            charged: Whether its losses are to be paid: in training.
        """
        for listener in self._listeners:
            listener(record)
        key = record.site
        if self.rooted:
            while key in self.records:
                key += "+"
        self.records[key] = record
        if charged and torch.is_grad_enabled():
            self._unread_losses = self.rooted

    def read(self) -> tuple[RoutingRecord, ...]:
        """The records of the last pass; marks their losses as read."""
        self._unread_losses = False
        return tuple(self.records.values())

    @contextmanager
    def listening(self, listener: Listener) -> Iterator[None]:
        """Call `listener` with every record kept inside the block, in training and in eval."""
        self._listeners = (*self._listeners, listener)
        try:
            yield
        finally:
            self._listeners = tuple(kept for kept in self._listeners if kept is not listener)

    def router_input(self, hidden_states: Tensor, site: str = "") -> RouterInput:
        """Pack a layer's (..., H) input with what the pass knows of its tokens."""
        tokens = hidden_states.reshape(-1, hidden_states.shape[-1])
        count = tokens.shape[0]
        shape = self._sequence_shape(hidden_states, count)
        return RouterInput(
            hidden_states=tokens,
            sequence_shape=shape,
            token_mask=self.mask_of(count),
            token_ids=_flat(self.token_ids, count),
            task_ids=_for_batch(self.samples.task_ids, shape[0]),
            sample_embeddings=_for_batch(self.samples.embeddings, shape[0]),
            prompt_lengths=_for_batch(self._prompt_lengths(), shape[0]),
            memory=None if self.memory is None else self.memory.setdefault(site, {}),
            state=self._states.before(site, first_time=self.is_open) if self.rooted else None,
            first_pass=tokens.new_zeros(count, 0) if self.rehearsing else self.first_pass,
            read_out=self.read_out,
        )

    def mask_of(self, tokens: int) -> Tensor | None:
        """(T,) bool mask of this call's tokens; None if all are real, or if these are others."""
        return _flat(self.token_mask, tokens)

    def hand_on(self, site: str, state: Tensor) -> None:
        """Keep a layer's state for the next routed layer of this forward.

        A pass without a root has no next layer: there the state is dropped. A recomputation hands
        nothing on.

        Args:
            site: Name of the layer that says it.
            state: (T, S_r).
        """
        if self.rooted and self.is_open:
            self._states.latest = state

    def depth_labels(self, layer_index: int, batch: int) -> Tensor | None:
        """(B,) actions of one layer that were given for training, or None."""
        labels = self.samples.depth_labels
        return None if labels is None else _for_batch(labels, batch)[:, layer_index]

    def _prompt_lengths(self) -> Tensor | None:
        given = self.samples.prompt_lengths
        return self.unsupervised if given is None else given

    def _sequence_shape(self, hidden_states: Tensor, count: int) -> tuple[int, int]:
        """(B, S) of the tokens; a layer that was handed them flat is told by the root's ids."""
        if hidden_states.ndim == 3:
            return hidden_states.shape[0], hidden_states.shape[1]
        shape = self._batch_shape
        return shape if shape is not None and shape[0] * shape[1] == count else (1, count)


@overload
def _for_batch(values: None, batch: int) -> None: ...


@overload
def _for_batch(values: Tensor, batch: int) -> Tensor: ...


@overload
def _for_batch(values: Tensor | None, batch: int) -> Tensor | None: ...


def _for_batch(values: Tensor | None, batch: int) -> Tensor | None:
    """One row a sample: `generate` repeats each sample for its beams, in order."""
    if values is None or batch == values.shape[0]:
        return values
    if values.shape[0] == 0 or batch % values.shape[0]:
        raise ValueError(
            f"task_ids or other routing inputs speak of {values.shape[0]} samples but the batch "
            f"has {batch}; give one row a sample"
        )
    return values.repeat_interleave(batch // values.shape[0], dim=0)


def _flat(side_input: Tensor | None, count: int) -> Tensor | None:
    """Flatten (B, S) to (T,) if it speaks of these T tokens, else None (a sub-batch)."""
    if side_input is None or side_input.numel() != count:
        return None
    return side_input.reshape(-1)
