"""What a decoder layer did, in the words that every routed layer speaks: actions for experts."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from moeroute.depth_types import DepthOutput, DepthRecord
from moeroute.types import RouterOutput

if TYPE_CHECKING:
    from moeroute.routing_pass import RoutingPass

LEAST_ACTIONS = 3


def depth_record(
    routing_pass: RoutingPass,
    hidden_states: Tensor,
    executions: Tensor,
    *,
    site: str,
    layer_index: int,
    depth: DepthOutput | None = None,
) -> DepthRecord:
    """The record of one call.

    Args:
        routing_pass: What knows the call's mask.
        hidden_states: (B, S, H) input of the layer.
        executions: (B,) or (B, S) int64, how often the layer ran.
        site: Full module name of the layer.
        layer_index: Its place among the decoder layers.
        depth: What the router said, if it was asked.
    """
    shape = hidden_states.shape[:2]
    tokens = _by_token(executions, shape)
    weights = torch.ones(tokens.shape, device=tokens.device)
    if depth is not None and depth.routing_weights is not None:
        weights = depth.routing_weights.detach().float().reshape(-1)
    return DepthRecord(
        site=site,
        layer_index=layer_index,
        routing=RouterOutput(
            router_logits=_logits(depth, tokens, shape),
            routing_weights=weights[:, None],
            selected_experts=tokens[:, None],
        ),
        token_mask=routing_pass.mask_of(shape.numel()),
        sequence_shape=(shape[0], shape[1]),
        depth=depth,
    )


def _by_token(values: Tensor, shape: torch.Size) -> Tensor:
    """(T,) of what is (B,) for sequences or (B, S) for tokens."""
    return values.reshape(shape[0], -1).expand(*shape).reshape(-1)


def _logits(depth: DepthOutput | None, tokens: Tensor, shape: torch.Size) -> Tensor:
    """(T, A); without a router's answer those of a certain decision."""
    if depth is not None:
        logits = depth.router_logits
        if depth.num_executions.ndim == 1:
            logits = logits[:, None].expand(-1, shape[1], -1)
        return logits.reshape(-1, logits.shape[-1])
    actions = max(LEAST_ACTIONS, int(tokens.max()) + 1 if tokens.numel() else 0)
    certain = torch.full((tokens.shape[0], actions), -torch.inf, device=tokens.device)
    return certain.scatter(1, tokens[:, None], 0.0)
