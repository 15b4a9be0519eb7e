"""A score that compares directions in a space of few dimensions.

Axes: T tokens, H hidden, E experts, D dimensions of the space.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from moeroute.routers.scores import LinearScore, linear_logits
from moeroute.types import RouterInput

EPS = 1e-8


class CosineScore(nn.Module):
    """The cosine between a projected token and each expert's centroid, times a temperature.

        s = W_p x;  logits_e = |tau| * <s / |s|, C_e / |C_e|>

    Neither the length of a token nor that of a centroid matters, so that no expert wins by the size
    of its row.

    Source: On the Representation Collapse of Sparse Mixture of Experts, Chi et al., 2022, arXiv
    2204.09179, section 3 (X-MoE); the temperature as in Equifinality in Mixture of Experts,
    arXiv 2604.14419.

    Args:
        in_features: H.
        num_experts: E.
        space_size: D; 0 compares in the H dimensions of the tokens, without a projection.
        temperature: tau at first; the bound of the logits.

    Shapes:
        projection.weight: (D, H); centroids: (E, D), orthogonal at first where E <= D.
        temperature: (1,).
        router_logits: (T, E) in [-|tau|, |tau|], float32, or float64.

    Raises:
        ValueError: A size is below its least value, or the temperature is 0; in forward, tokens of
            another width.
    """

    projection: LinearScore | None

    def __init__(
        self,
        in_features: int,
        num_experts: int,
        *,
        space_size: int = 64,
        temperature: float = 10.0,
    ) -> None:
        super().__init__()
        if space_size < 0:
            raise ValueError(f"space_size={space_size} is below 0; 0 is the tokens' own space")
        if temperature == 0:
            raise ValueError("temperature=0 makes all logits 0, for good; use 10, say")
        self.in_features = in_features
        self.num_experts = num_experts
        width = space_size or in_features
        self.projection = (
            LinearScore(in_features, space_size, init_std=None) if space_size else None
        )
        self.centroids = nn.Parameter(torch.empty(num_experts, width))
        self.temperature = nn.Parameter(torch.tensor([float(temperature)]))
        nn.init.orthogonal_(self.centroids)

    def forward(self, router_input: RouterInput) -> Tensor:
        """Answer (T, E) logits."""
        tokens = router_input.hidden_states
        places = tokens if self.projection is None else self.projection(router_input)  # (T, D)
        wide = torch.promote_types(places.dtype, torch.float32)
        cosines = linear_logits(
            functional.normalize(places.to(wide), dim=-1, eps=EPS),
            functional.normalize(self.centroids.to(wide), dim=-1, eps=EPS),
            None,
            None,
        )
        return self.temperature.abs().to(wide) * cosines

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        return (
            f"in_features={self.in_features}, num_experts={self.num_experts}, "
            f"space_size={self.centroids.shape[1]}"
        )
