"""A decoder whose layers are skipped, beside the whole decoder: prefill, and decoding with a cache.

The definition is the same decoder with these layers taken out of its list.

Axes: T tokens of the call; T = 1 is a decoding step with a filled cache.
"""

from __future__ import annotations

import copy
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from benchmarks.cases import Benchmark, Bound, Case, Inputs, Pass, Provider
from benchmarks.depth_shapes import (
    CONTEXT,
    DEPTH_NAMES,
    DEPTH_SHAPES,
    DEPTH_TOKENS,
    VOCABULARY,
    DepthShape,
)
from benchmarks.shapes import DTYPES, INPUT_SETS, ROUTINGS
from moeroute.depth import force_depth

__all__ = ["BENCHMARK", "make_inputs"]


def default_cases(device: str) -> list[Case]:
    """Forward alone, of every shape and T, in both dtypes."""
    return [
        Case("depth", "fwd", shape, tokens, dtype, ROUTINGS[0], device)
        for shape in DEPTH_NAMES
        for tokens in DEPTH_TOKENS
        for dtype in DTYPES
    ]


def make_inputs(case: Case) -> Inputs:
    """Token ids; the model is made of its shape when a provider binds.

    Args:
        case: Sizes, dtype and device.

    Returns:
        weights: the place of the shape, the context (1, CONTEXT), and what dtype is asked for;
        batches of ids (1, T).
    """
    generator = torch.Generator().manual_seed(0)

    def ids(tokens: int) -> Tensor:
        return torch.randint(VOCABULARY, (1, tokens), generator=generator).to(case.device)

    weights = {
        "shape": torch.tensor(list(DEPTH_SHAPES).index(case.shape_name)),
        "context": ids(CONTEXT),
        "dtype": torch.zeros((), dtype=DTYPES[case.dtype], device=case.device),
    }
    batches = tuple({"ids": ids(case.tokens)} for _ in range(INPUT_SETS))
    return Inputs(weights, batches, tuple(torch.zeros(()) for _ in batches))


def model_of(inputs: Inputs) -> tuple[LlamaForCausalLM, DepthShape]:
    """The whole decoder of a case, the same for everyone."""
    shape = tuple(DEPTH_SHAPES.values())[int(inputs.weights["shape"])]
    like = inputs.weights["dtype"]
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.intermediate_size,
        num_hidden_layers=shape.num_layers,
        num_attention_heads=shape.num_heads,
    )
    return LlamaForCausalLM(config).eval().to(like.device, like.dtype), shape


def bind_model(model: Any, inputs: Inputs) -> Bound:
    """Bind one call of a model, with a filled cache where the call is one token."""
    one = inputs.batches[0]["ids"].shape[1] == 1
    cache = DynamicCache(config=model.config) if one else None
    if one:
        with torch.no_grad():
            model(input_ids=inputs.weights["context"], past_key_values=cache)

    def run(index: int) -> Tensor:
        with torch.no_grad():
            out = model(
                input_ids=inputs.batches[index]["ids"],
                past_key_values=cache,
                use_cache=one,
                logits_to_keep=1,
            ).logits
        if cache is not None:
            cache.crop(-1)
        return out

    return Bound(run, lambda index: {})


def bind_forced(inputs: Inputs) -> Bound:
    """Bind the whole decoder under `force_depth`, which stays on."""
    model, shape = model_of(inputs)
    stack = ExitStack()
    stack.enter_context(force_depth(model, list(shape.actions)))
    model.__dict__["kept"] = stack  # it would end with its last reference
    return bind_model(model, inputs)


def bind_base(inputs: Inputs) -> Bound:
    """Bind the whole decoder."""
    return bind_model(model_of(inputs)[0], inputs)


def bind_pruned(inputs: Inputs) -> Bound:
    """Bind the decoder without the layers that are skipped."""
    model, shape = model_of(inputs)
    kept = [layer for layer, runs in zip(model.model.layers, shape.actions, strict=True) if runs]
    model.model.layers = nn.ModuleList(kept)
    model.config = copy.deepcopy(model.config)
    model.config.num_hidden_layers = len(kept)
    model.model.config = model.config
    for place, layer in enumerate(kept):
        layer.self_attn.layer_idx = place
    return bind_model(model, inputs)


def work(mode: str, shape_name: str, tokens: int) -> tuple[Pass, ...]:
    """The products of the layers that run; a T of one reads their weights."""
    shape = DEPTH_SHAPES[shape_name]
    layer = 4 * shape.hidden_size**2 + 3 * shape.hidden_size * shape.intermediate_size
    weights = sum(shape.actions) * layer
    return (Pass(2 * tokens * weights, weights),)


BENCHMARK = Benchmark(
    name="depth",
    cases=default_cases,
    shape_names=tuple(DEPTH_SHAPES),
    make_inputs=make_inputs,
    reference=bind_pruned,
    work=work,
    providers=(
        Provider("moeroute", bind_forced, peer=False),
        Provider("pruned", bind_pruned),
        Provider("base", bind_base, peer=False, checked=False),
    ),
)
