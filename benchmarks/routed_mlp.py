"""The routed MLP beside the experts implementations of transformers.

The peers are transformers' own code on its own `MixtralExperts`, which share our weight tensors.

Axes: T tokens, H hidden, I intermediate, E experts, K slots per token.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

import moeroute_kernels
from benchmarks.cases import Benchmark, Bound, Case, Inputs, Provider, Tensors, leaf, plainly
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

__all__ = ["BENCHMARK", "make_inputs", "reference"]

COPIES_OF_LAYER = 4
"""batched_mm copies one expert per slot; it is run up to this many times the bytes of the layer."""

ZERO_GRADIENT_BYTES = 20 * 2**30
"""eager writes one gradient of the whole stack per expert; it is run up to this many bytes."""


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
        weights gate_up (E, 2I, H), down (E, H, I); batches of x (T, H), selected_experts (T, K),
        routing_weights (T, K) float32; gradients (T, H).
    """
    shape, dtype = expert_shape(case.shape_name), DTYPES[case.dtype]
    generator = torch.Generator().manual_seed(0)
    # a layer of a released model has a billion weights: they are drawn where they are used
    own = torch.Generator(case.device).manual_seed(0)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=own, device=case.device)

    hidden, inner = shape.hidden_size, shape.intermediate_size
    gate_up = normal(shape.num_experts, 2 * inner, hidden) * hidden**-0.5
    down = normal(shape.num_experts, hidden, inner) * inner**-0.5
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
    weights = {"gate_up": leaf(gate_up, case, dtype), "down": leaf(down, case, dtype)}
    return Inputs(weights, tuple(batches), tuple(gradients))


def reference(weights: Tensors, batch: Tensors) -> Tensor:
    """Compute the definition: a loop over experts in float32.

    The same sum as `moeroute_kernels.reference.routed_mlp`, which indexes the stacks under autograd
    and would write one gradient of all experts per expert and slot at these sizes.

    Args:
        weights: See `make_inputs`.
        batch: See `make_inputs`.

    Returns:
        (T, H) float32.
    """
    x, ids = batch["x"].float(), batch["selected_experts"]
    stacks = zip(weights["gate_up"].unbind(0), weights["down"].unbind(0), strict=True)
    total = torch.zeros_like(x)
    for expert, (first, second) in enumerate(stacks):
        token, slot = torch.where(ids == expert)
        gate, up = F.linear(x[token], first.float()).chunk(2, -1)
        rows = F.linear(F.silu(gate) * up, second.float())
        weight = batch["routing_weights"][token, slot].unsqueeze(1)
        total = total.index_add(0, token, rows * weight)
    return total


def moeroute(weights: Tensors, batch: Tensors) -> Tensor:
    """Ours."""
    return moeroute_kernels.routed_mlp(
        batch["x"],
        weights["gate_up"],
        weights["down"],
        batch["selected_experts"],
        batch["routing_weights"],
    )


def transformers_experts(implementation: str) -> Callable[[Inputs], Bound]:
    """Bind one of transformers' implementations."""

    def bind(inputs: Inputs) -> Bound:
        num_experts, hidden, inner = inputs.weights["down"].shape
        config = MixtralConfig(
            hidden_size=hidden, intermediate_size=inner, num_local_experts=num_experts
        )
        config._experts_implementation = implementation
        with torch.device("meta"):
            experts = MixtralExperts(config)
        # The tensors themselves, no Parameters made of them: gradients are asked of our leaves.
        del experts.gate_up_proj, experts.down_proj
        experts.gate_up_proj, experts.down_proj = inputs.weights["gate_up"], inputs.weights["down"]

        def run(index: int) -> Tensor:
            batch = inputs.batches[index]
            return experts(batch["x"], batch["selected_experts"], batch["routing_weights"])

        return Bound(run, inputs.leaves)

    return bind


def dense_equal_flops(inputs: Inputs) -> Bound:
    """Bind one dense MLP of intermediate size K * I: the same multiplications, no routing."""
    slots = inputs.batches[0]["selected_experts"].shape[1]
    hidden = inputs.weights["gate_up"].shape[2]
    with torch.no_grad():
        first = inputs.weights["gate_up"][:slots].reshape(-1, hidden).clone()
        second = inputs.weights["down"][:slots].transpose(0, 1).reshape(hidden, -1).clone()
    weights = {"first": first.requires_grad_(), "second": second.requires_grad_()}

    def run(index: int) -> Tensor:
        gate, up = F.linear(inputs.batches[index]["x"], first).chunk(2, -1)
        return F.linear(F.silu(gate) * up, second)

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


BENCHMARK = Benchmark(
    name="routed_mlp",
    cases=default_cases,
    shape_names=tuple(EXPERT_SHAPES),
    sized=lambda name: OWN_SHAPE.fullmatch(name) is not None,
    make_inputs=make_inputs,
    reference=reference,
    providers=(
        Provider("moeroute", plainly(moeroute), peer=False),
        Provider("grouped_mm", transformers_experts("grouped_mm")),
        Provider("eager", transformers_experts("eager"), skip=skip_eager),
        Provider("batched_mm", transformers_experts("batched_mm"), skip=skip_batched),
        Provider("dense", dense_equal_flops, peer=False, checked=False),
    ),
)
