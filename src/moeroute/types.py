"""The words of the house: what routers say, what layers remember, what methods are given.

Axes: B batch, S sequence, T tokens = B * S, H hidden, E experts, K slots per token, N = T * K rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

SiteKind = Literal["gate", "mlp", "linear", "decoder_layer"]


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterInput:
    """What a router may look at.

    Attributes:
        hidden_states: (T, H) flattened tokens, any floating dtype.
        sequence_shape: (B, S) with B * S = T; sequence-level routers unflatten with it.
        token_mask: (T,) bool, False marks padding; None means that every token is real.
        token_ids: (T,) int64 vocabulary ids, for hash routing.
        task_ids: (B,) int64, for task-level routing.
        sample_embeddings: (B, D) what the caller knows of each sample, such as the embedding of its
            instruction.
        prompt_lengths: (B,) int64, the real tokens of each sequence that a decision about the
            whole sequence may look at; None means all of them.
        memory: What this site keeps from the first call of a generation to the last; None where no
            cache is in use and in training.
        first_pass: (T, P) what a head read off a first pass of the whole model; P = 0 during that
            pass, None where there is none.
        state: (T, S_r) what the previous routed layer handed on.
        read_out: (..., H) to (..., V), the model's final norm and output embedding; None where the
            method at work has no use for them.
    """

    hidden_states: Tensor
    sequence_shape: tuple[int, int]
    token_mask: Tensor | None = None
    token_ids: Tensor | None = None
    task_ids: Tensor | None = None
    sample_embeddings: Tensor | None = None
    prompt_lengths: Tensor | None = None
    memory: MutableMapping[str, Tensor] | None = None
    first_pass: Tensor | None = None
    state: Tensor | None = None
    read_out: Callable[[Tensor], Tensor] | None = None

    def __post_init__(self) -> None:
        """Check ranks and sizes; nothing here reads device memory."""
        if self.hidden_states.ndim != 2:
            raise ValueError(
                f"hidden_states has shape {tuple(self.hidden_states.shape)}; a router takes "
                "(T, H), so flatten the batch and sequence axes first"
            )
        batch, length = self.sequence_shape
        if batch * length != self.hidden_states.shape[0]:
            raise ValueError(
                f"sequence_shape={self.sequence_shape} does not multiply to the "
                f"{self.hidden_states.shape[0]} tokens of hidden_states"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class RouterOutput:
    """Who was chosen and how much.

    Attributes:
        router_logits: (T, E) float32, raw, before any activation.
        routing_weights: (T, K) float32 (float64 for float64 tokens), 0 in an empty slot.
        selected_experts: (T, K) int64 in [0, E]; E marks an empty slot.
        max_assignments: Static bound on the number of filled slots; None means T * K.
        state: (T, S_r) handed to the next routed layer.
    """

    router_logits: Tensor
    routing_weights: Tensor
    selected_experts: Tensor
    max_assignments: int | None = None
    state: Tensor | None = None

    def __post_init__(self) -> None:
        """Check ranks, sizes and dtypes; nothing here reads device memory."""
        for name in ("router_logits", "routing_weights"):
            tensor = getattr(self, name)
            if tensor.dtype not in (torch.float32, torch.float64):
                raise ValueError(
                    f"{name} is {tensor.dtype}; routers answer in float32 (or float64)"
                )
        if self.selected_experts.dtype != torch.int64:
            raise ValueError(f"selected_experts is {self.selected_experts.dtype}; use int64")
        if self.routing_weights.shape != self.selected_experts.shape:
            raise ValueError(
                f"routing_weights {tuple(self.routing_weights.shape)} and selected_experts "
                f"{tuple(self.selected_experts.shape)} differ; both are (T, K)"
            )
        if self.router_logits.shape[0] != self.selected_experts.shape[0]:
            raise ValueError(
                f"router_logits has {self.router_logits.shape[0]} tokens but selected_experts has "
                f"{self.selected_experts.shape[0]}"
            )

    @property
    def num_experts(self) -> int:
        """E, read off the logits."""
        return self.router_logits.shape[-1]


@dataclass(frozen=True, kw_only=True, slots=True)
class DispatchPlan:
    """The rows of a routed layer in expert order; made by `ops.plan_dispatch`, then gone.

    Attributes:
        token_index: (N,) int64, which token each sorted row came from.
        slot_index: (N,) int64, which flat (t, k) slot each sorted row came from.
        row_index: (N,) int64, the inverse: which sorted row each flat slot went to.
        expert_offsets: (E,) int32 inclusive ends; rows from expert_offsets[-1] on are empty slots
            and must never be read.
    """

    token_index: Tensor
    slot_index: Tensor
    row_index: Tensor
    expert_offsets: Tensor


@runtime_checkable
class Router(Protocol):
    """Anything that turns tokens into a `RouterOutput`."""

    num_experts: int

    def __call__(self, router_input: RouterInput, /) -> RouterOutput:
        """Route (T, H) tokens."""
        ...


@runtime_checkable
class Experts(Protocol):
    """Anything that applies the chosen experts and sums them: (T, H) -> (T, H).

    The whole routing is handed over, not sorted rows, so that an implementation can gather tokens
    inside its first product and never materialise the gathered copy.
    """

    num_experts: int

    def __call__(self, tokens: Tensor, routing: RouterOutput, /) -> Tensor:
        """Weighted sum of the selected experts' outputs, one row a token."""
        ...


