"""The routed MLP beside the experts implementations of transformers.

The peers are transformers' own code on its own `MixtralExperts` or `GptOssExperts`, which share our
weight tensors; on CUDA also those of `kernel_peers`.

Axes: T tokens, H hidden, I intermediate, E experts, K slots per token.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import GptOssConfig, MixtralConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

import moeroute_kernels
from benchmarks.cases import Benchmark, Bound, Case, Inputs, Pass, Provider, leaf
from benchmarks.kernel_peers import KERNEL_PEERS
from benchmarks.shapes import (
    CPU_TOKENS,
    DTYPES,
    EXPERT_SHAPES,
    FLOOR_SHAPES,
    INPUT_SETS,
    MEMORY_SHAPE,
    MEMORY_TOKENS,
    OWN_SHAPE,
    ROTATE_BELOW_TOKENS,
    ROUTINGS,
    expert_shape,
    make_routing,
)

__all__ = ["BENCHMARK", "make_inputs", "reference", "work"]

COPIES_OF_LAYER = 4
"""batched_mm copies one expert per slot; it is run up to this many times the bytes of the layer."""

ZERO_GRADIENT_BYTES = 20 * 2**30
"""eager writes one gradient of the whole stack per expert; it is run up to this many bytes."""

TRANSFORMERS_NAMES = {
    "gate_up": "gate_up_proj",
    "down": "down_proj",
    "gate_up_bias": "gate_up_proj_bias",
    "down_bias": "down_proj_bias",
}


def default_cases(device: str) -> list[Case]:
    """Forward and forward + backward at every shape, T and dtype, then the memory row."""
    timed = product(("fwd", "fwd_bwd"), FLOOR_SHAPES, CPU_TOKENS, DTYPES)
    kept = product(("mem",), (MEMORY_SHAPE,), MEMORY_TOKENS, DTYPES)
    return [
        Case("routed_mlp", mode, shape, tokens, dtype, ROUTINGS[0], device)
        for mode, shape, tokens, dtype in (*timed, *kept)
    ]


def make_inputs(case: Case) -> Inputs:
    """Tokens of order one, and weights that keep them so.

    Args:
        case: Sizes, dtype, routing and device.

    Returns:
        weights gate_up (E, 2I, H), down (E, H, I), each as its checkpoint has it, with
        gate_up_bias (E, 2I) and down_bias (E, H) where the layer has them; batches of x (T, H),
        selected_experts (T, K), routing_weights (T, K) float32; gradients (T, H).
    """
    shape, dtype = expert_shape(case.shape_name), DTYPES[case.dtype]
    generator = torch.Generator().manual_seed(0)
    # a layer of a released model has a billion weights: they are drawn where they are used
    own = torch.Generator(case.device).manual_seed(0)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=own, device=case.device)

    hidden, inner = shape.hidden_size, shape.intermediate_size

    def matrices(rows: int, columns: int) -> Tensor:
        sizes = (columns, rows) if shape.form.transposed else (rows, columns)
        return leaf(normal(shape.num_experts, *sizes) * columns**-0.5, case, dtype)

    weights = {"gate_up": matrices(2 * inner, hidden), "down": matrices(hidden, inner)}
    if shape.form.biased:
        weights["gate_up_bias"] = leaf(normal(shape.num_experts, 2 * inner), case, dtype)
        weights["down_bias"] = leaf(normal(shape.num_experts, hidden), case, dtype)
    batches, gradients = [], []
    for _ in range(INPUT_SETS if case.tokens < ROTATE_BELOW_TOKENS else 1):
        ids, routing_weights = make_routing(case.routing, case.tokens, shape, generator)
        batches.append(
            {
                "x": leaf(normal(case.tokens, hidden), case, dtype),
                "selected_experts": ids.to(case.device),
                "routing_weights": leaf(routing_weights, case),
            }
        )
        gradients.append(normal(case.tokens, hidden).to(case.device, dtype))
    return Inputs(weights, tuple(batches), tuple(gradients), shape.form)


def reference(inputs: Inputs) -> Bound:
    """Bind the definition: a loop over experts in float32.

    The same sum as `moeroute_kernels.reference.routed_mlp`, which indexes the stacks under autograd
    and would write one gradient of all experts per expert and slot at these sizes.

    Args:
        inputs: See `make_inputs`.

    Returns:
        Runs to (T, H) float32.
    """
    form, weights = inputs.form, inputs.weights

    def run(index: int) -> Tensor:
        batch = inputs.batches[index]
        x, ids = batch["x"].float(), batch["selected_experts"]
        stacks = zip(*(matrix.unbind(0) for matrix in form.matrices(weights)), strict=True)
        total = torch.zeros_like(x)
        for expert, (first, second) in enumerate(stacks):
            token, slot = torch.where(ids == expert)
            biases = (None, None)
            if form.biased:
                biases = (weights["gate_up_bias"][expert], weights["down_bias"][expert])
            above, below = (None if bias is None else bias.float() for bias in biases)
            inner = form.glu(F.linear(x[token], first.float(), above))
            rows = F.linear(inner, second.float(), below)
            weight = batch["routing_weights"][token, slot].unsqueeze(1)
            total = total.index_add(0, token, rows * weight)
        return total

    return Bound(run, inputs.leaves)


def moeroute(inputs: Inputs) -> Bound:
    """Bind ours."""
    form, weights = inputs.form, inputs.weights

    def run(index: int) -> Tensor:
        batch = inputs.batches[index]
        return moeroute_kernels.routed_mlp(
            batch["x"],
            *form.matrices(weights),
            batch["selected_experts"],
            batch["routing_weights"],
            gate_up_bias=weights.get("gate_up_bias"),
            down_bias=weights.get("down_bias"),
            activation=form.activation,
            interleaved=form.interleaved,
            alpha=form.alpha,
            limit=form.limit,
        )

    return Bound(run, inputs.leaves)


def transformers_experts(implementation: str) -> Callable[[Inputs], Bound]:
    """Bind one of transformers' implementations."""

    def bind(inputs: Inputs) -> Bound:
        num_experts, hidden, inner = inputs.form.matrices(inputs.weights)[1].shape
        mixtral, gpt_oss = (MixtralConfig, MixtralExperts), (GptOssConfig, GptOssExperts)
        make_config, make_experts = gpt_oss if inputs.form.biased else mixtral
        config = make_config(
            hidden_size=hidden, intermediate_size=inner, num_local_experts=num_experts
        )
        config._experts_implementation = implementation
        with torch.device("meta"):
            experts = make_experts(config)
        # The tensors themselves, no Parameters made of them: gradients are asked of our leaves.
        for name, tensor in inputs.weights.items():
            theirs = TRANSFORMERS_NAMES[name]
            delattr(experts, theirs)
            setattr(experts, theirs, tensor)

        def run(index: int) -> Tensor:
            batch = inputs.batches[index]
            return experts(batch["x"], batch["selected_experts"], batch["routing_weights"])

        return Bound(run, inputs.leaves)

    return bind


