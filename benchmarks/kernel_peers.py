"""The routed MLP by other means that a GPU has: torch's own grouped product, Liger, ScatterMoE.

The last two are used through their public functions where they are installed, with our weight
tensors; what they cannot compute is skipped with the reason.

Axes: T tokens, K slots per token, N = T * K rows, H hidden, I intermediate, E experts.
"""

from __future__ import annotations

from importlib import import_module
from importlib.util import find_spec

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.cases import Bound, Case, Inputs, Provider
from benchmarks.shapes import GPU_JUDGED_SHAPE, GPU_SHAPES, expert_shape

__all__ = ["KERNEL_PEERS", "dense_gemm", "hand_sorted", "liger", "scattermoe"]


def hand_sorted(inputs: Inputs) -> Bound:
    """Bind a sort, two calls of `F.grouped_mm` and a sum of slots, in plain autograd torch."""
    form, weights = inputs.form, inputs.weights
    gate_up, down = (matrix.transpose(1, 2) for matrix in form.matrices(weights))
    experts = torch.arange(gate_up.shape[0], device=gate_up.device)

    def run(index: int) -> Tensor:
        batch = inputs.batches[index]
        ids, x = batch["selected_experts"], batch["x"]
        ordered, order = ids.reshape(-1).sort(stable=True)
        ends = torch.searchsorted(ordered, experts, right=True, out_int32=True)
        pre = F.grouped_mm(x.index_select(0, order // ids.shape[1]), gate_up, offs=ends)
        if form.biased:
            pre = pre + weights["gate_up_bias"].index_select(0, ordered)
        rows = F.grouped_mm(form.glu(pre), down, offs=ends)
        if form.biased:
            rows = rows + weights["down_bias"].index_select(0, ordered)
        places = torch.arange(len(order), device=order.device)
        inverse = torch.empty_like(order).scatter_(0, order, places)
        slots = rows.index_select(0, inverse).unflatten(0, ids.shape)
        return (batch["routing_weights"].to(x.dtype).unsqueeze(1) @ slots).squeeze(1)

    return Bound(run, inputs.leaves)


def liger(inputs: Inputs) -> Bound:
    """Bind Liger's fused MoE, with the weights and types that its own layer gives it."""
    function = import_module("liger_kernel.ops.fused_moe").LigerFusedMoEFunction
    gate_up, down = inputs.form.matrices(inputs.weights)

    def run(index: int) -> Tensor:
        batch = inputs.batches[index]
        ids = batch["selected_experts"].to(torch.int32)
        return function.apply(batch["x"], gate_up, down, ids, batch["routing_weights"])

    return Bound(run, inputs.leaves)


def scattermoe(inputs: Inputs) -> Bound:
    """Bind ScatterMoE's two parallel linears, as its gated MLP calls them."""
    library, form, weights = import_module("scattermoe"), inputs.form, inputs.weights
    gate_up, down = (matrix.transpose(1, 2) for matrix in form.matrices(weights))

    def run(index: int) -> Tensor:
        batch = inputs.batches[index]
        ids, x = batch["selected_experts"], batch["x"]
        ordered = library.flatten_sort_count(ids, num_experts=gate_up.shape[0])
        pre = library.parallel_linear(
            x,
            gate_up,
            ids.shape[1],
            *ordered,
            expert_biases=weights.get("gate_up_bias"),
            grouped_out=True,
        )
        return library.parallel_linear(
            form.glu(pre),
            down,
            1,
            *ordered,
            expert_biases=weights.get("down_bias"),
            gates=batch["routing_weights"].to(x.dtype),
            grouped_in=True,
        )

    return Bound(run, inputs.leaves)


def dense_gemm(inputs: Inputs) -> Bound:
    """Bind one product of the same multiplications: (N, H) times (H, 3I), nothing else."""
    (gate_up, down), x = inputs.form.matrices(inputs.weights), inputs.batches[0]["x"]
    slots = inputs.batches[0]["selected_experts"].shape[1]
    with torch.no_grad():
        weight = torch.cat((gate_up[0], down[0].t())).contiguous().requires_grad_()
        rows = [batch["x"].repeat(slots, 1).requires_grad_() for batch in inputs.batches]
        gradient = torch.randn((len(rows[0]), len(weight)), dtype=x.dtype, device=x.device)
    return Bound(
        lambda index: F.linear(rows[index], weight),
        lambda index: {"x": rows[index], "weight": weight},
        gradient,
    )


def skip_liger(case: Case) -> str:
    """Where Liger is missing, cannot, or would tune itself for longer than the suite may take."""
    if expert_shape(case.shape_name).form.biased:
        return "SwiGLU without bias only"
    if case.shape_name in GPU_SHAPES and case.shape_name != GPU_JUDGED_SHAPE:
        return f"tries some 200 tilings per layer, which takes minutes: {GPU_JUDGED_SHAPE} alone"
    return _missing("liger_kernel")


def _missing(package: str) -> str:
    return "" if find_spec(package) else "not installed"


KERNEL_PEERS = (
    Provider("hand_sorted", hand_sorted, only_on="cuda"),
    Provider("liger", liger, skip=skip_liger, only_on="cuda"),
    Provider("scattermoe", scattermoe, skip=lambda _: _missing("scattermoe"), only_on="cuda"),
    Provider("gemm", dense_gemm, peer=False, checked=False, only_on="cuda"),
)
"""Rows of a CUDA device alone."""