class AuxLoss(Protocol):
    """A pure function of what was routed."""

    @property
    def weight(self) -> float:
        """Coefficient of the loss in the total."""
        ...

    def __call__(self, record: RoutingRecord, /) -> Tensor:
        """Scalar, unweighted."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class RoutingRecord:
    """What one routed layer did in one forward pass.

    Attributes:
        site: Full module name of the layer, its class where it has none; the key of the record.
        layer_index: Position in depth; -1 where the host has none.
        routing: The router's answer.
        token_mask: (T,) bool, False marks padding; None means all real.
        sequence_shape: (B, S) with B * S = T, for losses over samples; None if unknown.
        task_ids: (B,) int64, for losses that know tasks; None if nobody gave them.
        router: The router, for losses that read its rows.
        experts: The experts, for losses that ask them for activations.
        losses: What this layer asks to be charged.
        expert_names: What its experts are called, by id; empty where they are but numbers.
    """

    site: str
    layer_index: int
    routing: RouterOutput
    token_mask: Tensor | None = None
    sequence_shape: tuple[int, int] | None = None
    task_ids: Tensor | None = None
    router: nn.Module | None = None
    experts: nn.Module | None = None
    losses: tuple[AuxLoss, ...] = ()
    expert_names: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Paper:
    """Where a method comes from."""

    title: str
    arxiv: str
    year: int


@dataclass(frozen=True, kw_only=True, slots=True)
class GateForm:
    """What a checkpoint's gate does, for methods that keep a part of it.

    Attributes:
        top_k: Slots a token.
        routed_scaling_factor: What it multiplies its weights by, 1 where it does not.
        make_router: Makes a router of our parts that equals the gate, its weights copied.
    """

    top_k: int
    routed_scaling_factor: float
    make_router: Callable[[], nn.Module] = field(repr=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class Site:
    """One place in the host model; all that a method sees of it.

    Attributes:
        name: Full module name, such as "model.layers.3.mlp".
        kind: What stands there.
        module: The module that stands there now.
        layer_index: Position in depth, -1 where the name holds none.
        num_layers: Decoder layers of the host, 0 if unknown.
        in_features: Width of the input (the hidden size for a gate, an MLP, a decoder layer).
        out_features: Width of the output; the number of experts for a gate.
        parts: Role -> attribute name of submodules, for an MLP: "gate", "up", "down", "act"; for a
            decoder layer: "attention", "feed_forward", empty where they cannot be told apart.
        widths: Role -> (in_features, out_features) of the linears in `parts`.
        gate: What the gate does; None for other kinds.
        hidden_size: Width of the states that the host ends in, 0 if unknown.
    """

    name: str
    kind: SiteKind
    module: nn.Module
    layer_index: int
    num_layers: int
    in_features: int
    out_features: int
    parts: Mapping[str, str] = field(default_factory=dict)
    widths: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    gate: GateForm | None = None
    hidden_size: int = 0


@runtime_checkable
class Method(Protocol):
    """A published method: a frozen dataclass whose fields are its hyperparameters."""

    paper: ClassVar[Paper]
    site_kind: ClassVar[SiteKind]

    def build_shared(self, sites: Sequence[Site], /) -> nn.Module | None:
        """Make what all sites share, once per wrap; usually None."""
        ...

    def build(self, site: Site, shared: nn.Module | None, /) -> nn.Module:
        """Make the module for one site: a `SiteModule`, or a `RoutedGate` for a gate."""
        ...


class SiteModule(Protocol):
    """What a method builds for a linear or MLP site.

    The frozen base comes as an argument, never as a submodule: several adapters share one base, and
    an adapter's state dict holds the adapter alone.
    """

    def __call__(self, hidden_states: Tensor, base: nn.Module, /) -> Tensor:
        """Answer in place of `base(hidden_states)`; hidden_states is (..., in_features)."""
        ...
