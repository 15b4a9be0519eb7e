"""LoRA on the matrices of experts beside the rebuilt stack and a masked loop.

The frozen grouped product is part of what is timed, as in a model: rows in expert order go through
the first matrix of their expert and through its low-rank pair. The experts stay frozen; gradients
are those of the rows and of the pairs. Several adapters are virtual experts.

Axes: T tokens, K slots per token, N = T * K rows, E experts, G = E * adapters groups, R rank, I in,
O out.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F

import moeroute_kernels
from benchmarks.cases import Benchmark, Case, Inputs, Pass, Provider, Tensors, leaf, plainly
from benchmarks.shapes import (
    DTYPES,
    EXPERT_LORA_DECODE_SHAPE,
    EXPERT_LORA_FLOOR_CASES,
    EXPERT_LORA_SHAPES,
    INPUT_SETS,
    ROTATE_BELOW_TOKENS,
    ROUTINGS,
    make_routing,
)

__all__ = ["BENCHMARK", "make_inputs", "work"]

SCALING = 0.5


def default_cases(device: str) -> list[Case]:
    """Forward + backward at few tokens, and the forward of one token."""
    trained = [("fwd_bwd", *case) for case in EXPERT_LORA_FLOOR_CASES]
    return [
        Case("grouped_lora", mode, shape, tokens, dtype, ROUTINGS[0], device)
        for (mode, shape, tokens), dtype in product(
            (*trained, ("fwd", EXPERT_LORA_DECODE_SHAPE, 1)), DTYPES
        )
    ]


def make_inputs(case: Case) -> Inputs:
    """Rows of order one in expert order, frozen matrices that keep them so, and pairs.

    Args:
        case: Sizes, dtype, routing and device; with several adapters, each token draws its own.

    Returns:
        weights linear (E, O, I) without a gradient, lora_a (G, R, I), lora_b (G, O, R); batches of
        x (N, I) and group_ends (G,) int32; gradients (N, O).
    """
    shape, dtype = EXPERT_LORA_SHAPES[case.shape_name], DTYPES[case.dtype]
    width, experts = shape.layer.hidden_size, shape.layer.num_experts
    wide, groups = 2 * shape.layer.intermediate_size, experts * shape.num_adapters
    generator = torch.Generator().manual_seed(0)
    own = torch.Generator(case.device).manual_seed(0)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=own, device=case.device)

    weights = {
        "linear": (normal(experts, wide, width) * width**-0.5).to(dtype),
        "lora_a": leaf(normal(groups, shape.r, width) * width**-0.5, case, dtype),
        "lora_b": leaf(normal(groups, wide, shape.r) * shape.r**-0.5, case, dtype),
    }
    batches, gradients = [], []
    for _ in range(INPUT_SETS if case.tokens < ROTATE_BELOW_TOKENS else 1):
        ids, _ = make_routing(case.routing, case.tokens, shape.layer, generator)
        adapters = torch.randint(shape.num_adapters, (case.tokens,), generator=generator)
        virtual = moeroute_kernels.virtual_experts(ids, adapters, experts, shape.num_adapters)
        ends = moeroute_kernels.expert_sort(virtual, groups).expert_offsets
        batches.append(
            {
                "x": leaf(normal(ids.numel(), width), case, dtype),
                "group_ends": ends.to(case.device),
            }
        )
        gradients.append(normal(ids.numel(), wide).to(dtype))
    return Inputs(weights, tuple(batches), tuple(gradients))


def expert_ends(weights: Tensors, batch: Tensors) -> Tensor:
    """(E,) inclusive ends of the experts' rows: those of each expert's last adapter."""
    adapters = len(weights["lora_a"]) // len(weights["linear"])
    return batch["group_ends"][adapters - 1 :: adapters].contiguous()


def moeroute(weights: Tensors, batch: Tensors) -> Tensor:
    """Ours."""
    base = moeroute_kernels.grouped_mm(batch["x"], weights["linear"], expert_ends(weights, batch))
    pairs = (weights["lora_a"], weights["lora_b"])
    return moeroute_kernels.grouped_lora(base, batch["x"], *pairs, batch["group_ends"], SCALING)


def rebuilt(weights: Tensors, batch: Tensors) -> Tensor:
    """PEFT's way with `target_parameters`: stack plus every expert's delta, then one product."""
    delta = torch.einsum("eor,eri->eoi", weights["lora_b"], weights["lora_a"]) * SCALING
    stack = weights["linear"] + delta
    return F.grouped_mm(batch["x"], stack.transpose(1, 2), offs=batch["group_ends"])


def pieces(weights: Tensors, batch: Tensors) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Rows, matrix, A and B of each group that has rows."""
    ends = [0, *batch["group_ends"].tolist()]
    adapters = len(weights["lora_a"]) // len(weights["linear"])
    down, up = weights["lora_a"].unbind(0), weights["lora_b"].unbind(0)
    for group, (begin, end) in enumerate(zip(ends, ends[1:], strict=False)):
        if end > begin:
            matrix = weights["linear"][group // adapters]
            yield batch["x"][begin:end], matrix, down[group], up[group]


def masked_loop(weights: Tensors, batch: Tensors) -> Tensor:
    """Every group over its own rows, one after another."""
    done = [
        F.linear(x, matrix) + F.linear(F.linear(x, down), up) * SCALING
        for x, matrix, down, up in pieces(weights, batch)
    ]
    return torch.cat(done)


def reference(weights: Tensors, batch: Tensors) -> Tensor:
    """Compute the definition in float32.

    Args:
        weights: See `make_inputs`.
        batch: See `make_inputs`.

    Returns:
        (N, O) float32.
    """
    done = []
    for piece in pieces(weights, batch):
        x, matrix, down, up = (tensor.float() for tensor in piece)
        done.append(F.linear(x, matrix) + SCALING * F.linear(F.linear(x, down), up))
    return torch.cat(done)


def skip_rebuilt(case: Case) -> str:
    """Where one stack cannot hold what the batch needs."""
    several = EXPERT_LORA_SHAPES[case.shape_name].num_adapters > 1
    return "one adapter a batch" if several else ""


def work(mode: str, shape_name: str, tokens: int) -> tuple[Pass, ...]:
    """The least that the frozen product and the pairs do; see `Benchmark.work`."""
    shape = EXPERT_LORA_SHAPES[shape_name]
    width, wide = shape.layer.hidden_size, 2 * shape.layer.intermediate_size
    rows, hit = tokens * shape.layer.top_k, shape.layer.experts_hit(tokens)
    groups = shape.layer.num_experts * shape.num_adapters
    met = groups * (1 - (1 - shape.layer.top_k / groups) ** tokens)
    matrix, pair = width * wide, shape.r * (width + wide)
    forward = Pass(2 * rows * (matrix + pair), rows * (width + wide) + hit * matrix + met * pair)
    if mode != "fwd_bwd":
        return (forward,)
    moved = rows * (2 * width + wide) + hit * matrix + (met + groups) * pair
    return forward, Pass(2 * rows * (matrix + 2 * pair), moved)


BENCHMARK = Benchmark(
    name="grouped_lora",
    cases=default_cases,
    shape_names=tuple(EXPERT_LORA_SHAPES),
    make_inputs=make_inputs,
    reference=plainly(reference),
    providers=(
        Provider("moeroute", plainly(moeroute), peer=False),
        Provider("rebuilt", plainly(rebuilt), skip=skip_rebuilt),
        Provider("masked_loop", plainly(masked_loop)),
    ),
    work=work,
)
