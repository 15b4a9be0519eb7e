"""A router of our parts beside the one of transformers that it equals.

Ours is made by reading theirs, weights and conventions included, as `wrap_model` does, and computes
its logits in the dtype in which theirs does: a model's dtype for most, float32 for DeepSeek-V3's.

Axes: T tokens, H hidden, E experts, K slots per token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module
from itertools import product
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.cases import Benchmark, Bound, Case, Inputs, Pass, Provider, leaf
from benchmarks.gate_shapes import GATE_NAMES, GATE_SHAPES, GATE_TOKENS, GateShape
from benchmarks.shapes import (
    DTYPES,
    INPUT_SETS,
    ROTATE_BELOW_TOKENS,
    ROUTINGS,
)
from moeroute.integration.gates import equal_router
from moeroute.types import RouterInput

__all__ = ["BENCHMARK", "make_inputs"]

CLASSES: Mapping[str, tuple[str, str]] = MappingProxyType(
    {
        "mixtral": ("MixtralTopKRouter", "MixtralConfig"),
        "qwen3_moe": ("Qwen3MoeTopKRouter", "Qwen3MoeConfig"),
        "olmoe": ("OlmoeTopKRouter", "OlmoeConfig"),
        "deepseek_v3": ("DeepseekV3TopkRouter", "DeepseekV3Config"),
        "gpt_oss": ("GptOssTopKRouter", "GptOssConfig"),
    }
)
"""Family -> the classes of its router and config."""


def default_cases(device: str) -> list[Case]:
    """Both modes of every family at few tokens and many, in both dtypes."""
    return [
        Case("router", mode, shape, tokens, dtype, ROUTINGS[0], device)
        for mode, shape, tokens, dtype in product(
            ("fwd", "fwd_bwd"), GATE_NAMES, GATE_TOKENS, DTYPES
        )
    ]


def make_inputs(case: Case) -> Inputs:
    """Tokens of order one, rows of the router, and a number an expert that its tokens answer.

    Args:
        case: Sizes, dtype and device.

    Returns:
        weights rows (E, H), values (E,) without a gradient; batches of x (T, H); gradients (T,).
    """
    shape, dtype = GATE_SHAPES[case.shape_name], DTYPES[case.dtype]
    generator = torch.Generator().manual_seed(0)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=generator)

    rows = normal(shape.num_experts, shape.hidden_size) * shape.hidden_size**-0.5
    weights = {
        "rows": leaf(rows, case, dtype),
        "values": normal(shape.num_experts).to(case.device),
        "family": torch.tensor(list(GATE_SHAPES).index(shape.name)),
    }
    count = INPUT_SETS if case.tokens < ROTATE_BELOW_TOKENS else 1
    batches = tuple(
        {"x": leaf(normal(case.tokens, shape.hidden_size), case, dtype)} for _ in range(count)
    )
    gradients = tuple(normal(case.tokens).to(case.device) for _ in batches)
    return Inputs(weights, batches, gradients)


def gate_of(inputs: Inputs, dtype: torch.dtype | None = None) -> Any:
    """Transformers' router with the rows of the case, in their dtype or another."""
    shape = tuple(GATE_SHAPES.values())[int(inputs.weights["family"])]
    rows = inputs.weights["rows"].detach()
    gate_name, config_name = CLASSES[shape.family]
    module = import_module(f"transformers.models.{shape.family}.modeling_{shape.family}")
    config = getattr(import_module("transformers"), config_name)(**_settings(shape))
    gate = getattr(module, gate_name)(config)
    gate.requires_grad_(requires_grad=True)
    with torch.no_grad():
        for tensor in (*gate.parameters(), *gate.buffers()):
            tensor.zero_()
        gate.weight.copy_(rows)
    return gate.to(rows.device, dtype or rows.dtype)


def _settings(shape: GateShape) -> dict[str, int]:
    names = ("num_local_experts", "num_experts", "n_routed_experts")
    sizes = dict.fromkeys(names, shape.num_experts)
    groups = {"n_group": 8, "topk_group": 4} if shape.family == "deepseek_v3" else {}
    slots = {"num_experts_per_tok": shape.top_k}
    return {"hidden_size": shape.hidden_size, **sizes, **slots, **groups}


def answered(weights: Tensor, ids: Tensor, values: Tensor) -> Tensor:
    """(T,) what tokens get from experts that answer one number each: order does not matter."""
    return (weights.float() * values[ids]).sum(-1)


def bind_gate(inputs: Inputs) -> Bound:
    """Bind transformers' own."""
    gate, values = gate_of(inputs), inputs.weights["values"]

    def run(index: int) -> Tensor:
        _, weights, ids = gate(inputs.batches[index]["x"])
        return answered(weights, ids, values)

    return Bound(run, _leaves(gate.weight, inputs))


def bind_ours(inputs: Inputs) -> Bound:
    """Bind the router of our parts that equals it."""
    gate, values = gate_of(inputs), inputs.weights["values"]
    router: Any = equal_router(gate, nn.Module())
    router.to(gate.weight.dtype)
    if type(gate).__name__ != "DeepseekV3TopkRouter":  # it alone computes in float32, as we do
        router.score.compute_dtype = gate.weight.dtype

    def run(index: int) -> Tensor:
        tokens = inputs.batches[index]["x"]
        routing = router(RouterInput(hidden_states=tokens, sequence_shape=(1, tokens.shape[0])))
        return answered(routing.routing_weights, routing.selected_experts, values)

    return Bound(run, _leaves(router.score.weight, inputs))


def reference(inputs: Inputs) -> Bound:
    """Transformers' own in the dtype of the case: who is chosen hangs on the last bits."""
    return bind_gate(inputs)


def _leaves(rows: Tensor, inputs: Inputs) -> Callable[[int], dict[str, Tensor]]:
    return lambda index: {"rows": rows, "x": inputs.batches[index]["x"]}


def work(mode: str, shape_name: str, tokens: int) -> tuple[Pass, ...]:
    """The product with the rows, and in backward the two of its gradients."""
    shape = GATE_SHAPES[shape_name]
    operations = 2 * tokens * shape.hidden_size * shape.num_experts
    read = (tokens + shape.num_experts) * shape.hidden_size
    forward = Pass(operations, read + tokens * shape.top_k)
    return (forward,) if mode == "fwd" else (forward, Pass(2 * operations, 2 * read))


BENCHMARK = Benchmark(
    name="router",
    cases=default_cases,
    shape_names=tuple(GATE_SHAPES),
    make_inputs=make_inputs,
    reference=reference,
    work=work,
    providers=(Provider("moeroute", bind_ours, peer=False), Provider("transformers", bind_gate)),
)
