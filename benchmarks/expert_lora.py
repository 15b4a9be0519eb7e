"""A layer of experts with PEFT's LoRA on both matrices: `fast_expert_lora` beside PEFT's own path.

Both are the same modules, made by `LoraConfig(target_parameters=[...])`; one of them is then made
fast. The experts stay frozen; gradients are those of the tokens, of the routing weights and of the
factors.

Axes: T tokens, K slots per token, E experts, R rank, H hidden, I intermediate.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

import moeroute
from benchmarks.cases import Benchmark, Bound, Case, Inputs, Pass, Provider, Tensors, leaf, plainly
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
STACKS = {"gate_up": "gate_up_proj", "down": "down_proj"}
"""Our name of a stack -> transformers' own."""


def default_cases(device: str) -> list[Case]:
    """Forward + backward at few tokens, and the forward of one token."""
    trained = [("fwd_bwd", *case) for case in EXPERT_LORA_FLOOR_CASES]
    return [
        Case("expert_lora", mode, shape, tokens, dtype, ROUTINGS[0], device)
        for (mode, shape, tokens), dtype in product(
            (*trained, ("fwd", EXPERT_LORA_DECODE_SHAPE, 1)), DTYPES
        )
    ]


def make_inputs(case: Case) -> Inputs:
    """Tokens of order one, frozen stacks that keep them so, and factors as PEFT has them.

    Args:
        case: Sizes, dtype, routing and device.

    Returns:
        weights gate_up (E, 2I, H) and down (E, H, I) without a gradient, and for each of the two
        a_NAME (E * R, in), expert by expert, and b_NAME (out, R * E), rank by rank; batches of
        x (T, H), selected_experts (T, K), routing_weights (T, K) float32; gradients (T, H).
    """
    shape, dtype = EXPERT_LORA_SHAPES[case.shape_name], DTYPES[case.dtype]
    layer, rank = shape.layer, shape.r
    hidden, inner, experts = layer.hidden_size, layer.intermediate_size, layer.num_experts
    generator = torch.Generator().manual_seed(0)
    own = torch.Generator(case.device).manual_seed(0)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=own, device=case.device)

    weights = {}
    for name, rows, columns in (("gate_up", 2 * inner, hidden), ("down", hidden, inner)):
        weights[name] = (normal(experts, rows, columns) * columns**-0.5).to(dtype)
        weights[f"a_{name}"] = leaf(normal(experts * rank, columns) * columns**-0.5, case, dtype)
        weights[f"b_{name}"] = leaf(normal(rows, rank * experts) * rank**-0.5, case, dtype)
    batches, gradients = [], []
    for _ in range(INPUT_SETS if case.tokens < ROTATE_BELOW_TOKENS else 1):
        ids, routing_weights = make_routing(case.routing, case.tokens, layer, generator)
        batches.append(
            {
                "x": leaf(normal(case.tokens, hidden), case, dtype),
                "selected_experts": ids.to(case.device),
                "routing_weights": leaf(routing_weights, case),
            }
        )
        gradients.append(normal(case.tokens, hidden).to(dtype))
    return Inputs(weights, tuple(batches), tuple(gradients))


def experts_of(weights: Tensors) -> MixtralExperts:
    """Transformers' experts around the frozen stacks, on its default implementation."""
    experts, hidden, inner = weights["down"].shape
    config = MixtralConfig(hidden_size=hidden, intermediate_size=inner, num_local_experts=experts)
    config._experts_implementation = "grouped_mm"
    with torch.device("meta"):
        module = MixtralExperts(config)
    for name, theirs in STACKS.items():
        setattr(module, theirs, nn.Parameter(weights[name], requires_grad=False))
    return module


def adapted(inputs: Inputs, *, fast: bool) -> Bound:
    """Bind PEFT's LoRA on both stacks, on the path of either side."""
    weights = inputs.weights
    rank = len(weights["a_down"]) // len(weights["down"])
    config = LoraConfig(
        r=rank,
        lora_alpha=int(SCALING * rank),
        target_modules=[],
        target_parameters=[f"experts.{name}" for name in STACKS.values()],
    )
    host = nn.ModuleDict({"experts": experts_of(weights)})
    model = get_peft_model(host, config, autocast_adapter_dtype=False)
    names = {theirs: name for name, theirs in STACKS.items()}
    owned: dict[str, Tensor] = {}
    for wrapper in model.modules():
        if isinstance(wrapper, ParamWrapper):
            name = names[wrapper.parameter_name]
            for side, module in (("a", wrapper.lora_A), ("b", wrapper.lora_B)):
                factor = nn.Parameter(weights[f"{side}_{name}"].detach().clone())
                owned[f"{side}_{name}"] = module["default"].weight = factor
    if fast:
        moeroute.fast_expert_lora(model)
    layer = model.base_model.model["experts"]

    def leaves(index: int) -> dict[str, Tensor]:
        return {name: owned.get(name, tensor) for name, tensor in inputs.leaves(index).items()}

    return Bound(lambda index: layer(*batch_of(inputs, index)), leaves)


