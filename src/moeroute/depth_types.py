"""The words of depth routing: what routers of depth say, and what a decoder layer offers them.

Axes: B batch, S sequence, H hidden, A actions. An action is the number of times that a layer is
applied: 0 skips it, 1 runs it, 2 runs it twice.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from moeroute.types import RoutingRecord

if TYPE_CHECKING:
    from moeroute.types import RouterInput

KVPolicy = Literal["all", "kept"]
"""What a token leaves in the cache of a layer that it skips.

"all": the keys and values of its input there; later tokens attend to it as if it had run.
"kept": nothing; later tokens do not see it in this layer.
"""

UnitName = Literal["attention", "feed_forward"]
"""The two units of a decoder layer, each with a norm before it and a residual around it."""

RunUnit = Callable[[Tensor | None], Tensor]
"""Computes a unit for the tokens of a (B, S) bool mask, or for all of them if it is None.

Answers (B, S, H), what the unit adds; what stands there for other tokens means nothing.
"""


@dataclass(frozen=True, kw_only=True, slots=True)
class DepthOutput:
    """What a router says about one layer.

    Attributes:
        router_logits: (B, A) float32 for a decision a sequence, (B, S, A) for one a token.
        num_executions: (B,) or (B, S) int64 in [0, A).
        routing_weights: (B, S) floating, multiplies a token's update by the layer; None leaves it.
        state: (T, S_r) handed to the next routed layer, or None.
    """

    router_logits: Tensor
    num_executions: Tensor
    routing_weights: Tensor | None = None
    state: Tensor | None = None

    def __post_init__(self) -> None:
        """Check ranks and dtypes; nothing here reads device memory."""
        if self.num_executions.dtype != torch.int64:
            raise ValueError(f"num_executions is {self.num_executions.dtype}; use int64")
        if self.router_logits.shape[:-1] != self.num_executions.shape:
            raise ValueError(
                f"router_logits {tuple(self.router_logits.shape)} and num_executions "
                f"{tuple(self.num_executions.shape)} differ; logits have one axis more"
            )


class DepthRouter(Protocol):
    """Anything that turns the input of a layer into a `DepthOutput`."""

    num_actions: int

    def __call__(self, router_input: RouterInput, /) -> DepthOutput:
        """Decide on (T, H) tokens."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class PrunedTokens(DepthOutput):
    """What a router says that leaves out the tokens of least importance.

    Attributes:
        prompt: (B, S) bool, the real tokens that were compared with each other.
        guide: (B, S) int64, what a rule without parameters would do.
        guide_share: () float32, how much of the guide is to be followed still.
        sparsity: The share of tokens that is to skip the layer.
    """

    prompt: Tensor
    guide: Tensor
    guide_share: Tensor
    sparsity: float


@dataclass(frozen=True, kw_only=True, slots=True)
class DepthRecord(RoutingRecord):
    """What one decoder layer did; its routing has one slot a token and actions for experts.

    A decision that was taken before, or forced, has logits of 0 for its action and -inf elsewhere.

    Attributes:
        depth: What the router said in this very call; None if it was not asked.
        labels: (B,) int64 actions that were given for training, or None.
        layer_share: The part of a decoder layer that this speaks of: 0.5 for one of its two units.
        unit: What a unit was given and gave, for the losses of training; None where none asks.
    """

    depth: DepthOutput | None = None
    labels: Tensor | None = None
    layer_share: float = 1.0
    unit: UnitTrace | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class UnitTrace:
    """One unit of a decoder layer in one training forward that computed it for every token.

    Attributes:
        tokens: (B, S, H) its input, without a gradient.
        executed: (B, S, H) its output, without a gradient.
        forecast: (B, S, H) what a forecaster said of the output; None where no forecaster learns.
    """

    tokens: Tensor
    executed: Tensor
    forecast: Tensor | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class AttentionSeen:
    """What the attention of a decoder layer works on, after rotary embeddings and norms of keys.

    Attributes:
        query: (B, heads, Q, D) of the tokens that run the layer, without a gradient.
        key: (B, key heads, C, D) of all tokens that can be seen, without a gradient.
        mask: (B or 1, heads or 1, Q, C), bool (True attends) or added to the scores; None where
            each query sees all keys up to its own, the last query's being the last.
        scaling: What scores are multiplied by.
        softcap: c of c tanh(score / c), or None.
    """

    query: Tensor
    key: Tensor
    mask: Tensor | None
    scaling: float
    softcap: float | None = None


class DecoderCall(Protocol):
    """One call of a decoder layer: its host knows the mask, the positions and the cache."""

    @property
    def decided(self) -> tuple[int, ...] | None:
        """(B,) actions that the cache of this call holds for the layer; None on the first call."""
        ...

    def decide(self, actions: tuple[int, ...], *, from_tokens: bool) -> None:
        """Keep (B,) actions with the cache, if there is one.

        Args:
            actions: One number of executions a sequence.
            from_tokens: Whether they follow from the tokens of this call.

        Raises:
            ValueError: The cache was filled under other actions.
        """
        ...

    def run_sequences(self, hidden_states: Tensor, rows: tuple[int, ...], visit: int) -> Tensor:
        """The (B, S, H) hidden states with the layer applied to some of the sequences."""
        ...

    def run_tokens(
        self, hidden_states: Tensor, kept: Tensor, visit: int, policy: KVPolicy
    ) -> Tensor:
        """The (B, S, H) hidden states with the layer applied where the (B, S) mask `kept` is."""
        ...

    def skip(self, hidden_states: Tensor) -> None:
        """Let the cache know that (B, S, H) tokens passed a layer that none of them ran."""
        ...

    def open_memory(self) -> MutableMapping[str, Tensor] | None:
        """What stays with the cache for the layer, a row a sequence; None where there is no cache.

        Empty on the first call of a generation, whose tokens are the prompt; that call must write
        something. It follows the cache: beams, resets, copies.

        Raises:
            ValueError: The cache was begun by calls that kept nothing.
        """
        ...

    def watching(self, watcher: Callable[[AttentionSeen], None]) -> AbstractContextManager[None]:
        """Inside the block, show `watcher` what the layer's attention works on, where it runs.

        Raises:
            ValueError: The layer's attention cannot be watched.
        """
        ...

    def run_units(self, hidden_states: Tensor) -> Tensor:
        """The (B, S, H) hidden states with the layer run once, its units answered for.

        The layer keeps its own norms and residuals; the `AnswersUnits` that stands beside it is
        asked in the place of its two units.

        Raises:
            ValueError: The cache was filled under actions of whole sequences.
        """
        ...


@runtime_checkable
class WatchesAttention(Protocol):
    """A module beside a decoder layer that watches the layer's attention."""

    @property
    def watches_attention(self) -> bool:
        """Whether it does; a layer whose attention cannot be watched is refused then."""
        ...


@runtime_checkable
class AnswersUnits(Protocol):
    """A module beside a decoder layer that answers for its units one by one."""

    def answer_unit(self, unit: UnitName, tokens: Tensor, run: RunUnit, /) -> Tensor:
        """What a unit adds to the residual stream, or something in its place.

        Args:
            unit: Which.
            tokens: (B, S, H) the unit's input.
            run: Computes the unit itself.

        Returns:
            (B, S, H).
        """
        ...
