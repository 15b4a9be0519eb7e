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
from benchmarks.run import reference_answer
from benchmarks.shapes import DTYPES, ROUTINGS

SMALL = {"routed_mlp": "tiny", "gated_lora": "E4k2r8"}
CHECKED = [
    pytest.param(name, provider, id=f"{name}-{provider.name}")
    for name, benchmark in BENCHMARKS.items()
    for provider in benchmark.providers
    if provider.checked
]


def small_case(op: str, mode: str, dtype: str, routing: str = "uniform") -> Case:
    return Case(op, mode, SMALL[op], 5, dtype, routing, "cpu")


def test_every_benchmark_is_tested_here():
    assert set(BENCHMARKS) == set(SMALL)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("mode", ["fwd", "fwd_bwd"])
@pytest.mark.parametrize(("op", "provider"), CHECKED)
def test_a_provider_agrees_with_the_reference(op: str, provider: Provider, mode: str, dtype: str):
    case = small_case(op, mode, dtype)
    inputs = BENCHMARKS[op].make_inputs(case)
    wanted = reference_answer(BENCHMARKS[op], case, inputs)
    found = step(provider.bind(inputs), inputs, 0, mode)
    assert len(found) == (1 if mode == "fwd" else 1 + len(inputs.leaves(0)))
    assert error_of(found, wanted) <= MAX_ERROR[dtype]


@pytest.mark.parametrize("routing", ROUTINGS)
def test_the_loop_is_the_kernels_reference(routing: str):
    inputs = ROUTED_MLP.make_inputs(small_case("routed_mlp", "fwd_bwd", "fp32", routing))
    weights, batch = inputs.weights, inputs.batches[0]
    leaves = list(inputs.leaves(0).values())
    loop = ROUTED_MLP.reference(weights, batch)
    definition = moeroute_kernels.reference.routed_mlp(
        batch["x"],
        weights["gate_up"],
        weights["down"],
        batch["selected_experts"],
        batch["routing_weights"],
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
        "routed_mlp": {"eager", "batched_mm", "grouped_mm"},
        "gated_lora": {"naive_loop", "masked_loop", "grouped", "dense_stacked"},
    }


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