def moeroute_layer(inputs: Inputs) -> Bound:
    """Bind ours."""
    return adapted(inputs, fast=True)


def peft_layer(inputs: Inputs) -> Bound:
    """Bind PEFT's own path: both stacks are rebuilt with their deltas in every forward."""
    return adapted(inputs, fast=False)


def frozen_layer(inputs: Inputs) -> Bound:
    """Bind the experts without any LoRA."""
    layer = experts_of(inputs.weights)
    return Bound(
        lambda index: layer(*batch_of(inputs, index)),
        lambda index: {name: inputs.batches[index][name] for name in ("x", "routing_weights")},
    )


def batch_of(inputs: Inputs, index: int) -> tuple[Tensor, Tensor, Tensor]:
    """What the experts' forward takes."""
    batch = inputs.batches[index]
    return batch["x"], batch["selected_experts"], batch["routing_weights"]


def matrices(weights: Tensors, name: str) -> Iterator[Tensor]:
    """Each expert's own matrix of one stack with its delta, float32."""
    experts = len(weights[name])
    down = weights[f"a_{name}"].float().unflatten(0, (experts, -1)).unbind(0)
    up = weights[f"b_{name}"].float().unflatten(1, (-1, experts)).unbind(2)
    for matrix, one, other in zip(weights[name].unbind(0), down, up, strict=True):
        yield matrix.float() + SCALING * (other @ one)


def reference(weights: Tensors, batch: Tensors) -> Tensor:
    """Compute the definition in float32, expert by expert.

    Args:
        weights: See `make_inputs`.
        batch: See `make_inputs`.

    Returns:
        (T, H) float32.
    """
    x, ids = batch["x"].float(), batch["selected_experts"]
    total = torch.zeros_like(x)
    stacks = zip(matrices(weights, "gate_up"), matrices(weights, "down"), strict=True)
    for expert, (first, second) in enumerate(stacks):
        token, slot = torch.where(ids == expert)
        gate, up = F.linear(x[token], first).chunk(2, -1)
        rows = F.linear(F.silu(gate) * up, second)
        weight = batch["routing_weights"][token, slot].unsqueeze(1)
        total = total.index_add(0, token, rows * weight)
    return total


def work(mode: str, shape_name: str, tokens: int) -> tuple[Pass, ...]:
    """The least that the frozen experts and the factors do; see `Benchmark.work`."""
    shape = EXPERT_LORA_SHAPES[shape_name]
    layer = shape.layer
    hidden, inner, experts = layer.hidden_size, layer.intermediate_size, layer.num_experts
    rows, hit = tokens * layer.top_k, layer.experts_hit(tokens)
    matrix, pairs = 3 * hidden * inner, shape.r * (2 * hidden + 3 * inner)
    moved = 2 * tokens * hidden + 2 * rows * (inner + hidden) + hit * (matrix + pairs)
    forward = Pass(2 * rows * (matrix + pairs), moved)
    if mode != "fwd_bwd":
        return (forward,)
    moved = 3 * tokens * hidden + rows * (2 * hidden + 8 * inner) + hit * (matrix + pairs)
    return forward, Pass(2 * rows * (matrix + 2 * pairs), moved + experts * pairs)


BENCHMARK = Benchmark(
    name="expert_lora",
    cases=default_cases,
    shape_names=tuple(name for name, one in EXPERT_LORA_SHAPES.items() if one.num_adapters == 1),
    make_inputs=make_inputs,
    reference=plainly(reference),
    providers=(
        Provider("moeroute", moeroute_layer, peer=False),
        Provider("peft", peft_layer),
        Provider("frozen", frozen_layer, peer=False, checked=False),
    ),
    work=work,
)
