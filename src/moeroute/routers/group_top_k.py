"""Top-k over the experts of a few groups only.

Axes: T tokens, E experts, K slots per token, G groups.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moeroute.ops.probs import TINY, sigmoid_probs
from moeroute.routers.select import Probs, Selection, check_bias, check_top_k
from moeroute.routers.selection_bias import SelectionBias


class GroupTopK(nn.Module):
    """Top-k over the experts of the best groups only.

    Experts are cut into G equal groups; a group's score is the sum of its highest choosing scores
    (p + bias), two of them or another number; experts outside the best groups cannot be chosen.
    Weights are scaling * p[ids] / (sum + 1e-20), the bias left out.

    Source: DeepSeek-V3 Technical Report, 2024, arXiv 2412.19437, section 2.1.2 (sum of two), and
    DeepSeek-V2, 2024, arXiv 2405.04434, section 2.2.2 (the highest alone); transformers'
    implementation fixes the order of the operations.

    Args:
        top_k: K, at least 1.
        num_groups: G; divides the number of experts.
        top_k_groups: Groups kept a token.
        group_score_size: How many of a group's scores add up to the group's; all of them where a
            group has fewer.
        selection_bias: Added to the probabilities for choosing only.
        probs: Logits to probabilities, (T, E) to (T, E).
        normalize: Divide each token's weights by their sum.
        routed_scaling_factor: Multiplies the weights at the end.

    Shapes:
        routing_weights, selected_experts: (T, K), in no particular order.

    Raises:
        ValueError: Sizes that do not fit each other or (when a router is made) the number of
            experts.
    """

    selection_bias: SelectionBias | None

    def __init__(
        self,
        top_k: int,
        *,
        num_groups: int,
        top_k_groups: int,
        group_score_size: int = 2,
        selection_bias: SelectionBias | None = None,
        probs: Probs = sigmoid_probs,
        normalize: bool = True,
        routed_scaling_factor: float = 1.0,
    ) -> None:
        super().__init__()
        check_top_k(top_k)
        if not 1 <= top_k_groups <= num_groups:
            raise ValueError(
                f"top_k_groups={top_k_groups} is outside 1..{num_groups}, the number of groups; "
                "lower top_k_groups or raise num_groups"
            )
        if group_score_size < 1:
            raise ValueError(
                f"group_score_size={group_score_size} is below 1; a group needs a score: 1 takes "
                "its highest, 2 the sum of its two highest"
            )
        self.top_k = top_k
        self.num_groups = num_groups
        self.top_k_groups = top_k_groups
        self.group_score_size = group_score_size
        self.selection_bias = selection_bias
        self.probs = probs
        self.normalize = normalize
        self.routed_scaling_factor = routed_scaling_factor

    def check(self, num_experts: int) -> None:
        """Raise ValueError if groups, top_k or the bias do not fit the number of experts."""
        if num_experts % self.num_groups:
            raise ValueError(
                f"num_groups={self.num_groups} does not divide num_experts={num_experts}; groups "
                "are equal, so choose a divisor"
            )
        check_top_k(self.top_k, num_experts // self.num_groups * self.top_k_groups)
        check_bias(self.selection_bias, num_experts)

    def forward(self, router_logits: Tensor) -> Selection:
        """Choose for each row of (T, E) logits."""
        router_probs = self.probs(router_logits)
        bias = self.selection_bias
        choosing = router_probs if bias is None else bias(router_probs)
        size = router_logits.shape[-1] // self.num_groups
        by_group = choosing.unflatten(-1, (self.num_groups, size))  # (T, G, E / G)
        best_of_group = by_group.topk(min(self.group_score_size, size), dim=-1).values
        group_scores = best_of_group.sum(dim=-1)
        best = torch.topk(group_scores, self.top_k_groups, dim=-1, sorted=False).indices
        shut = torch.ones_like(group_scores, dtype=torch.bool).scatter(1, best, value=False)
        choosable = by_group.masked_fill(shut.unsqueeze(-1), float("-inf")).flatten(-2)
        chosen = torch.topk(choosable, self.top_k, dim=-1, sorted=False).indices
        weights = router_probs.gather(-1, chosen)
        if self.normalize:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + TINY)
        weights = weights * self.routed_scaling_factor
        return Selection(routing_weights=weights, selected_experts=chosen)

    def extra_repr(self) -> str:
        """Settings, for `print(model)`."""
        return (
            f"top_k={self.top_k}, num_groups={self.num_groups}, top_k_groups={self.top_k_groups}, "
            f"group_score_size={self.group_score_size}, normalize={self.normalize}, "
            f"routed_scaling_factor={self.routed_scaling_factor:g}"
        )
