"""DeepSeek-V3's balance loss within every sample.

    L = mean over samples of E * sum_e f_e P_e
    f_e = share of the sample's highest-k probabilities that are expert e's,  P_e = mean of p_e

Source: DeepSeek-V3 Technical Report, DeepSeek-AI, 2024, arXiv 2412.19437, equations 17-20. Its
alpha is 1e-4. Differences from the paper: none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from moeroute.losses.masked import real_tokens_only
from moeroute.losses.samples import sample_shape
from moeroute.ops.probs import normalized_sigmoid_probs
from moeroute.types import RoutingRecord


@dataclass(frozen=True, kw_only=True, slots=True)
class SequenceBalanceLoss:
    """Keeps the experts of every single sample from being overrun.

    1 where every sample is in perfect balance, E / K where all tokens of a sample are sure of the
    same K experts; 0 without real tokens. What counts as load is what the probabilities alone would
    choose, as many experts as the router has slots, without the router's selection bias or groups.
    The gradient flows through P alone. Padding is left out; samples of padding alone do not count.

    Args:
        weight: Coefficient in the total, which takes the mean over the layers that ask for it.
        probs: Logits to probabilities whose rows sum to 1; for softmax routers
            `moeroute.routers.softmax_probs`.

    Shapes:
        router_logits: (B * S, E); the loss is a scalar in their dtype.

    Raises:
        ValueError: The layer was not told samples from tokens.
    """

    weight: float = 1e-4
    probs: Callable[[Tensor], Tensor] = field(default=normalized_sigmoid_probs, repr=False)

    def __call__(self, record: RoutingRecord) -> Tensor:
        """The loss of one layer: a scalar, unweighted."""
        samples, length = sample_shape(record, self)
        routing, mask = record.routing, record.token_mask
        size = routing.num_experts
        probs = self.probs(real_tokens_only(routing.router_logits, mask))
        real = _ones(probs) if mask is None else mask.reshape(-1, 1).to(probs)
        highest = probs.topk(min(routing.selected_experts.shape[1], size), dim=-1).indices
        chosen = torch.zeros_like(probs).scatter(-1, highest, 1.0) * real
        load = chosen.unflatten(0, (samples, length)).sum(1)  # (B, E)
        load = load / load.sum(-1, keepdim=True).clamp(min=1.0)
        tokens = real.unflatten(0, (samples, length)).sum(1)  # (B, 1)
        mean_probs = (probs * real).unflatten(0, (samples, length)).sum(1) / tokens.clamp(min=1.0)
        each = size * (load * mean_probs).sum(-1)
        return each.sum() / (tokens > 0).sum().clamp(min=1)


def _ones(probs: Tensor) -> Tensor:
    return torch.ones_like(probs[:, :1])
