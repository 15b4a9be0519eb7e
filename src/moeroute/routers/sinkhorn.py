"""Balanced choice by optimal transport.

Axes: T tokens, K slots per token, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moeroute.ops.probs import sigmoid_probs, softmax_probs
from moeroute.routers.capacity import Capacity
from moeroute.routers.composed import ComposedRouter
from moeroute.routers.scores import LinearScore
from moeroute.routers.select import Selection, check_top_k

EPS = 1e-8


class SinkhornTopK(nn.Module):
    """Chosen by a balanced plan in training, by the logits in eval; weighted by the logits.

        plan = diag(d0) exp(logits) diag(d1), rows sum to 1 / T and columns to 1 / E
        ids = the k highest of plan (eval: of logits)
        w = sigmoid(logits)[ids] for K = 1, softmax(logits)[ids] for K > 1

    The plan carries no gradient; no balance loss is wanted beside it. Top-k of a balanced plan is
    nearly balanced, not exactly: `base_router` is.

    Source: Unified Scaling Laws for Routed Language Models, Clark et al., 2022, arXiv 2202.01169,
    appendix B; weights as in Megatron-LM. It runs a fixed number of iterations, because to look for
    convergence would wait for the device.

    Args:
        top_k: K, at least 1.
        iterations: Of the alternating scaling.

    Shapes:
        routing_weights, selected_experts: (T, K), highest in the plan first. Padding has no part in
            the plan.

    Raises:
        ValueError: top_k is below 1, or (when a router is made) above the number of experts.
    """

    def __init__(self, top_k: int, *, iterations: int = 30) -> None:
        super().__init__()
        check_top_k(top_k)
        self.top_k = top_k
        self.iterations = iterations

    def check(self, num_experts: int) -> None:
        """Raise ValueError if top_k exceeds the number of experts."""
        check_top_k(self.top_k, num_experts)

    def forward(self, router_logits: Tensor) -> Selection:
        """Choose for (T, E) logits of real tokens."""
        return self.among(router_logits, None)

    def among(self, router_logits: Tensor, token_mask: Tensor | None) -> Selection:
        """Choose for (T, E) logits; padding is given whoever it likes, and moves nobody."""
        choosing = router_logits.detach()
        if self.training:
            choosing = sinkhorn_plan(choosing, token_mask, iterations=self.iterations)
        chosen = torch.topk(choosing, self.top_k, dim=-1).indices
        probs = sigmoid_probs if self.top_k == 1 else softmax_probs
        return Selection(
            routing_weights=probs(router_logits).gather(-1, chosen), selected_experts=chosen
        )

    def extra_repr(self) -> str:
        """Settings, for `print(model)`."""
        return f"top_k={self.top_k}, iterations={self.iterations}"


@torch.no_grad()
def sinkhorn_plan(
    router_logits: Tensor, token_mask: Tensor | None = None, *, iterations: int = 30
) -> Tensor:
    """The balanced plan between tokens and experts that is nearest to exp(logits).

    Args:
        router_logits: (T, E).
        token_mask: (T,) bool, False marks padding, whose rows are 0.
        iterations: Of the alternating scaling.

    Returns:
        (T, E); real rows sum to about 1 / (real tokens), columns to 1 / E.
    """
    size = router_logits.shape[1]
    # the row's maximum cancels in the row's scale, and keeps exp from overflowing
    kernel = (router_logits - router_logits.amax(1, keepdim=True)).exp()
    count: Tensor | int = max(router_logits.shape[0], 1)
    if token_mask is not None:
        real = token_mask.to(torch.bool)
        kernel, count = kernel.masked_fill(~real.unsqueeze(1), 0.0), real.sum().clamp(min=1)
    columns = torch.ones_like(kernel[:1]).sum(0) if kernel.shape[0] else kernel.new_ones(size)
    rows = kernel.new_zeros(kernel.shape[0])
    for _ in range(iterations):
        rows = (1.0 / count) / ((kernel * columns).sum(1) + EPS)
        columns = (1.0 / size) / ((rows.unsqueeze(1) * kernel).sum(0) + EPS)
    return rows.unsqueeze(1) * kernel * columns


def base_router(hidden_size: int, num_experts: int, *, iterations: int = 30) -> ComposedRouter:
    """One expert a token, ceil(T / E) tokens an expert (BASE layers, arXiv 2103.16716).

    Centroids are orthogonal with a gain of 0.1, and the weight is sigmoid(x . c_e). The paper's
    experts hold a residual of their own and are mixed with the token by that weight: to get it,
    give experts that add nothing of the token and let the block add it. Differences from the paper:
    the assignment is Sinkhorn's plan, its overflow re-routed, where the paper runs an auction over
    all ranks; and in eval the capacity stays, where the paper takes the best expert.
    """
    score = LinearScore(hidden_size, num_experts)
    nn.init.orthogonal_(score.weight, gain=0.1)
    select = Capacity(
        SinkhornTopK(1, iterations=iterations),
        capacity_factor=1.0,
        overflow="reroute",
        rounds=num_experts,
    )
    return ComposedRouter(score, select)
