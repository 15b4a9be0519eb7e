"""Top-k of the logits, weighted by a function of the chosen logits.

Axes: T tokens, E experts, K slots per token.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moeroute.ops.probs import TINY, sigmoid_probs
from moeroute.routers.select import Probs, Selection, check_bias, check_top_k
from moeroute.routers.selection_bias import SelectionBias


class TopKLogits(nn.Module):
    """The k experts of highest logit; weights come from those logits alone.

        ids = the k highest of logits + bias;  w = probs(logits[ids])  [/ sum]

    With softmax it is `TopKSoftmax`, whose weights compete; with sigmoid every weight stands for
    itself, and the bias is in units of logits, not of probability as in `TopK`.

    Args:
        top_k: K, at least 1.
        probs: (T, K) chosen logits to (T, K) weights.
        normalize: Divide each token's weights by their sum.
        selection_bias: Added to the logits for choosing only.

    Shapes:
        routing_weights, selected_experts: (T, K), highest first.

    Raises:
        ValueError: top_k is below 1, or (when a router is made) above the number of experts, or the
            bias is of another number.
    """

    selection_bias: SelectionBias | None

    def __init__(
        self,
        top_k: int,
        *,
        probs: Probs = sigmoid_probs,
        normalize: bool = False,
        selection_bias: SelectionBias | None = None,
    ) -> None:
        super().__init__()
        check_top_k(top_k)
        self.top_k = top_k
        self.probs = probs
        self.normalize = normalize
        self.selection_bias = selection_bias

    def check(self, num_experts: int) -> None:
        """Raise ValueError if top_k or the bias does not fit the number of experts."""
        check_top_k(self.top_k, num_experts)
        check_bias(self.selection_bias, num_experts)

    def forward(self, router_logits: Tensor) -> Selection:
        """Choose for each row of (T, E) logits."""
        bias = self.selection_bias
        choosing = router_logits if bias is None else bias(router_logits)
        chosen = torch.topk(choosing, self.top_k, dim=-1).indices
        weights = self.probs(router_logits.gather(-1, chosen))
        if self.normalize:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + TINY)
        return Selection(routing_weights=weights, selected_experts=chosen)

    def extra_repr(self) -> str:
        """Settings, for `print(model)`."""
        return f"top_k={self.top_k}, normalize={self.normalize}"
