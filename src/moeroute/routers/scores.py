"""Scores: tokens to one logit an expert.

Axes: T tokens, H hidden, E experts.
"""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from moeroute.ops.exact import without_autocast
from moeroute.types import RouterInput


class Score(Protocol):
    """Anything that gives every token a logit for every expert."""

    num_experts: int

    def __call__(self, router_input: RouterInput, /) -> Tensor:
        """Answer (T, E) float32 logits (float64 for float64 tokens), raw."""
        ...


class LinearScore(nn.Module):
    """One row of weights an expert: logits = W x + b.

    Args:
        in_features: H.
        num_experts: E, at least 1.
        bias: Adds one bias an expert.
        compute_dtype: What the product is computed in, under autocast too. None: float32, or wider
            if tokens or weight are. A dtype: that one, for checkpoints whose gate computes in the
            model's dtype (torch.bfloat16, say).
        init_std: Standard deviation of the normal initialisation; None: uniform in +-1/sqrt(H), as
            `nn.Linear` starts.

    Shapes:
        weight: (E, H); bias: (E,), zero at first.
        router_logits: (T, E) float32, or float64.

    Raises:
        ValueError: num_experts or in_features is below 1; in forward, tokens of another width.
    """

    bias: nn.Parameter | None

    def __init__(
        self,
        in_features: int,
        num_experts: int,
        *,
        bias: bool = False,
        compute_dtype: torch.dtype | None = None,
        init_std: float | None = 0.02,
    ) -> None:
        super().__init__()
        _check_sizes(in_features, num_experts)
        self.in_features = in_features
        self.num_experts = num_experts
        self.compute_dtype = compute_dtype
        self.init_std = init_std
        self.weight = nn.Parameter(torch.empty(num_experts, in_features))
        self.bias = nn.Parameter(torch.empty(num_experts)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Weight normal with `init_std` or uniform without, bias zero."""
        if self.init_std is None:
            nn.init.kaiming_uniform_(self.weight, a=math.sqrt(5))
        else:
            nn.init.normal_(self.weight, std=self.init_std)
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def forward(self, router_input: RouterInput) -> Tensor:
        """Answer (T, E) logits."""
        return linear_logits(router_input.hidden_states, self.weight, self.bias, self.compute_dtype)

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        bias = self.bias is not None
        return f"in_features={self.in_features}, num_experts={self.num_experts}, bias={bias}"


class NoisyLinearScore(nn.Module):
    """Linear logits plus, in training, normal noise whose scale each token chooses.

        logits = W_g x + z * softplus(W_n x),  z ~ N(0, 1), one draw a token and expert

    Source: Outrageously Large Neural Networks, Shazeer et al., 2017, arXiv 1701.06538, equations
    3-5. Both weights start at zero, as the paper proposes: every expert is then equally likely in
    training, while in eval mode (no noise) an untrained router sees nothing but ties.

    Args:
        in_features: H.
        num_experts: E, at least 1.

    Shapes:
        weight, noise_weight: (E, H), zero at first.
        router_logits: (T, E) float32, or float64; in training with the noise, as the selection saw
            them, so that the gradient reaches noise_weight through the routing weights.

    Raises:
        ValueError: num_experts or in_features is below 1; in forward, tokens of another width.
    """

    def __init__(self, in_features: int, num_experts: int) -> None:
        super().__init__()
        _check_sizes(in_features, num_experts)
        self.in_features = in_features
        self.num_experts = num_experts
        self.weight = nn.Parameter(torch.empty(num_experts, in_features))
        self.noise_weight = nn.Parameter(torch.empty(num_experts, in_features))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Both weights zero."""
        nn.init.zeros_(self.weight)
        nn.init.zeros_(self.noise_weight)

    def forward(self, router_input: RouterInput) -> Tensor:
        """Answer (T, E) logits."""
        tokens = router_input.hidden_states
        logits = linear_logits(tokens, self.weight, None, None)
        if not self.training:
            return logits
        scale = functional.softplus(linear_logits(tokens, self.noise_weight, None, None))
        return logits + torch.randn_like(logits) * scale

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        return f"in_features={self.in_features}, num_experts={self.num_experts}"


def linear_logits(
    tokens: Tensor, weight: Tensor, bias: Tensor | None, compute_dtype: torch.dtype | None
) -> Tensor:
    """W x + b in the given dtype, autocast or not, answered in float32 (or float64).

    Args:
        tokens: (T, H).
        weight: (E, H).
        bias: (E,) or None.
        compute_dtype: See `LinearScore`.

    Raises:
        ValueError: Tokens and weight differ in H.
    """
    if tokens.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"tokens are {tokens.shape[-1]} wide but the router was made for {weight.shape[1]}; "
            f"build it with in_features={tokens.shape[-1]}"
        )
    if compute_dtype is None:
        widest = torch.promote_types(tokens.dtype, weight.dtype)
        compute_dtype = torch.promote_types(widest, torch.float32)
    with without_autocast(tokens.device.type):
        logits = functional.linear(
            tokens.to(compute_dtype),
            weight.to(compute_dtype),
            None if bias is None else bias.to(compute_dtype),
        )
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


def _check_sizes(in_features: int, num_experts: int) -> None:
    for name, value in (("in_features", in_features), ("num_experts", num_experts)):
        if value < 1:
            raise ValueError(f"{name}={value} is below 1; a router needs at least one of each")
