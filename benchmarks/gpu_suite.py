"""The rows of `--suite gpu`, those that matter most first: a run may stop before the last one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product

from benchmarks.cases import Case
from benchmarks.shapes import (
    GPU_EXPERT_LORA_NAMES,
    GPU_EXPERT_LORA_TOKENS,
    GPU_GRAPH_TOKENS,
    GPU_JUDGED_SHAPE,
    GPU_JUDGED_TOKENS,
    GPU_LORA_NAMES,
    GPU_LORA_TOKENS,
    GPU_NEAR_SHAPES,
    GPU_SHAPES,
    GPU_SKEWED_TOKENS,
    GPU_SUITE_TOKENS,
    ROUTINGS,
)

__all__ = ["gpu_cases"]

DTYPE = "bf16"
TRAINED_FIRST = ("fwd_bwd", "fwd")
"""The answer with gradients holds the one without, so it is computed once for both."""


def gpu_cases(device: str) -> list[Case]:
    """Every row, each once; rows that share their inputs stand together.

    Args:
        device: A torch device.
    """
    uniform, skewed, *_ = ROUTINGS
    asked: dict[Case, None] = {}

    def add(op: str, mode: str, shape: str, tokens: int, routing: str = uniform) -> None:
        asked.setdefault(Case(op, mode, shape, tokens, DTYPE, routing, device))

    judged = (GPU_JUDGED_SHAPE, *GPU_NEAR_SHAPES)
    for shape in judged:
        for tokens in GPU_SUITE_TOKENS[shape]:
            _layer_rows(add, shape, tokens, skewed)
        if shape == GPU_JUDGED_SHAPE:
            add("routed_mlp", "compiles", shape, 1)
    for op, mode, shape, tokens in _lora_rows():
        add(op, mode, shape, tokens)
    for shape in GPU_SHAPES:
        if shape not in judged:
            for tokens, mode in product(GPU_SUITE_TOKENS[shape], TRAINED_FIRST):
                add("routed_mlp", mode, shape, tokens)
    return list(asked)


def _layer_rows(add: Callable[..., None], shape: str, tokens: int, skewed: str) -> None:
    """One layer at one T: times, bytes, launches, capture, and skewed routing."""
    for mode in TRAINED_FIRST:
        add("routed_mlp", mode, shape, tokens)
    if tokens == GPU_JUDGED_TOKENS:
        add("routed_mlp", "mem", shape, tokens)
    if tokens == 1:
        add("routed_mlp", "launches", shape, tokens)
    if tokens in GPU_GRAPH_TOKENS:
        add("routed_mlp", "graph", shape, tokens)
    if tokens in GPU_SKEWED_TOKENS:
        for mode in TRAINED_FIRST if shape == GPU_JUDGED_SHAPE else TRAINED_FIRST[:1]:
            add("routed_mlp", mode, shape, tokens, skewed)


def _lora_rows() -> Iterator[tuple[str, str, str, int]]:
    for shape in GPU_EXPERT_LORA_NAMES:
        yield from (("grouped_lora", "fwd_bwd", shape, tokens) for tokens in GPU_EXPERT_LORA_TOKENS)
        yield "grouped_lora", "fwd", shape, 1
    for shape in GPU_LORA_NAMES:
        yield from (("gated_lora", "fwd_bwd", shape, tokens) for tokens in GPU_LORA_TOKENS)
        yield "gated_lora", "fwd", shape, 1
