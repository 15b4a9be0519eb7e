"""Scores that compare a token with one direction an expert.

Axes: T tokens, H hidden, E experts, R ranks of all experts.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from moeroute.routers.scores import linear_logits
from moeroute.types import RouterInput


class PrototypeScore(nn.Module):
    """How much of a token lies along the direction that an expert amplifies most.

        logits_e = |v_e . x|,  v_e the top right singular vector of B_e A_e

    Nothing is trained: `set_experts` computes the directions once and keeps them in a buffer. The
    sign of a singular vector means nothing, hence the absolute value.

    Source: Towards Modular LLMs by Building and Reusing a Library of LoRAs, Ostapenko et al., 2024,
    arXiv 2405.11157, section 4 (Arrow).

    Args:
        in_features: H.
        num_experts: E.
        cosine: Divide by the token's norm, so that its length does not sharpen the routing.
        temperature: Divides the logits.

    Shapes:
        prototypes: (E, H) float32, rows of norm 1; zero for an expert that does nothing.
        router_logits: (T, E) float32, or float64; not negative.
    """

    prototypes: Tensor

    def __init__(
        self,
        in_features: int,
        num_experts: int,
        *,
        cosine: bool = False,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.num_experts = num_experts
        self.cosine = cosine
        self.temperature = temperature
        self.register_buffer("prototypes", torch.zeros(num_experts, in_features))

    @torch.no_grad()
    def set_experts(self, lora_a: list[Tensor], lora_b: list[Tensor]) -> None:
        """Take the directions from the experts' weights.

        Args:
            lora_a: (r_e, H) an expert; the ranks may differ, and be 0.
            lora_b: (O, r_e) an expert.
        """
        for row, a, b in zip(self.prototypes, lora_a, lora_b, strict=True):
            row.copy_(top_direction(a, b))

    def forward(self, router_input: RouterInput) -> Tensor:
        """Answer (T, E) logits."""
        tokens = router_input.hidden_states
        logits = linear_logits(tokens, self.prototypes, None, None).abs() / self.temperature
        if not self.cosine:
            return logits
        norms = tokens.to(logits.dtype).norm(dim=-1, keepdim=True)
        return logits / norms.clamp(min=torch.finfo(logits.dtype).tiny)

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        return f"in_features={self.in_features}, num_experts={self.num_experts}"


def top_direction(lora_a: Tensor, lora_b: Tensor) -> Tensor:
    """The top right singular vector of B A, without making the product.

    Args:
        lora_a: (r, H).
        lora_b: (O, r).

    Returns:
        (H,) float64 of norm 1, or zero where B A is zero.
    """
    if not lora_a.shape[0]:
        return lora_a.new_zeros(lora_a.shape[1], dtype=torch.float64)
    basis, right = torch.linalg.qr(lora_a.double().T)  # A = right^T basis^T
    left = torch.linalg.qr(lora_b.double()).R
    _, values, vectors = torch.linalg.svd(left @ right.T)
    return basis @ vectors[0] * (values[0] > 0)
