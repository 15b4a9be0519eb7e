"""A router that compares itself with what it was, for losses that tell tasks apart.

Axes: B samples, T tokens, H hidden, E experts, K slots per token.
"""

from __future__ import annotations

import copy
from dataclasses import replace

import torch
from torch import Tensor, nn

from moeroute.ops.debug import check_router_logits
from moeroute.ops.probs import softmax_probs
from moeroute.outputs import ContrastOutput
from moeroute.routers.fixed import fixed
from moeroute.routers.mlp_score import MLPScore
from moeroute.routers.samples import sample_means
from moeroute.routers.select import Select, choose
from moeroute.types import RouterInput, RouterOutput, RoutingRecord


class MomentumRouter(nn.Module):
    """A score and a selection, and in training each sample's features by two scores.

        q_b = mean over real tokens of softmax(score(x)),  k_b = the same by the momentum score
        momentum <- rate * score + (1 - rate) * momentum, once an optimizer step

    The momentum score is a buffer, at first a copy of the score; it sees tokens without a gradient.
    With `raw_features` the features are the mean logits, as where one routing stands for a sample.

    Source: Mixture-of-Experts Meets In-Context Reinforcement Learning, Wu et al., 2025, arXiv
    2506.05426 (T2MIR), the task-wise gate; read from the official code.

    Args:
        score: Tokens to logits.
        select: Logits to who and how much.
        rate: Of the momentum, in (0, 1].
        raw_features: Features are logits, not probabilities.

    Shapes:
        bilinear: (E, E), normal at first; for `moeroute.losses.SamePairLoss`.
        router_logits: (T, E); features, momentum_features: (B, E) float32, or float64.

    Raises:
        ValueError: The selection does not fit, or the rate is outside (0, 1].
    """

    select: Select

    def __init__(
        self, score: MLPScore, select: Select, *, rate: float = 0.005, raw_features: bool = False
    ) -> None:
        super().__init__()
        select.check(score.num_experts)
        if not 0.0 < rate <= 1.0:
            raise ValueError(f"rate={rate} is outside (0, 1]; the momentum score would not move")
        self.num_experts = score.num_experts
        self.in_features = score.in_features
        self.score = score
        self.momentum = fixed(copy.deepcopy(score))
        self.select = select
        self.rate = rate
        self.raw_features = raw_features
        self.bilinear = nn.Parameter(torch.randn(score.num_experts, score.num_experts))
        self._moved = False

    def forward(self, router_input: RouterInput) -> RouterOutput:
        """Route (T, H) tokens: a `ContrastOutput` in training, a plain answer in eval."""
        logits = self.score(router_input)
        check_router_logits(logits)
        selection = choose(self.select, logits, router_input.token_mask)
        routing = RouterOutput(
            router_logits=logits,
            routing_weights=selection.routing_weights,
            selected_experts=selection.selected_experts,
            max_assignments=selection.max_assignments,
        )
        if not self.training:
            return routing
        with torch.no_grad():
            before = self.momentum(router_input)
        return ContrastOutput(
            router_logits=logits,
            routing_weights=routing.routing_weights,
            selected_experts=routing.selected_experts,
            max_assignments=routing.max_assignments,
            features=self._features(logits, router_input),
            momentum_features=self._features(before, router_input),
        )

    def _features(self, logits: Tensor, router_input: RouterInput) -> Tensor:
        values = logits if self.raw_features else softmax_probs(logits)
        return sample_means(replace(router_input, hidden_states=values))

    def observe(self, record: RoutingRecord) -> None:
        """Take note that the score was trained on something."""
        self._moved = True

    @torch.no_grad()
    def post_step(self) -> None:
        """Move the momentum score toward the score, if there was a training forward."""
        if not self._moved:
            return
        for name, parameter in self.score.named_parameters():
            self.momentum.get_buffer(name).lerp_(parameter.detach(), self.rate)
        self._moved = False

    def extra_repr(self) -> str:
        """Settings, for `print(model)`."""
        return f"rate={self.rate:g}, raw_features={self.raw_features}"
