"""A score that is one trained gate an expert, each trained without the others.

Axes: T tokens, H hidden, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from moeroute.routers.scores import linear_logits
from moeroute.types import RouterInput

EPS = 1e-5


class GateScore(nn.Module):
    """One gate vector an expert: it opens its expert in training, and finds it afterwards.

        training: logits_e = v_e . x
        eval:     logits_e = LN(v_e) . LN(x) / sqrt(H)

    LN is a layer norm without affine part. A gate of zeros, as after construction, has logits of 0
    in eval. Each logit depends on its own row alone, and so does each row's gradient.

    Source: Learning to Route Among Specialized Experts for Zero-Shot Generalization, Muqeeth et
    al., 2024, arXiv 2402.05859, section 3 (PHATGOOSE).

    Args:
        in_features: H.
        num_experts: E.

    Shapes:
        weight: (E, H), zero at first.
        router_logits: (T, E) float32, or float64.

    Raises:
        ValueError: In forward, tokens of another width.
    """

    def __init__(self, in_features: int, num_experts: int) -> None:
        super().__init__()
        self.in_features = in_features
        self.num_experts = num_experts
        self.weight = nn.Parameter(torch.zeros(num_experts, in_features))

    def forward(self, router_input: RouterInput) -> Tensor:
        """Answer (T, E) logits."""
        tokens = router_input.hidden_states
        if self.training:
            return linear_logits(tokens, self.weight, None, None)
        logits = linear_logits(_normalized(tokens), _normalized(self.weight), None, None)
        return logits / self.in_features**0.5

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        return f"in_features={self.in_features}, num_experts={self.num_experts}"


def _normalized(rows: Tensor) -> Tensor:
    """Rows of mean 0 and variance 1, in float32 or wider; a row of zeros stays zero."""
    wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
    return functional.layer_norm(wide, wide.shape[-1:], eps=EPS)
