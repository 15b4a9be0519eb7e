"""One call of a decoder layer of transformers, offered to whatever decides how often it runs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moeroute.integration.depth.adopt import visit_slots
from moeroute.integration.depth.arguments import of_rows
from moeroute.integration.depth.attention_watch import watch_attention
from moeroute.integration.depth.token_run import run_tokens
from moeroute.integration.depth.visit_slots import VisitSlots

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager

    from moeroute.depth_types import AttentionSeen, KVPolicy
    from moeroute.integration.depth.decoder_layers import LayerFacts


class LayerCall:
    """A `moeroute.depth_types.DecoderCall` over the arguments that the model passed.

    Args:
        forward: The layer's own forward.
        facts: How the layer takes its cache.
        arguments: All arguments but the hidden states, by name.
        tokens: S.
        layer: Itself; needed to watch its attention.

    Attributes:
        answer: What the layer last answered, as it answered it.
    """

    def __init__(
        self,
        forward: Callable[..., Any],
        facts: LayerFacts,
        arguments: dict[str, Any],
        tokens: int,
        layer: nn.Module | None = None,
    ) -> None:
        self.forward = forward
        self.facts = facts
        self.arguments = arguments
        self.answer: Any = None
        self.tokens = tokens
        self.layer = layer
        cache = arguments.get(facts.cache_name)
        self.slots = None if cache is None else visit_slots(cache, facts.cache_index)

    @property
    def decided(self) -> tuple[int, ...] | None:
        """What the cache holds."""
        return None if self.slots is None else self.slots.actions

    def decide(self, actions: tuple[int, ...], *, from_tokens: bool) -> None:
        """Keep it with the cache.

        Raises:
            ValueError: The cache was filled under other actions.
        """
        if self.slots is not None:
            self.slots.decide(actions, tokens=self.tokens if from_tokens else None)

    def run_sequences(self, hidden_states: Tensor, rows: tuple[int, ...], visit: int) -> Tensor:
        """Gather the sequences, run the layer on them alone, put them back."""
        batch = hidden_states.shape[0]
        if len(rows) == batch:
            return self.run(hidden_states, self.arguments, self.slots, visit)
        index = torch.tensor(rows, device=hidden_states.device)
        part = hidden_states.index_select(0, index)
        ran = self.run(part, of_rows(self.arguments, index, batch), self.slots, visit)
        return hidden_states.index_copy(0, index, ran.to(hidden_states.dtype))

    def run_tokens(
        self, hidden_states: Tensor, kept: Tensor, visit: int, policy: KVPolicy
    ) -> Tensor:
        """Gather the tokens, run the layer on them alone, put them back.

        Raises:
            ValueError: The cache was filled under actions of whole sequences.
        """
        self._check_undecided()
        return run_tokens(self, hidden_states, kept, visit, policy)

    def run_units(self, hidden_states: Tensor) -> Tensor:
        """Run the layer; the forwards of its units ask who answers for them.

        Raises:
            ValueError: The cache was filled under actions of whole sequences.
        """
        self._check_undecided()
        return self.run(hidden_states, self.arguments, self.slots, 0)

    def skip(self, hidden_states: Tensor) -> None:
        """Count the tokens."""
        if self.slots is not None:
            self.slots.skip(hidden_states)

    def open_memory(self) -> dict[str, Tensor] | None:
        """What stays with the cache.

        Raises:
            ValueError: The cache was begun by calls that kept nothing.
        """
        return None if self.slots is None else self.slots.open_notes(self.tokens)

    def watching(self, watcher: Callable[[AttentionSeen], None]) -> AbstractContextManager[None]:
        """Show the watcher what the layer's attention works on.

        Raises:
            ValueError: The layer's attention cannot be watched.
        """
        if self.layer is None:
            raise ValueError(f"{self.facts.name} is called without its attention")
        return watch_attention(self.layer, self.facts.name, watcher)

    def run(
        self,
        hidden_states: Tensor,
        arguments: dict[str, Any],
        slots: VisitSlots | None,
        visit: int,
    ) -> Tensor:
        """The layer itself, writing to a visit's slot."""
        if slots is not None:
            slots.visit = visit
        self.answer = self.forward(hidden_states, **arguments)
        return self.answer[0] if isinstance(self.answer, tuple) else self.answer

    def _check_undecided(self) -> None:
        if self.decided is not None:
            raise ValueError(
                f"the cache was filled with executions {list(self.decided)} of this layer, which "
                "hold to its end; it cannot go on token by token. Begin with a fresh cache"
            )
