"""What is handed to Liger and ScatterMoE is what their functions say they take.

Both need a GPU; here stand-ins with the same signatures, in plain torch, take their places.
"""

import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.kernel_peers import dense_gemm, liger, scattermoe, skip_liger
from benchmarks.measure import error_of, step
from benchmarks.routed_mlp import BENCHMARK
from benchmarks.running import prepare
from benchmarks.shapes import expert_shape


def case(shape: str) -> Case:
    return Case("routed_mlp", "fwd_bwd", shape, 5, "fp32", "uniform", "cpu")


class FusedMoE:
    """`LigerFusedMoEFunction`: x (T, H), gate_up (E, 2I, H), down (E, H, I), int32 ids, weights."""

    @staticmethod
    def apply(x: Tensor, gate_up: Tensor, down: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        assert ids.dtype == torch.int32
        gate, up = torch.einsum("tkoh,th->tko", gate_up[ids], x).chunk(2, -1)
        rows = torch.einsum("tkhi,tki->tkh", down[ids], torch.nn.functional.silu(gate) * up)
        return (rows * weights.unsqueeze(2)).sum(1)


def flatten_sort_count(ids: Tensor, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """`scattermoe`'s: sorted ids, where each came from, and the experts' ends."""
    ordered, order = ids.flatten().sort()
    return ordered, order, ids.flatten().bincount(minlength=num_experts).cumsum(0)


def parallel_linear(
    inputs: Tensor,
    expert_weights: Tensor,
    k: int,
    sorted_expert_idxs: Tensor,
    sorted_scattered_idxs: Tensor,
    expert_offsets: Tensor,
    expert_biases: Tensor | None = None,
    gates: Tensor | None = None,
    grouped_in: bool = False,
    grouped_out: bool = False,
) -> Tensor:
    """`scattermoe`'s: rows through (E, in, out), grouped or scattered at either end."""
    assert expert_offsets[-1] == len(sorted_expert_idxs)
    rows = inputs if grouped_in else inputs[sorted_scattered_idxs // k]
    found = torch.einsum("ni,nio->no", rows, expert_weights[sorted_expert_idxs])
    if expert_biases is not None:
        found = found + expert_biases[sorted_expert_idxs]
    if grouped_out:
        return found
    scattered = torch.zeros_like(found).index_copy(0, sorted_scattered_idxs, found)
    if gates is None:
        return scattered
    return (gates.unsqueeze(1) @ scattered.unflatten(0, gates.shape)).squeeze(1)


def stand_in(monkeypatch: pytest.MonkeyPatch, name: str, **members: Any) -> None:
    module = ModuleType(name)
    for key, value in members.items():
        setattr(module, key, value)
    monkeypatch.setitem(sys.modules, name, module)


def error_at(bind: Any, shape: str) -> float:
    prepared = prepare(BENCHMARK, case(shape))
    return error_of(step(bind(prepared.inputs), prepared.inputs, 0, "fwd_bwd"), prepared.wanted)


def test_ligers_function(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "liger_kernel", ModuleType("liger_kernel"))
    monkeypatch.setitem(sys.modules, "liger_kernel.ops", ModuleType("liger_kernel.ops"))
    stand_in(monkeypatch, "liger_kernel.ops.fused_moe", LigerFusedMoEFunction=FusedMoE)
    assert error_at(liger, "tiny") < 1e-6


@pytest.mark.parametrize("shape", ["tiny", "tiny-gpt-oss"])
def test_scattermoes_functions(monkeypatch: pytest.MonkeyPatch, shape: str):
    functions = {"flatten_sort_count": flatten_sort_count, "parallel_linear": parallel_linear}
    stand_in(monkeypatch, "scattermoe", **functions)
    assert error_at(scattermoe, shape) < 1e-6


def test_what_liger_cannot_and_what_takes_too_long(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("benchmarks.kernel_peers.find_spec", lambda name: name)
    assert skip_liger(case("tiny-gpt-oss")) == "SwiGLU without bias only"
    assert "qwen3-30b-a3b alone" in skip_liger(case("olmoe-1b-7b"))
    assert skip_liger(case("qwen3-30b-a3b")) == skip_liger(case("64x32-E4k2")) == ""


def test_what_is_not_installed_says_so(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("benchmarks.kernel_peers.find_spec", lambda name: None)
    skips = {one.name: one.skip(case("tiny")) for one in BENCHMARK.providers}
    assert skips["liger"] == skips["scattermoe"] == "not installed"
    assert skips["hand_sorted"] == ""


def test_one_product_multiplies_as_much():
    inputs, shape = BENCHMARK.make_inputs(case("tiny")), expert_shape("tiny")
    bound = dense_gemm(inputs)
    rows, columns = bound.run(0).shape
    both = sum(one.operations for one in BENCHMARK.work("fwd", "tiny", 5))
    assert 2 * rows * columns * shape.hidden_size == both
    output, *gradients = step(bound, inputs, 0, "fwd_bwd")
    assert len(gradients) == 2
    assert output.shape == (5 * shape.top_k, 3 * shape.intermediate_size)
