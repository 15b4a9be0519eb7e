"""The kernels of CUDA devices under the ops' names; Triton is imported at the first call.

float64, which no Triton kernel takes, and a torch without Triton run the ops' plain torch: right,
but slow. The latter says so once.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from moeroute_kernels import lora_dense
from moeroute_kernels.combine import plain_combine, plain_combine_backward
from moeroute_kernels.cpu_routed_mlp import Form, Saved, Weights
from moeroute_kernels.cpu_routed_mlp_backward import Needs
from moeroute_kernels.expert_sort import sort_slots
from moeroute_kernels.gated_lora import backward_in, plain_backward, plain_forward
from moeroute_kernels.grouped_mm import plain_grouped_mm, plain_grouped_mm_backward
from moeroute_kernels.lora_form import runs_dense
from moeroute_kernels.routed_mlp import (
    plain_routed_mlp,
    plain_routed_mlp_backward,
    saved_storage,
)

__all__ = ["KERNELS"]

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
"""What the Triton kernels compute in."""


def _takes(*tensors: Tensor) -> bool:
    """Tell whether the Triton kernels can take these tensors."""
    return all(tensor.dtype in DTYPES for tensor in tensors) and _has_triton()


def _has_triton() -> bool:
    found = importlib.util.find_spec("triton") is not None
    if not found:
        warnings.warn(
            "moeroute: this torch comes without Triton, so the ops run as plain torch, which is "
            "right but slow; install `triton` (pip install 'moeroute[triton]')",
            stacklevel=2,
        )
    return found


def _expert_sort(ids: Tensor, num_groups: int) -> tuple[Tensor, Tensor, Tensor]:
    if not _has_triton():
        return sort_slots(ids, num_groups)
    from moeroute_kernels._triton import sort

    return sort.sort_slots(ids, num_groups)


def _grouped_mm(x: Tensor, weight: Tensor, ends: Tensor, bias: Tensor | None) -> Tensor:
    if not _takes(x):
        return plain_grouped_mm(x, weight, ends, bias)
    from moeroute_kernels._triton import grouped_mm as device

    return device.forward(x, weight, ends, bias)


def _grouped_mm_backward(
    gradient: Tensor,
    x: Tensor,
    weight: Tensor,
    ends: Tensor,
    bias: Tensor | None,
    needs: list[bool],
) -> list[Tensor]:
    if not _takes(x):
        return plain_grouped_mm_backward(gradient, x, weight, ends, bias, needs)
    from moeroute_kernels._triton import grouped_mm as device

    return device.backward(gradient, x, weight, ends, bias, needs)


def _combine(rows: Tensor, routing_weights: Tensor, inverse: Tensor, ends: Tensor) -> Tensor:
    if not _takes(rows, routing_weights):
        return plain_combine(rows, routing_weights, inverse, ends)
    from moeroute_kernels._triton import combine as device
    from moeroute_kernels._triton.routed_mlp import row_major

    scale = routing_weights.contiguous()
    return device.combine(row_major(rows), inverse, ends, scale.shape[0], scale=scale)


def _combine_backward(
    gradient: Tensor,
    rows: Tensor,
    routing_weights: Tensor,
    inverse: Tensor,
    ends: Tensor,
    needs: list[bool],
) -> list[Tensor]:
    inputs = (gradient, rows, routing_weights, inverse, ends, needs)
    if not _takes(rows, routing_weights):
        return plain_combine_backward(*inputs)
    from moeroute_kernels._triton import combine as device
    from moeroute_kernels._triton.routed_mlp import row_major

    return device.combine_backward(
        row_major(gradient), row_major(rows), routing_weights.contiguous(), inverse, ends, needs
    )


def _routed_mlp(
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    selected_experts: Tensor,
    routing_weights: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    *form_and_keep: Any,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    inputs = (x, gate_up, down, selected_experts, routing_weights, gate_up_bias, down_bias)
    if not _takes(x):
        return plain_routed_mlp(*inputs, *form_and_keep)
    from moeroute_kernels._triton import routed_mlp as device

    *form, keep = form_and_keep
    weights = Weights(gate_up, down, gate_up_bias, down_bias)
    given = (x, weights, selected_experts, routing_weights, Form(*form))
    if not keep:
        return device.infer(*given), *saved_storage(x, gate_up, 0, 0)
    out, saved = device.forward(*given)
    return out, saved.pre, saved.order, saved.expert_offsets


def _routed_mlp_backward(
    gradient: Tensor,
    x: Tensor,
    gate_up: Tensor,
    down: Tensor,
    routing_weights: Tensor,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    pre: Tensor,
    order: Tensor,
    expert_offsets: Tensor,
    *form_and_needs: Any,
) -> list[Tensor]:
    weights = Weights(gate_up, down, gate_up_bias, down_bias)
    saved = Saved(pre, order, expert_offsets)
    if not _takes(x):
        inputs = (gradient, x, gate_up, down, routing_weights, gate_up_bias, down_bias)
        return plain_routed_mlp_backward(*inputs, pre, order, expert_offsets, *form_and_needs)
    from moeroute_kernels._triton import routed_mlp as device

    *form, needs = form_and_needs
    return device.backward(gradient, x, weights, routing_weights, saved, Form(*form), Needs(*needs))


def _gated_lora(
    base: Tensor,
    x: Tensor,
    lora_a: Tensor,
    lora_b: Tensor,
    ids: Tensor,
    weights: Tensor,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor]:
    inputs = (base, x, lora_a, lora_b, ids, weights, scaling)
    if not _takes(base, lora_a, weights):
        return plain_forward(*inputs)
    if runs_dense(lora_a, ids):
        return lora_dense.forward(*inputs, lora_a.dtype)
    from moeroute_kernels._triton import lora

    return lora.forward(*inputs, lora_a.dtype)


def _gated_lora_backward(*inputs: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    gradient, _, _, _, lora_a, _, ids, weights, *_ = inputs
    if not _takes(gradient, lora_a, weights) or runs_dense(lora_a, ids):
        return plain_backward(*inputs)
    from moeroute_kernels._triton import lora

    return backward_in(lora, *inputs)


KERNELS: Mapping[str, Callable[..., Any]] = {
    "expert_sort": _expert_sort,
    "grouped_mm": _grouped_mm,
    "grouped_mm_backward": _grouped_mm_backward,
    "combine": _combine,
    "combine_backward": _combine_backward,
    "routed_mlp": _routed_mlp,
    "routed_mlp_backward": _routed_mlp_backward,
    "gated_lora": _gated_lora,
    "gated_lora_backward": _gated_lora_backward,
}
"""By the op's name in the namespace "moeroute"."""

for _name, _kernel in KERNELS.items():
    torch.library.impl(f"moeroute::{_name}", "cuda", _kernel)
