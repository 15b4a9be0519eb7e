"""A selection that is sparse for tokens the router is sure of, and soft for the others."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moeroute.ops.entropy import tsallis_entropy
from moeroute.ops.probs import softmax_probs
from moeroute.routers.select import Selection


class EntropyGated(nn.Module):
    """All experts where the entropy is high, else those within top_p, and top_k at least.

        p = softmax(logits), highest first;  c = their cumulative sum
        kept = c <= top_p, or among the first top_k, or H(p) > entropy_threshold
        w = p of the kept, not renormalised

    The expert that crosses top_p is left out, where nucleus sampling would keep it.

    Args:
        top_k: Experts that a token keeps in any case, at least 1.
        top_p: Probability that the others may reach.
        entropy_threshold: Above it all experts are kept; 1 or more switches that off.
        index: q of the Tsallis entropy, above 0; 1 is Shannon's.
        eps: Added to every probability in the entropy.

    Shapes:
        routing_weights, selected_experts: (T, E), highest first, then empty slots; weights sum to
            at most 1 per token.

    Raises:
        ValueError: top_k is below 1, or (when a router is made) above the number of experts.
    """

    def __init__(
        self,
        top_k: int,
        *,
        top_p: float,
        entropy_threshold: float,
        index: float = 1.1,
        eps: float = 1e-5,
    ) -> None:
        super().__init__()
        self.top_k = top_k
        self.top_p = top_p
        self.entropy_threshold = entropy_threshold
        self.index = index
        self.eps = eps

    def check(self, num_experts: int) -> None:
        """Raise ValueError if top_k does not fit the number of experts."""
        if not 1 <= self.top_k <= num_experts:
            raise ValueError(
                f"top_k={self.top_k} is outside 1..{num_experts}, the number of experts; lower "
                "top_k or raise num_experts"
            )

    def forward(self, router_logits: Tensor) -> Selection:
        """Choose for each row of (T, E) logits."""
        size = router_logits.shape[-1]
        probs = softmax_probs(router_logits)
        weights, order = torch.sort(probs, dim=-1, descending=True, stable=True)
        rank = torch.arange(size, device=probs.device)
        kept = (weights.detach().cumsum(-1) <= self.top_p) | (rank < self.top_k)
        if self.entropy_threshold < 1.0:
            entropy = tsallis_entropy(probs.detach(), index=self.index, eps=self.eps)
            kept = kept | (entropy > self.entropy_threshold).unsqueeze(-1)
        return Selection(
            routing_weights=weights.masked_fill(~kept, 0.0),
            selected_experts=torch.where(kept, order, size),
        )

    def extra_repr(self) -> str:
        """Settings, for `print(model)`."""
        return (
            f"top_k={self.top_k}, top_p={self.top_p:g}, "
            f"entropy_threshold={self.entropy_threshold:g}, index={self.index:g}"
        )
