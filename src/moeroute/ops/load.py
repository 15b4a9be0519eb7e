"""How evenly the experts are used: pure, vectorised functions of ids and of counts.

Nothing here synchronises with the device or carries a gradient. Functions of counts take any number
of leading axes, so a (layers, E) table is summarised in one call.

Axes: T tokens, K slots per token, E experts.
"""

from __future__ import annotations

import torch
from torch import Tensor


def tokens_per_expert(
    selected_experts: Tensor, size: int, token_mask: Tensor | None = None
) -> Tensor:
    """Count the filled slots of each expert.

    Args:
        selected_experts: (T, K) integers; anything outside [0, size) is an empty slot.
        size: E.
        token_mask: (T,) bool, False marks padding, which is not counted; None counts every token.

    Returns:
        (E,) int64 counts; their sum is T * K where no slot is empty and no token is padding.
    """
    ids = _drop_empty(selected_experts, size, token_mask).reshape(-1)
    counts = torch.zeros(size + 1, dtype=torch.int64, device=ids.device)
    return counts.scatter_add(0, ids, torch.ones_like(ids))[:size]


def co_activation(selected_experts: Tensor, size: int, token_mask: Tensor | None = None) -> Tensor:
    """Count the tokens that selected both experts of each pair.

    Args:
        selected_experts: (T, K) integers; anything outside [0, size) is an empty slot.
        size: E.
        token_mask: (T,) bool, False marks padding, which is not counted; None counts every token.

    Returns:
        (E, E) int64, symmetric; the diagonal counts the tokens of each expert, a token once even
        if it names an expert in two slots. Exact below 2**24 tokens.
    """
    ids = _drop_empty(selected_experts, size, token_mask)
    chosen = torch.zeros(ids.shape[0], size + 1, device=ids.device)
    chosen = chosen.scatter(1, ids, 1.0)[:, :size]
    # a sum over the token axis in float32; `einsum` and `matmul` would follow autocast to bfloat16
    with torch.autocast(ids.device.type, enabled=False):
        return (chosen.T @ chosen).to(torch.int64)


def load_entropy_nats(counts: Tensor) -> Tensor:
    """Shannon entropy of the experts' shares.

        H = -sum_e p_e ln p_e,  p = counts / sum(counts)

    Args:
        counts: (..., E) counts or shares, >= 0, any dtype.

    Returns:
        (...) float32 in nats, from 0 (one expert takes all, or nothing was counted) to ln E.
    """
    shares = _shares(counts)
    return -torch.special.xlogy(shares, shares).sum(-1) + 0.0


def load_entropy(counts: Tensor) -> Tensor:
    """Shannon entropy of the experts' shares, as a fraction of its maximum ln E.

    Args:
        counts: (..., E) counts or shares, >= 0, any dtype.

    Returns:
        (...) float32 in [0, 1]: 1 at perfect balance (and for a single expert), 0 if one of several
        experts takes all or nothing was counted.
    """
    size = counts.shape[-1]
    if size == 1:
        return (counts > 0).any(-1).to(torch.float32)
    largest = torch.log(torch.tensor(float(size), device=counts.device))
    return (load_entropy_nats(counts) / largest).clamp(0.0, 1.0)


def coefficient_of_variation(counts: Tensor) -> Tensor:
    """Standard deviation of the counts (over E, not E - 1) divided by their mean.

    Args:
        counts: (..., E) counts, >= 0, any dtype.

    Returns:
        (...) float32: 0 at perfect balance and where nothing was counted, sqrt(E - 1) if one expert
        takes all.
    """
    relative = _shares(counts) * counts.shape[-1]
    deviation = (relative - relative.mean(-1, keepdim=True)).square().mean(-1).sqrt()
    return torch.where(_nothing(counts), 0.0, deviation)


def max_violation(counts: Tensor) -> Tensor:
    """How far the busiest expert is above the mean: max / mean - 1.

    Source: Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts, Wang et al., 2024,
    arXiv 2408.15664, MaxVio.

    Args:
        counts: (..., E) counts, >= 0, any dtype.

    Returns:
        (...) float32: 0 at perfect balance and where nothing was counted, E - 1 if one expert takes
        all.
    """
    worst = _shares(counts).amax(-1) * counts.shape[-1] - 1.0
    return torch.where(_nothing(counts), 0.0, worst)


def dead_experts(counts: Tensor) -> Tensor:
    """Which experts nobody chose.

    Args:
        counts: (..., E) counts, >= 0, any dtype.

    Returns:
        (..., E) bool; all True where nothing was counted.
    """
    return counts == 0


def _drop_empty(selected_experts: Tensor, size: int, token_mask: Tensor | None) -> Tensor:
    """Ids with every empty slot and every slot of a padding token set to `size`; no gradient."""
    ids = selected_experts.detach().to(torch.int64)
    counted = (ids >= 0) & (ids < size)
    if token_mask is not None:
        counted = counted & token_mask[:, None]
    return torch.where(counted, ids, size)


def _nothing(counts: Tensor) -> Tensor:
    return counts.sum(-1) == 0


def _shares(counts: Tensor) -> Tensor:
    """Each expert's share in float32 (computed in float64, counts are large); 0 if no counts."""
    counts = counts.detach().to(torch.float64)
    total = counts.sum(-1, keepdim=True)
    return (counts / torch.where(total == 0, 1.0, total)).to(torch.float32)
