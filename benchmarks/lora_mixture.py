"""A whole mixture of LoRA over one frozen linear, its router included, beside plain LoRA.

Beside a masked loop over the experts that gives the same answer, and PEFT's own LoRA of the rank of
all experts together: as many parameters, other answers.

Axes: T tokens, E experts, K slots per token, R rank of one expert, I in, O out.
"""

from __future__ import annotations

from itertools import product

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

import moeroute_kernels
from benchmarks import lora_baselines
from benchmarks.cases import Benchmark, Bound, Case, Inputs, Pass, Provider, Tensors, leaf, plainly
from benchmarks.gated_lora import frozen_linear, work
from benchmarks.shapes import (
    DTYPES,
    INPUT_SETS,
    LORA_SHAPES,
    MIXTURE_NAMES,
    MIXTURE_TOKENS,
    ROTATE_BELOW_TOKENS,
    ROUTINGS,
)
from moeroute.layers import LoRABank, LoRAMixture
from moeroute.routers import ComposedRouter, LinearScore, TopK

__all__ = ["BENCHMARK", "make_inputs"]

SCALING = 0.5


def default_cases(device: str) -> list[Case]:
    """Forward + backward at every listed shape, T and dtype."""
    return [
        Case("lora_mixture", "fwd_bwd", shape, tokens, dtype, ROUTINGS[0], device)
        for shape, tokens, dtype in product(MIXTURE_NAMES, MIXTURE_TOKENS, DTYPES)
    ]


def make_inputs(case: Case) -> Inputs:
    """Tokens of order one, and weights as a layer would hold them.

    Args:
        case: Sizes, dtype and device; the router is a random one, in float32.

    Returns:
        weights router (E, I), lora_a (E * R, I), lora_b (O, E * R) and the frozen linear (O, I);
        batches of x (T, I); gradients (T, O).
    """
    shape, dtype = LORA_SHAPES[case.shape_name], DTYPES[case.dtype]
    generator = torch.Generator().manual_seed(0)
    ranks = shape.num_experts * shape.r

    def normal(rows: int, columns: int, scale: float = 1.0) -> Tensor:
        return torch.randn((rows, columns), generator=generator) * scale

    weights = {
        "router": leaf(normal(shape.num_experts, shape.width, shape.width**-0.5), case),
        "lora_a": leaf(normal(ranks, shape.width, shape.width**-0.5), case, dtype),
        "lora_b": leaf(normal(shape.width, ranks, shape.r**-0.5), case, dtype),
        "linear": frozen_linear(shape.width, case),
    }
    count = INPUT_SETS if case.tokens < ROTATE_BELOW_TOKENS else 1
    batches = tuple(
        {"x": leaf(normal(case.tokens, shape.width), case, dtype)} for _ in range(count)
    )
    gradients = tuple(normal(case.tokens, shape.width).to(case.device, dtype) for _ in batches)
    return Inputs(weights, batches, gradients)


def routed(weights: Tensors, x: Tensor) -> tuple[Tensor, Tensor]:
    """Softmax of the router in float32, the top two, renormalised."""
    kept, ids = F.linear(x.float(), weights["router"]).softmax(-1).topk(2, -1)
    return ids, kept / kept.sum(-1, keepdim=True)


def stacks(weights: Tensors) -> tuple[Tensor, Tensor]:
    """lora_a (E, R, I) and lora_b (O, E, R)."""
    experts = weights["router"].shape[0]
    return (
        weights["lora_a"].unflatten(0, (experts, -1)),
        weights["lora_b"].unflatten(1, (experts, -1)),
    )


def reference(weights: Tensors, batch: Tensors) -> Tensor:
    """Compute the definition in float32, for the routing that the tokens of this dtype get."""
    lora_a, lora_b = stacks(weights)
    x = batch["x"].float()
    base = F.linear(x, weights["linear"].float())
    routing = routed(weights, batch["x"])
    return moeroute_kernels.reference.gated_lora(
        base, x, lora_a.float(), lora_b.float(), *routing, SCALING
    )


def moeroute_layer(inputs: Inputs) -> Bound:
    """Bind our layer, which owns the same tensors."""
    weights = inputs.weights
    experts, width = weights["router"].shape
    rank = weights["lora_a"].shape[0] // experts
    bank = LoRABank(
        num_experts=experts,
        r=rank,
        in_features=width,
        out_features=width,
        lora_alpha=SCALING * rank,
    )
    router = ComposedRouter(LinearScore(width, experts), TopK(2))
    layer = LoRAMixture(router=router, bank=bank).to(weights["linear"].device)
    bank.lora_a, bank.lora_b = (
        nn.Parameter(weights[name].detach()) for name in ("lora_a", "lora_b")
    )
    score = router.get_submodule("score")
    score.register_parameter("weight", nn.Parameter(weights["router"].detach()))
    linear = linear_of(weights["linear"])
    owned = {"router": score.get_parameter("weight"), "lora_a": bank.lora_a, "lora_b": bank.lora_b}

    def run(index: int) -> Tensor:
        return layer(inputs.batches[index]["x"].unsqueeze(0), linear).squeeze(0)

    return Bound(run, lambda index: {**owned, "x": inputs.batches[index]["x"]})


def linear_of(weight: Tensor) -> nn.Linear:
    """A frozen linear around a weight."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear


def peft_lora(inputs: Inputs) -> Bound:
    """Bind PEFT's LoRA of rank E * R over the same linear."""
    weights = inputs.weights
    rank = weights["lora_a"].shape[0]
    config = LoraConfig(r=rank, lora_alpha=int(SCALING * rank), target_modules=["linear"])
    host = nn.ModuleDict({"linear": linear_of(weights["linear"])})
    layer = get_peft_model(host, config, autocast_adapter_dtype=False).base_model.model["linear"]
    owned = {name: nn.Parameter(weights[name].detach().clone()) for name in ("lora_a", "lora_b")}
    layer.lora_A["default"].weight = owned["lora_a"]
    layer.lora_B["default"].weight = owned["lora_b"]
    layer.to(weights["linear"].device)
    return Bound(
        lambda index: layer(inputs.batches[index]["x"]),
        lambda index: {**owned, "x": inputs.batches[index]["x"]},
    )


def masked_loop(weights: Tensors, batch: Tensors) -> Tensor:
    """The same router, then every expert over its own tokens."""
    x = batch["x"]
    base = F.linear(x, weights["linear"])
    return lora_baselines.masked_loop(base, x, *stacks(weights), *routed(weights, x), SCALING)


def layer_work(mode: str, shape_name: str, tokens: int) -> tuple[Pass, ...]:
    """That of the op; the router's product is a hundredth of it."""
    return work(mode, shape_name, tokens)


BENCHMARK = Benchmark(
    name="lora_mixture",
    cases=default_cases,
    shape_names=MIXTURE_NAMES,
    make_inputs=make_inputs,
    reference=plainly(reference),
    work=layer_work,
    providers=(
        Provider("moeroute", moeroute_layer, peer=False),
        Provider("masked_loop", plainly(masked_loop)),
        Provider("peft_lora", peft_lora, peer=False, checked=False),
    ),
)
