"""A router that knows how the layer before routed.

Axes: T tokens, H hidden, E experts.
"""

from __future__ import annotations

import torch
from torch import nn

from moeroute.ops.debug import check_router_logits
from moeroute.routers.scores import Score, linear_logits
from moeroute.routers.select import Select, choose
from moeroute.types import RouterInput, RouterOutput


class PathwayRouter(nn.Module):
    """Logits of a score, plus a linear map of the logits of the layer before.

        logits_i = score_i(x) + W_i logits_{i-1};  logits_0 = score_0(x)

    Source: MoE++, Jin et al., 2024, arXiv 2410.07348, equation 6 ("gating residuals").

    Args:
        score: Tokens to logits.
        select: Logits to who and how much.
        is_first: Whether no layer comes before; such a router has no W.

    Shapes:
        pathway.weight: (E, E), zero at first.
        router_logits: (T, E); state: (T, E), the logits, handed to the next routed layer.

    Raises:
        ValueError: The selection does not fit; in forward, a state of other tokens or experts.
    """

    score: Score
    select: Select

    def __init__(self, score: Score, select: Select, *, is_first: bool = False) -> None:
        super().__init__()
        select.check(score.num_experts)
        self.num_experts = score.num_experts
        self.score = score
        self.select = select
        size = score.num_experts
        self.pathway = None if is_first else nn.Parameter(torch.zeros(size, size))

    def forward(self, router_input: RouterInput) -> RouterOutput:
        """Route (T, H) tokens, and hand the logits on."""
        logits, state = self.score(router_input), router_input.state
        if self.pathway is not None and state is not None:
            if state.shape != logits.shape:
                raise ValueError(
                    f"the layer before handed on logits of {tuple(state.shape)}, but this one has "
                    f"{tuple(logits.shape)}: gating residuals need layers of the same tokens and "
                    "number of experts; keep target_modules to one stack of layers"
                )
            logits = logits + linear_logits(state.to(logits), self.pathway, None, None)
        check_router_logits(logits)
        selection = choose(self.select, logits, router_input.token_mask)
        return RouterOutput(
            router_logits=logits,
            routing_weights=selection.routing_weights,
            selected_experts=selection.selected_experts,
            max_assignments=selection.max_assignments,
            state=logits,
        )

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        return f"num_experts={self.num_experts}, is_first={self.pathway is None}"
