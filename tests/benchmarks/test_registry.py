"""Every provider of every benchmark computes the op that it is timed as."""

from dataclasses import replace

import pytest
import torch

import moeroute_kernels
from benchmarks.cases import Case, Provider
from benchmarks.floors import MAX_ERROR
from benchmarks.measure import error_of, step
from benchmarks.registry import BENCHMARKS
from benchmarks.routed_mlp import BENCHMARK as ROUTED_MLP
from benchmarks.running import reference_answer
from benchmarks.shapes import DTYPES, ROUTINGS

SMALL = {
    "routed_mlp": ("tiny", "tiny-gpt-oss"),
    "gated_lora": ("E4k2r8",),
    "lora_mixture": ("E8k2r16",),
    "grouped_lora": ("tiny-r2", "tiny-r2a3"),
    "expert_lora": ("tiny-r2",),
    "depth": ("tiny-half", "tiny-all"),
    "router": ("tiny-gate", "deepseek_v3-E64k8", "gpt_oss-E64k8"),
}
THREE = ("eager", "batched_mm", "grouped_mm")
NEED_A_DEVICE = ("liger", "scattermoe")


def small_case(op: str, mode: str, dtype: str, routing: str = "uniform", place: int = 0) -> Case:
    return Case(op, mode, SMALL[op][place], 5, dtype, routing, "cpu")


CHECKED = [
    pytest.param(name, place, provider, id=f"{shape}-{provider.name}")
    for name, shapes in SMALL.items()
    for place, shape in enumerate(shapes)
    for provider in BENCHMARKS[name].providers
    if provider.checked
    and provider.name not in NEED_A_DEVICE
    and not provider.skip(small_case(name, "fwd", "fp32", place=place))
]


def test_every_benchmark_is_tested_here():
    assert set(BENCHMARKS) == set(SMALL)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["fwd", "fwd_bwd"])
@pytest.mark.parametrize(("op", "place", "provider"), CHECKED)
def test_a_provider_agrees_with_the_reference(
    op: str, place: int, provider: Provider, mode: str, dtype: str
):
    case = small_case(op, mode, dtype, place=place)
    if mode not in {timed.mode for timed in BENCHMARKS[op].cases("cpu")} | {"fwd"}:
        pytest.skip(f"{op} is timed forward alone")
    inputs = BENCHMARKS[op].make_inputs(case)
    wanted = reference_answer(BENCHMARKS[op], case, inputs)
    found = step(provider.bind(inputs), inputs, 0, mode)
    assert len(found) == (1 if mode == "fwd" else 1 + len(inputs.leaves(0)))
    assert error_of(found, wanted) <= MAX_ERROR[dtype]


@pytest.mark.parametrize("place", [0, 1], ids=SMALL["routed_mlp"])
@pytest.mark.parametrize("routing", ROUTINGS)
def test_the_loop_is_the_kernels_reference(routing: str, place: int):
    case = small_case("routed_mlp", "fwd_bwd", "fp32", routing, place)
    inputs = ROUTED_MLP.make_inputs(case)
    weights, batch, form = inputs.weights, inputs.batches[0], inputs.form
    leaves = list(inputs.leaves(0).values())
    loop = ROUTED_MLP.reference(inputs).run(0)
    definition = moeroute_kernels.reference.routed_mlp(
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
    found, wanted = (
        [out.detach(), *torch.autograd.grad(out, leaves, inputs.gradients[0])]
        for out in (loop, definition)
    )
    assert error_of(found, wanted) <= 1e-6


def test_the_peers_are_those_of_the_promise():
    peers = {
        name: {provider.name for provider in benchmark.providers if provider.peer}
        for name, benchmark in BENCHMARKS.items()
    }
    assert peers == {
        "routed_mlp": {*THREE, "hand_sorted", "liger", "scattermoe"},
        "gated_lora": {"naive_loop", "masked_loop", "grouped", "dense_stacked"},
        "lora_mixture": {"masked_loop"},
        "grouped_lora": {"rebuilt", "masked_loop"},
        "expert_lora": {"peft"},
        "depth": {"pruned"},
        "router": {"transformers"},
    }


def test_on_a_cpu_the_peers_are_transformers_three():
    cpu = {one.name for one in ROUTED_MLP.providers if one.peer and one.runs_on("cpu")}
    assert cpu == set(THREE)
    assert all(provider.runs_on("cuda:0") for provider in ROUTED_MLP.providers)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_the_defaults_can_be_made(name: str):
    benchmark = BENCHMARKS[name]
    cases = benchmark.cases("cpu")
    assert len(set(cases)) == len(cases)
    assert {case.shape_name for case in cases} <= set(benchmark.shape_names)
    assert {case.op for case in cases} == {name}


def test_the_dense_line_multiplies_as_much():
    case = small_case("routed_mlp", "fwd", "fp32")
    inputs = ROUTED_MLP.make_inputs(case)
    (dense,) = [provider for provider in ROUTED_MLP.providers if provider.name == "dense"]
    slots = inputs.batches[0]["selected_experts"].shape[1]
    numbers = sum(
        leaf.numel() for name, leaf in dense.bind(inputs).leaves(0).items() if name != "x"
    )
    stacks = inputs.weights["gate_up"], inputs.weights["down"]
    assert numbers == slots * sum(stack[0].numel() for stack in stacks)


def test_hopeless_peers_are_skipped_with_a_reason():
    providers = {provider.name: provider for provider in ROUTED_MLP.providers}
    small = Case("routed_mlp", "fwd_bwd", "E64k8", 16, "fp32", "uniform", "cpu")
    assert providers["batched_mm"].skip(small) == ""
    assert providers["eager"].skip(small) == ""
    large = replace(small, shape_name="E128k8", tokens=1024)
    assert "copies 8192 experts" in providers["batched_mm"].skip(large)
    assert "48 GiB" in providers["eager"].skip(large)
    assert providers["eager"].skip(replace(large, mode="fwd")) == ""
    assert providers["grouped_mm"].skip(large) == ""