def dense_equal_flops(inputs: Inputs) -> Bound:
    """Bind one dense MLP of intermediate size K * I: the same multiplications, no routing."""
    slots = inputs.batches[0]["selected_experts"].shape[1]
    gate_up, down = inputs.form.matrices(inputs.weights)
    hidden = gate_up.shape[2]
    with torch.no_grad():
        first = gate_up[:slots].reshape(-1, hidden).clone()
        second = down[:slots].transpose(0, 1).reshape(hidden, -1).clone()
    weights = {"first": first.requires_grad_(), "second": second.requires_grad_()}

    def run(index: int) -> Tensor:
        return F.linear(inputs.form.glu(F.linear(inputs.batches[index]["x"], first)), second)

    return Bound(run, lambda index: {**weights, "x": inputs.batches[index]["x"]})


def skip_batched(case: Case) -> str:
    """Where batched_mm would copy too much."""
    shape = expert_shape(case.shape_name)
    copies = case.tokens * shape.top_k
    if copies <= COPIES_OF_LAYER * shape.num_experts:
        return ""
    return (
        f"copies {copies} experts, more than {COPIES_OF_LAYER} times the layer's "
        f"{shape.num_experts}"
    )


def skip_eager(case: Case) -> str:
    """Where eager's backward would write too much."""
    shape = expert_shape(case.shape_name)
    hit = min(shape.num_experts, case.tokens * shape.top_k)
    size = DTYPES[case.dtype].itemsize * 3 * shape.hidden_size * shape.intermediate_size
    zeros = hit * shape.num_experts * size
    if case.mode != "fwd_bwd" or zeros <= ZERO_GRADIENT_BYTES:
        return ""
    return (
        f"its backward writes a gradient of the whole stack per expert, {zeros / 2**30:.0f} GiB, "
        f"more than {ZERO_GRADIENT_BYTES / 2**30:.0f}"
    )


def work(mode: str, shape_name: str, tokens: int) -> tuple[Pass, ...]:
    """The least that a layer does, pass by pass; see `Benchmark.work`.

    A pass reads every expert that is expected to be hit once; what one kernel writes and the next
    reads is counted twice. Biases are nothing beside the matrices.
    """
    shape = expert_shape(shape_name)
    hidden, inner, experts = shape.hidden_size, shape.intermediate_size, shape.num_experts
    rows, hit = tokens * shape.top_k, shape.experts_hit(tokens)
    ends, matrix = 2 * tokens * hidden, hidden * inner
    training = mode == "fwd_bwd"
    forward = ends + 3 * hit * matrix + (4 if training else 2) * rows * inner + 2 * rows * hidden
    passes = (Pass(6 * rows * matrix, forward),)
    if not training:
        return passes
    inner_gradient = tokens * hidden + hit * matrix + 5 * rows * inner
    down = tokens * hidden + rows * inner + experts * matrix
    x = 2 * rows * inner + 2 * hit * matrix + 2 * rows * hidden + tokens * hidden
    gate_up = tokens * hidden + 2 * rows * inner + 2 * experts * matrix
    return (*passes, Pass(12 * rows * matrix, inner_gradient + down + x + gate_up))


BENCHMARK = Benchmark(
    name="routed_mlp",
    cases=default_cases,
    shape_names=tuple(EXPERT_SHAPES),
    sized=lambda name: OWN_SHAPE.fullmatch(name) is not None,
    make_inputs=make_inputs,
    reference=reference,
    providers=(
        Provider("moeroute", moeroute, peer=False),
        Provider("grouped_mm", transformers_experts("grouped_mm")),
        Provider("eager", transformers_experts("eager"), skip=skip_eager),
        Provider("batched_mm", transformers_experts("batched_mm"), skip=skip_batched),
        *KERNEL_PEERS,
        Provider("dense", dense_equal_flops, peer=False, checked=False),
    ),
    work=work,
)
