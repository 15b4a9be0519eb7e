"""The Switch balance loss with the load of the whole batch: all ranks, all micro-batches.

    L = E * sum_e F_e P_e
    F_e = share of expert e over all ranks and, with `RunningLoad`, since the last optimizer step
    P_e = mean over this rank's tokens of p_e

Source: Demons in the Detail: On Implementing Load Balancing Loss for Training Specialized
Mixture-of-Expert Models, Qiu et al., 2025, arXiv 2501.11873. Differences from the paper: none.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from torch import Tensor

from moeroute.losses.masked import masked_mean, real_tokens_only
from moeroute.ops.load import tokens_per_expert
from moeroute.ops.probs import softmax_probs
from moeroute.ops.ranks import sum_over_ranks
from moeroute.types import RoutingRecord


@runtime_checkable
class CountsSteps(Protocol):
    """A part of a router that knows whom it chose since the last optimizer step."""

    counts_of_step: Tensor | None


@dataclass(frozen=True, kw_only=True, slots=True)
class GlobalBalanceLoss:
    """Balances experts over the batch, and lets single samples and ranks specialise.

    1 at perfect balance of the batch, E / K if all its tokens go to the same K experts with all
    their probability; 0 without real tokens. With one rank, and no `RunningLoad` in the router, it
    is `BalanceLoss`. The gradient flows through P alone; F is counted. Padding and empty slots are
    left out of both. Under data parallelism every rank must reach it, as every rank does that runs
    the same model.

    Args:
        weight: Coefficient in the total, which takes the mean over the layers that ask for it.
        probs: Logits to probabilities whose rows sum to 1; for sigmoid routers
            `moeroute.routers.normalized_sigmoid_probs`.

    Shapes:
        router_logits: (T, E); selected_experts: (T, K); the loss is a scalar in the logits' dtype.

    Example:
        >>> router = ComposedRouter(LinearScore(64, 8), RunningLoad(TopK(2)))
        >>> layer = MoELayer(router=router, experts=experts, losses=(GlobalBalanceLoss(),))
    """

    weight: float = 0.01
    probs: Callable[[Tensor], Tensor] = field(default=softmax_probs, repr=False)

    def __call__(self, record: RoutingRecord) -> Tensor:
        """The loss of one layer: a scalar, unweighted."""
        routing, token_mask = record.routing, record.token_mask
        router_logits = real_tokens_only(routing.router_logits, token_mask)
        mean_probs = masked_mean(self.probs(router_logits), token_mask)  # (E,)
        counts = sum_over_ranks(_seen(record))
        load = counts / counts.sum().clamp(min=1)  # (E,)
        return routing.num_experts * (load * mean_probs).sum()


def _seen(record: RoutingRecord) -> Tensor:
    """(E,) counts since the last step where the router keeps them, else of this forward."""
    for part in [] if record.router is None else record.router.modules():
        if isinstance(part, CountsSteps) and part.counts_of_step is not None:
            return part.counts_of_step
    routing = record.routing
    return tokens_per_expert(routing.selected_experts, routing.num_experts, record.token_mask)
