"""The routed MLP on the device: two products forward, four backward, nothing gathered into memory.

The same sums as `moeroute_kernels.cpu_routed_mlp`, and the same tensors kept for backward. Where
nothing is kept, very few slots are not even sorted: three launches.

Axes: T tokens, K slots per token, N = T * K rows, E experts, H hidden, I intermediate.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from moeroute_kernels._triton import config
from moeroute_kernels._triton.combine import combine
from moeroute_kernels._triton.form import device_form
from moeroute_kernels._triton.mlp_inner import mlp_inner
from moeroute_kernels._triton.mlp_up import mlp_up
from moeroute_kernels._triton.rows import mm_rows, tiles_for
from moeroute_kernels._triton.sort import sort_and_tile
from moeroute_kernels._triton.source import comes_whole
from moeroute_kernels._triton.tiles import TileMap, slot_tiles
from moeroute_kernels._triton.weights import longest_first, mm_weights, sum_rows
from moeroute_kernels.cpu_routed_mlp import Form, Saved, Weights
from moeroute_kernels.cpu_routed_mlp_backward import Needs
from moeroute_kernels.expert_sort import invert
from moeroute_kernels.grouped_mm import empty_weight


def row_major(tensor: Tensor) -> Tensor:
    """The matrix with a last stride of 1; copied only if it has another."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def row_major_or_none(tensor: Tensor | None) -> Tensor | None:
    """Do as `row_major`; None stays None."""
    return None if tensor is None else row_major(tensor)


@dataclass(frozen=True, slots=True)
class Plan:
    """Where the slots' rows lie.

    Attributes:
        order: (N,) int64, the flat slot of each row; None if rows are slots.
        inverse: (N,) int64, the row of each flat slot; None with order.
        tiles: Which rows are whose.
    """

    order: Tensor | None
    inverse: Tensor | None
    tiles: TileMap


def forward(
    x: Tensor, weights: Weights, ids: Tensor, routing_weights: Tensor, form: Form
) -> tuple[Tensor, Saved]:
    """Compute the MLP; see `moeroute_kernels.cpu_routed_mlp.forward`.

    Args:
        x: (T, H).
        weights: The experts.
        ids: (T, K).
        routing_weights: (T, K).
        form: The kind of MLP.

    Returns:
        (T, H) in the dtype of x, and what `backward` needs.
    """
    num_experts = weights.gate_up.shape[0]
    block_rows = config.block_rows(ids.numel(), num_experts, x.dtype)
    order, inverse, ends, tiles = sort_and_tile(ids, num_experts, block_rows)
    out, pre = _through(x, weights, routing_weights, form, Plan(order, inverse, tiles), keep=True)
    return out, Saved(pre, order, ends)


def infer(x: Tensor, weights: Weights, ids: Tensor, routing_weights: Tensor, form: Form) -> Tensor:
    """Compute the MLP and keep nothing; arguments and result as in `forward`."""
    num_experts = weights.gate_up.shape[0]
    block_rows = config.block_rows(ids.numel(), num_experts, x.dtype)
    if config.sorting_pays(ids, num_experts):
        order, inverse, _, tiles = sort_and_tile(ids, num_experts, block_rows)
        plan = Plan(order, inverse, tiles)
    else:
        plan = Plan(None, None, slot_tiles(ids, block_rows))
    return _through(x, weights, routing_weights, form, plan, keep=False)[0]


def _through(
    x: Tensor, weights: Weights, routing_weights: Tensor, form: Form, plan: Plan, *, keep: bool
) -> tuple[Tensor, Tensor]:
    """Both products and the sum: the output, and the pre-activation if it is to be kept."""
    scale = routing_weights.contiguous()
    pre, activated = mlp_up(
        row_major(x),
        weights.gate_up,
        row_major_or_none(weights.gate_up_bias),
        scale,
        plan.order,
        plan.tiles,
        device_form(form),
        keep=keep,
    )
    bias = row_major_or_none(weights.down_bias)
    rows = mm_rows(
        activated,
        weights.down,
        plan.tiles,
        num_rows=activated.shape[0],
        bias=bias,
        scale=None if bias is None else scale,
        order=plan.order,
        kind="rows" if keep or not comes_whole(weights.down) else "inference down",
    )
    return combine(rows, plan.inverse, plan.tiles.ends, x.shape[0]), pre


def backward(
    gradient: Tensor,
    x: Tensor,
    weights: Weights,
    routing_weights: Tensor,
    saved: Saved,
    form: Form,
    needs: Needs,
) -> list[Tensor]:
    """Compute the wanted gradients; see `moeroute_kernels.cpu_routed_mlp_backward.backward`."""
    order, ends = saved.order, saved.expert_offsets
    num_rows, slots = order.shape[0], routing_weights.shape[1]
    x, gradient, scale = row_major(x), row_major(gradient), routing_weights.contiguous()
    tiles = tiles_for(ends, num_rows, x.dtype)
    wants = (needs.down, needs.pre, needs.routing_weights)
    activated, dpre, dots = mlp_inner(
        gradient,
        weights.down,
        row_major_or_none(weights.down_bias),
        scale,
        saved.pre,
        order,
        tiles,
        device_form(form),
        wants,
    )
    results = []
    if needs.x:
        rows = mm_rows(dpre, weights.gate_up.transpose(1, 2), tiles, num_rows=num_rows)
        results.append(combine(rows, invert(order), ends, x.shape[0]))
    if needs.gate_up or needs.down:
        turns = longest_first(ends)
        where = {"index": order, "slots": slots}
        if needs.gate_up:
            out = empty_weight(weights.gate_up)
            results.append(mm_weights(dpre, x, ends, turns, out, gather="right", **where))
        if needs.down:
            out = empty_weight(weights.down)
            results.append(
                mm_weights(gradient, activated, ends, turns, out, gather="left", **where)
            )
    if needs.routing_weights:
        results.append(dots.to(routing_weights.dtype))
    if needs.gate_up_bias and weights.gate_up_bias is not None:
        results.append(sum_rows(dpre, ends, weights.gate_up_bias))
    if needs.down_bias and weights.down_bias is not None:
        results.append(
            sum_rows(gradient, ends, weights.down_bias, index=order, slots=slots, scale=scale)
        )
    return results
