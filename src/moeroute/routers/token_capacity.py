"""A router of depth that lets a share of a sequence's tokens run a layer.

Axes: B batch, S sequence, H hidden.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moeroute.depth_types import DepthOutput
from moeroute.routers.scores import linear_logits
from moeroute.types import RouterInput


class TokenCapacityRouter(nn.Module):
    """In training the tokens of highest score run; in evaluation those that a predictor expects to.

        r_t = w . h_t;  S = the max(1, floor(C n)) highest r_t of the n real tokens
        q_t = u . stop_gradient(h_t) + b, taught to foretell S;  in evaluation S = {q_t > 0}
        weight of a token that runs: 2 sigmoid(r_t), 1 at first

    Choosing over a sequence looks at later tokens; the predictor does not, so that text can be
    generated. Rows and predictor are zero at first: ties go to early tokens, and in evaluation
    `starts_open` decides.

    Args:
        in_features: H.
        capacity: C, in (0, 1]; 1 lets all tokens run, in evaluation too.
        starts_open: Whether an untrained predictor lets every token run.

    Shapes:
        hidden_states: (T, H), any floating dtype; computed in float32.
        router_logits: (B, S, 2), 0 for skip and q for run.
        num_executions: (B, S) in {0, 1}; routing_weights: (B, S).

    Raises:
        ValueError: capacity is outside (0, 1].
    """

    num_actions = 2

    def __init__(
        self, in_features: int, *, capacity: float = 0.125, starts_open: bool = True
    ) -> None:
        super().__init__()
        if not 0.0 < capacity <= 1.0:
            raise ValueError(f"capacity={capacity} is outside (0, 1]; 0.125 is the paper's")
        self.in_features = in_features
        self.capacity = capacity
        self.score = nn.Parameter(torch.zeros(1, in_features))
        self.predictor = nn.Linear(in_features, 1)
        nn.init.zeros_(self.predictor.weight)
        nn.init.constant_(self.predictor.bias, 1.0 if starts_open else -1.0)

    def forward(self, router_input: RouterInput) -> DepthOutput:
        """Decide for each token."""
        shape, hidden = router_input.sequence_shape, router_input.hidden_states
        score = linear_logits(hidden, self.score, None, None).reshape(shape)
        expects = linear_logits(hidden.detach(), self.predictor.weight, self.predictor.bias, None)
        expects = expects.reshape(shape)
        mask = router_input.token_mask
        real = torch.ones_like(score, dtype=torch.bool) if mask is None else mask.reshape(shape)
        if self.capacity == 1.0:
            runs = real
        else:
            runs = highest(score, real, self.capacity) if self.training else (expects > 0) & real
        return DepthOutput(
            router_logits=torch.stack([torch.zeros_like(expects), expects], -1),
            num_executions=runs.long(),
            routing_weights=2.0 * torch.sigmoid(score),
        )

    def extra_repr(self) -> str:
        """Settings, for `print(model)`."""
        return f"capacity={self.capacity:g}"


class EveryToken(nn.Module):
    """Lets every token run; for layers that are not routed."""

    num_actions = 2

    def forward(self, router_input: RouterInput) -> DepthOutput:
        """Answer 1 for each token."""
        hidden = router_input.hidden_states
        runs = torch.ones(router_input.sequence_shape, dtype=torch.int64, device=hidden.device)
        logits = torch.stack([torch.zeros_like(runs), runs], -1).float()
        return DepthOutput(router_logits=logits, num_executions=runs)


def highest(score: Tensor, real: Tensor, capacity: float) -> Tensor:
    """(B, S) bool: the max(1, floor(capacity * n)) real tokens of highest score of each row."""
    counts = (real.sum(1, keepdim=True) * capacity).floor().clamp(min=1)
    order = score.masked_fill(~real, -torch.inf).argsort(dim=1, descending=True, stable=True)
    place = torch.arange(score.shape[1], device=score.device).expand_as(order)
    rank = torch.empty_like(order).scatter_(1, order, place)
    return (rank < counts) & real
