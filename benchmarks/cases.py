"""What one benchmark is: cases, inputs, providers and the right answer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import product

import torch
from torch import Tensor

from benchmarks.forms import SWIGLU, Form

__all__ = [
    "AGAIN",
    "OURS",
    "Benchmark",
    "Bound",
    "Case",
    "Inputs",
    "Pass",
    "Provider",
    "leaf",
    "plainly",
    "select_cases",
]

OURS = "moeroute"
AGAIN = "moeroute (again)"
"""Ours, timed a second time in the same rounds: what differs is noise."""

Tensors = Mapping[str, Tensor]


@dataclass(frozen=True, slots=True)
class Case:
    """One row of the table, before a provider is chosen.

    Attributes:
        op: Name of the benchmark.
        mode: "fwd" (no gradient), "fwd_bwd" (gradients of all leaves), "mem", or one that only a
            CUDA device knows: "launches", "compiles", "graph".
        shape_name: A name of `benchmarks.shapes`.
        tokens: T.
        dtype: Key of `benchmarks.shapes.DTYPES`.
        routing: How tokens choose their experts.
        device: A torch device.
    """

    op: str
    mode: str
    shape_name: str
    tokens: int
    dtype: str
    routing: str
    device: str


@dataclass(frozen=True, slots=True)
class Inputs:
    """The tensors of a case; floating ones are leaves that require a gradient.

    Attributes:
        weights: What stays the same between calls.
        batches: What changes: the sets take turns.
        gradients: One gradient of the output per batch.
        form: How the weights of a routed MLP lie, and its activation.
    """

    weights: Tensors
    batches: tuple[Tensors, ...]
    gradients: tuple[Tensor, ...]
    form: Form = SWIGLU

    def leaves(self, index: int) -> dict[str, Tensor]:
        """Everything that takes a gradient in batch `index`, by name."""
        together = {**self.weights, **self.batches[index]}
        return {name: tensor for name, tensor in together.items() if tensor.requires_grad}


@dataclass(frozen=True, slots=True)
class Bound:
    """A provider with its inputs in place.

    Attributes:
        run: Index of a batch to the output.
        leaves: Index of a batch to the tensors whose gradients are asked for, by name.
        gradient: Of the output, where it has another shape than the op's; None takes the inputs'.
    """

    run: Callable[[int], Tensor]
    leaves: Callable[[int], dict[str, Tensor]]
    gradient: Tensor | None = None


def plainly(compute: Callable[[Tensors, Tensors], Tensor]) -> Callable[[Inputs], Bound]:
    """Bind a function of weights and batch that needs no preparation."""

    def bind(inputs: Inputs) -> Bound:
        return Bound(lambda i: compute(inputs.weights, inputs.batches[i]), inputs.leaves)

    return bind


@dataclass(frozen=True, slots=True)
class Provider:
    """One way to compute the op.

    Attributes:
        name: Stands in the tables and in results.csv.
        bind: Puts the inputs in place; what it prepares is not timed.
        peer: Whether the best of the peers may be this one.
        checked: Whether its answer must be the reference's; a line of equal FLOPs has another.
        skip: A reason not to run a case, or "".
        only_on: Kind of device that it is for; "" for any. Elsewhere it has no row.
    """

    name: str
    bind: Callable[[Inputs], Bound]
    peer: bool = True
    checked: bool = True
    skip: Callable[[Case], str] = lambda _: ""
    only_on: str = ""

    def runs_on(self, device: str) -> bool:
        """Tell whether it stands in the rows of a device."""
        return self.only_on in ("", torch.device(device).type)


@dataclass(frozen=True, slots=True)
class Pass:
    """What one pass over the data needs at the least.

    Attributes:
        operations: Of its products; a multiplication and an addition are two.
        elements: Read and written.
    """

    operations: float
    elements: float


@dataclass(frozen=True, slots=True)
class Benchmark:
    """One op or layer.

    Attributes:
        name: Of the op.
        cases: Those that `python -m benchmarks.run` runs without arguments.
        shape_names: Every shape that may be asked for.
        make_inputs: Random inputs of order one for a case; never zeros, which are too fast.
        reference: Binds the definition, differentiable, computed in float32.
        providers: Ours first, then the peers.
        work: Mode ("fwd" or "fwd_bwd"), name of a shape and T to the passes that cannot be saved.
        sized: Whether a name that is in no list tells the sizes of a shape of this op.
    """

    name: str
    cases: Callable[[str], list[Case]]
    shape_names: tuple[str, ...]
    make_inputs: Callable[[Case], Inputs]
    reference: Callable[[Inputs], Bound]
    providers: tuple[Provider, ...]
    work: Callable[[str, str, int], tuple[Pass, ...]]
    sized: Callable[[str], bool] = lambda _: False

    def knows(self, shape: str) -> bool:
        """Tell whether a shape is this op's."""
        return shape in self.shape_names or self.sized(shape)


def select_cases(
    cases: list[Case],
    *,
    modes: list[str] | None,
    shapes: list[str] | None,
    tokens: list[int] | None,
    dtypes: list[str] | None,
    routings: list[str] | None,
) -> list[Case]:
    """Narrow the default cases, or make those that are no default.

    A value outside the defaults (a model's shape, another T) takes every default case as its
    pattern; the order of the defaults is kept.

    Args:
        cases: The defaults of one benchmark.
        modes: Modes to keep, or None for the defaults; so are the following.
        shapes: Names of shapes.
        tokens: Values of T.
        dtypes: Names of dtypes.
        routings: Names of routings.

    Returns:
        The cases, each once.
    """
    found: dict[Case, None] = {}
    for case in cases:
        if modes is not None and case.mode not in modes:
            continue
        choices = product(
            shapes or [case.shape_name],
            tokens or [case.tokens],
            dtypes or [case.dtype],
            routings or [case.routing],
        )
        for shape, count, dtype, routing in choices:
            asked = replace(case, shape_name=shape, tokens=count, dtype=dtype, routing=routing)
            found.setdefault(asked)
    return list(found)


def leaf(tensor: Tensor, case: Case, dtype: torch.dtype | None = None) -> Tensor:
    """A leaf of its own on the device of the case that takes a gradient."""
    return tensor.to(case.device, dtype or tensor.dtype).detach().requires_grad_()
