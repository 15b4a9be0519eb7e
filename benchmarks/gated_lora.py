"""The mixture of LoRA over one frozen linear beside its four usual forms in plain torch.

The product of the linear itself is part of what is timed, the same for all, as in a model.

Axes: T tokens, E experts, K slots per token, R rank of one expert, I in, O out.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

import moeroute_kernels
from benchmarks import lora_baselines
from benchmarks.cases import Benchmark, Case, Inputs, Pass, Provider, Tensors, leaf, plainly
from benchmarks.shapes import (
    DTYPES,
    INPUT_SETS,
    LORA_FLOOR_CASES,
    LORA_SHAPES,
    ROTATE_BELOW_TOKENS,
    ROUTINGS,
)

__all__ = ["BENCHMARK", "make_inputs"]

SCALING = 0.5


def default_cases(device: str) -> list[Case]:
    """Forward, forward + backward and memory at every listed shape and dtype."""
    modes = ("fwd", "fwd_bwd", "mem")
    return [
        Case("gated_lora", mode, shape, tokens, dtype, ROUTINGS[0], device)
        for mode, (shape, tokens), dtype in product(modes, LORA_FLOOR_CASES, DTYPES)
    ]


def make_inputs(case: Case) -> Inputs:
    """Inputs of `lora_baselines.make_inputs`, the adapters shared between the batches.

    Args:
        case: Sizes, dtype and device; the routing is that of a random router.

    Returns:
        weights lora_a (E, R, I), lora_b (O, E, R) and the frozen linear (O, I); batches of x (T,
        I), selected_experts (T, K), routing_weights (T, K) float32; gradients (T, O).
    """
    shape = replace(LORA_SHAPES[case.shape_name], tokens=case.tokens)
    generator = torch.Generator().manual_seed(0)
    batches, gradients, weights = [], [], {}
    for seed in range(INPUT_SETS if case.tokens < ROTATE_BELOW_TOKENS else 1):
        base, x, lora_a, lora_b, ids, routing_weights = lora_baselines.make_inputs(
            shape, DTYPES[case.dtype], seed
        )
        ranks = (shape.num_experts, shape.r)
        weights = weights or {
            "lora_a": leaf(lora_a.unflatten(0, ranks), case),
            "lora_b": leaf(lora_b.unflatten(1, ranks), case),
            "linear": frozen_linear(shape.width, case),
        }
        batches.append(
            {
                "x": leaf(x, case),
                "selected_experts": ids.to(case.device),
                "routing_weights": leaf(routing_weights, case),
            }
        )
        gradient = torch.randn(base.shape, generator=generator)
        gradients.append(gradient.to(case.device, base.dtype))
    return Inputs(weights, tuple(batches), tuple(gradients))


def frozen_linear(width: int, case: Case) -> Tensor:
    """A weight (width, width) without a gradient, in the case's dtype."""
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn((width, width), generator=generator) * width**-0.5
    return weight.to(case.device, DTYPES[case.dtype])


def reference(weights: Tensors, batch: Tensors) -> Tensor:
    """Compute the definition in float32.

    Args:
        weights: See `make_inputs`.
        batch: See `make_inputs`.

    Returns:
        (T, O) float32.
    """
    return moeroute_kernels.reference.gated_lora(
        F.linear(batch["x"].float(), weights["linear"].float()),
        batch["x"].float(),
        weights["lora_a"].float(),
        weights["lora_b"].float(),
        batch["selected_experts"],
        batch["routing_weights"],
        SCALING,
    )


def work(mode: str, shape_name: str, tokens: int) -> tuple[Pass, ...]:
    """The least that the frozen linear and its mixture do; see `Benchmark.work`.

    The adapters of every expert are read once where a token chose it, and their gradients written
    once; the low-rank rows stay on the chip.
    """
    shape = LORA_SHAPES[shape_name]
    rows, ends, matrix = tokens * shape.top_k, 2 * tokens * shape.width, shape.width**2
    hit = shape.num_experts * (1 - (1 - shape.top_k / shape.num_experts) ** tokens)
    pairs = 2 * shape.r * shape.width
    low, wide = 2 * rows * pairs, 2 * tokens * matrix
    forward = Pass(wide + low, ends + matrix + hit * pairs)
    if mode != "fwd_bwd":
        return (forward,)
    moved = 3 * tokens * shape.width + matrix + (hit + shape.num_experts) * pairs
    return forward, Pass(wide + 2 * low, moved)


def mixture_provider(name: str, mixture: lora_baselines.Mixture, *, peer: bool = True) -> Provider:
    """One form of the mixture as a provider."""

    def compute(weights: Tensors, batch: Tensors) -> Tensor:
        return mixture(
            F.linear(batch["x"], weights["linear"]),
            batch["x"],
            weights["lora_a"],
            weights["lora_b"],
            batch["selected_experts"],
            batch["routing_weights"],
            SCALING,
        )

    return Provider(name, plainly(compute), peer=peer)


BENCHMARK = Benchmark(
    name="gated_lora",
    cases=default_cases,
    shape_names=tuple(LORA_SHAPES),
    make_inputs=make_inputs,
    reference=plainly(reference),
    work=work,
    providers=(
        mixture_provider("moeroute", moeroute_kernels.gated_lora, peer=False),
        *(mixture_provider(name, mixture) for name, mixture in lora_baselines.PEERS.items()),
    ),
)
