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
from typing import TYPE_CHECKING, Any

import torch

from moeroute.types import RouterInput

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from torch import Tensor

    from moeroute.types import RoutingRecord

    Listener = Callable[[RoutingRecord], None]


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
        self.task_ids: Tensor | None = None
        self._unread_losses = False
        self._listeners: tuple[Listener, ...] = ()

    def begin(
        self,
        *,
        token_ids: Tensor | None = None,
        token_mask: Tensor | None = None,
        task_ids: Tensor | None = None,
    ) -> None:
        """Open the pass for one forward: token_ids and token_mask are (B, S), task_ids is (B,)."""
        if self._unread_losses:
            warnings.warn(
                f"The auxiliary losses of {len(self.records)} routed layers reached no loss: the "
                "last "
                "training forward returned no `loss` and nobody asked for them. Pass `labels` to "
                "the "
                "model, or add `moeroute.aux_losses(model).total` to your loss.",
                stacklevel=2,
            )
        self.records = {}
        self._unread_losses = False
        self.token_ids, self.token_mask, self.task_ids = token_ids, token_mask, task_ids
        self.is_open = True

    def end(self) -> None:
        """Close the pass; records stay readable until the next `begin`."""
        self.is_open = False
        self.token_ids = self.token_mask = self.task_ids = None

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

    def router_input(self, hidden_states: Tensor) -> RouterInput:
        """Pack a layer's (..., H) input with what the pass knows of its tokens."""
        width = hidden_states.shape[-1]
        batch = hidden_states.shape[0] if hidden_states.ndim == 3 else 1
        tokens = hidden_states.reshape(-1, width)
        count = tokens.shape[0]
        length = count // batch if batch else 0
        return RouterInput(
            hidden_states=tokens,
            sequence_shape=(batch, length),
            token_mask=_flat(self.token_mask, count),
            token_ids=_flat(self.token_ids, count),
            task_ids=self.task_ids,
        )


def _flat(side_input: Tensor | None, count: int) -> Tensor | None:
    """Flatten (B, S) to (T,) if it speaks of these T tokens, else None (a sub-batch)."""
    if side_input is None or side_input.numel() != count:
        return None
    return side_input.reshape(-1)
