"""A router that draws which experts are active, all with one constant weight."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from moeroute.ops.debug import check_router_logits
from moeroute.ops.subsets import draw_subsets, subset_log_prob
from moeroute.routers.scores import Score
from moeroute.types import RouterInput, RouterOutput


@dataclass(frozen=True, kw_only=True, slots=True)
class SubsetOutput(RouterOutput):
    """A routing that was drawn.

    Attributes:
        log_prob: (D,) float32, or float64: the log-probability of each draw, with a gradient to the
            router. D is T, or B where one draw stands for a whole sample.
    """

    log_prob: Tensor


class SubsetRouter(nn.Module):
    """K of E experts with weight 1 each: drawn in training, the most likely in eval.

    The logits reach the output through the choice alone, so that no gradient of the loss reaches
    the router; `moeroute.policy_gradient_loss` trains it by the log-probabilities.

    Source: arXiv 2603.10160 (ReMix).

    Args:
        score: Tokens to logits, such as `LinearScore`.
        top_k: K, 1 <= top_k <= E.
        detach_input: Whether the log-probabilities' gradient stops at the router, as in the paper,
            or goes on into the layers below.

    Shapes:
        hidden_states: (T, H), any floating dtype.
        router_logits: (T, E) float32 (float64 for float64 tokens).
        routing_weights, selected_experts: (T, K), in the order of drawing or highest first.

    Raises:
        ValueError: top_k is outside 1..E.
    """

    score: Score

    def __init__(self, score: Score, top_k: int, *, detach_input: bool = True) -> None:
        super().__init__()
        if not 1 <= top_k <= score.num_experts:
            raise ValueError(
                f"top_k={top_k} is outside 1..{score.num_experts}, the number of experts; lower "
                "top_k or raise num_experts"
            )
        self.score = score
        self.num_experts = score.num_experts
        self.top_k = top_k
        self.detach_input = detach_input

    def forward(self, router_input: RouterInput) -> RouterOutput:
        """Route (T, H) tokens: a `SubsetOutput` in training, a plain answer in eval."""
        logits = self.score(self._tokens(router_input))
        check_router_logits(logits)
        if not self.training:
            chosen = torch.topk(logits.detach(), self.top_k, dim=-1).indices
            weights = torch.ones_like(chosen, dtype=logits.dtype)
            return RouterOutput(
                router_logits=logits, routing_weights=weights, selected_experts=chosen
            )
        chosen = draw_subsets(logits, self.top_k)
        return SubsetOutput(
            router_logits=logits,
            routing_weights=torch.ones_like(chosen, dtype=logits.dtype),
            selected_experts=chosen,
            log_prob=subset_log_prob(logits, chosen),
        )

    def _tokens(self, router_input: RouterInput) -> RouterInput:
        tokens, mask = router_input.hidden_states, router_input.token_mask
        if self.detach_input:
            tokens = tokens.detach()
        if self.training and mask is not None:
            # NaN in padding would come back through the score's own gradient
            tokens = tokens.masked_fill(~mask.to(torch.bool).unsqueeze(1), 0.0)
        return replace(router_input, hidden_states=tokens)

    def extra_repr(self) -> str:
        """Settings, for `print(model)`."""
        return f"top_k={self.top_k}, detach_input={self.detach_input}"
