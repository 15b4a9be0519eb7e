"""What routers read of a sample as a whole: its task, its mean token.

Axes: B samples, S tokens of a sample, T = B * S, H hidden, E experts, D width of an embedding.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from moeroute.ops.task_ids import check_task_range
from moeroute.types import RouterInput, RouterOutput


def require_task_ids(router_input: RouterInput, num_tasks: int, who: str) -> Tensor:
    """The task of each sample.

    Args:
        router_input: Must hold task_ids.
        num_tasks: How many tasks there are.
        who: Named in errors.

    Returns:
        (B,) int64 in [0, num_tasks).

    Raises:
        ValueError: No task_ids, another rank, or an id out of range (on a GPU: a device assertion).
    """
    task_ids = router_input.task_ids
    if task_ids is None:
        raise ValueError(
            f"{who} routes by task but got no task_ids. Call model(..., task_ids=ids) with one id "
            "a sample, or open `with moeroute.routing_inputs(model, task_ids=ids):`. Trainer drops "
            "the column unless remove_unused_columns=False; a model that PeftModel.from_pretrained "
            "made takes the argument after moeroute.accept_routing_inputs(model)"
        )
    if task_ids.ndim != 1 or task_ids.is_floating_point():
        raise ValueError(
            f"{who}: task_ids is {tuple(task_ids.shape)} {task_ids.dtype}; give one integer a "
            "sample"
        )
    check_task_range(task_ids, num_tasks, who)
    return task_ids.to(router_input.hidden_states.device, torch.int64)


def sample_means(router_input: RouterInput) -> Tensor:
    """The mean of each sample's real tokens.

    Returns:
        (B, H) float32, or float64; zeros for a sample without real tokens.
    """
    tokens = router_input.hidden_states
    wide = tokens.to(torch.promote_types(tokens.dtype, torch.float32))
    grid = wide.unflatten(0, router_input.sequence_shape)  # (B, S, H)
    mask = router_input.token_mask
    if mask is None:
        return grid.sum(1) / max(router_input.sequence_shape[1], 1)
    real = mask.reshape(router_input.sequence_shape).unsqueeze(2)
    return grid.masked_fill(~real, 0.0).sum(1) / real.sum(1).clamp(min=1)


def to_tokens(values: Tensor, sequence_shape: tuple[int, int]) -> Tensor:
    """(B, ...) one row a sample to (T, ...) one row a token."""
    return values.repeat_interleave(sequence_shape[1], dim=0)


def output_to_tokens(output: RouterOutput, sequence_shape: tuple[int, int]) -> RouterOutput:
    """A routing of B samples as one of their T tokens; what a subclass adds stays one a sample."""
    return replace(
        output,
        router_logits=to_tokens(output.router_logits, sequence_shape),
        routing_weights=to_tokens(output.routing_weights, sequence_shape),
        selected_experts=to_tokens(output.selected_experts, sequence_shape),
        max_assignments=None,
        state=None,
    )
