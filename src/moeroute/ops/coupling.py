"""How well a router's rows and the experts know each other (ERC), without any token.

Source: Coupling Experts and Routers in Mixture-of-Experts via an Auxiliary Loss, 2025, arXiv
2512.23447.

Axes: E experts, H hidden, D width of an expert.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moeroute.ops.exact import without_autocast
from moeroute.ops.ranks import same_on_all_ranks

TINY = 1e-12


@torch.no_grad()
def specialization(rows: Tensor) -> Tensor:
    """How far each router row may be stretched and still be nearest to itself.

        eps_i = min over j != i of |R_i - R_j| / (2 |R_i|)

    About 0.71 for orthogonal rows of one length and 0 for rows that are equal.

    Args:
        rows: (E, H), any floating dtype.

    Returns:
        (E,) float32, or float64; zeros for a single expert.
    """
    rows = _wide(rows)
    if rows.shape[0] < 2:
        return rows.new_zeros(rows.shape[0])
    distances = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist")
    alone = torch.eye(rows.shape[0], dtype=torch.bool, device=rows.device)
    nearest = distances.masked_fill(alone, torch.inf).amin(1)
    return nearest / (2 * rows.norm(dim=1)).clamp(min=TINY)


def coupling_loss(
    rows: Tensor, gate_weights: Tensor, *, alpha: float = 1.0, draw: Tensor | None = None
) -> Tensor:
    """The expert-router coupling loss of one layer.

        R~_i = R_i * delta_i,   delta_i in [1 - eps_i, 1 + eps_i] a component
        M_ij = |W_j R~_i|,      how strongly expert j answers to the proxy of expert i
        L = 1 / E^2 sum_i sum_{j != i} relu(M_ij - alpha M_ii) + relu(M_ji - alpha M_ii)

    Args:
        rows: (E, H), the router's; the gradient flows through R~, not through eps or the draw.
        gate_weights: (E, D, H), the first matrix of each expert, of a gated one the gate half.
        alpha: How much less an expert must answer to another's proxy; smaller is stricter.
        draw: (E, H) uniform in [0, 1), for delta; None leaves delta at 1.

    Returns:
        Scalar float32, or float64; 0 for a single expert. E^2 D activations are kept for backward.
    """
    rows, weights = _wide(rows), _wide(gate_weights)
    size = rows.shape[0]
    if size < 2:
        return (rows.sum() + weights.sum()) * 0.0
    if draw is not None:
        stretch = (2 * draw.to(rows) - 1) * specialization(rows).unsqueeze(1)
        rows = rows * (1 + stretch)
    with without_autocast(rows.device.type):
        # one product; einsum copies both sides first
        answers = (rows @ weights.flatten(0, 1).T).unflatten(1, weights.shape[:2])  # (E, E, D)
    strength = torch.linalg.vector_norm(answers, dim=-1)  # (proxy, expert); its gradient at 0 is 0
    own = alpha * strength.diagonal()
    excess = torch.relu(strength - own.unsqueeze(1)) + torch.relu(strength - own.unsqueeze(0))
    alone = torch.eye(size, dtype=torch.bool, device=rows.device)
    return excess.masked_fill(alone, 0.0).mean()


def draw_proxies(rows: Tensor) -> Tensor:
    """(E, H) uniform numbers in [0, 1), the same on every rank where torch.distributed runs."""
    return same_on_all_ranks(torch.rand(rows.shape, device=rows.device))


def _wide(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
