"""Routing manifold alignment: samples that mean the same are routed the same.

    L = mean over samples of sum_j W_ij |r_i - r_j|^2,  W_ij = s_ij / sum_m s_im
    s_ij = exp(-|e_i - e_j|^2 / (2 sigma^2)),  j among the nearest samples that the model solves

r_i: the routing probabilities of sample i's last token, over the last MoE layers.

Source: Routing Manifold Alignment Improves Generalization of Mixture-of-Experts LLMs, 2025, arXiv
2511.07419 (RoMA), read without its code. Our own reading: targets r_j are those of the model before
training, kept without a gradient; sigma is the median distance to a neighbour; a weight of 1 beside
the task's loss. The paper trains the router's weights alone.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from moeroute.ops.probs import softmax_probs


class Neighbors(NamedTuple):
    """For each of N samples the solved samples nearest to it.

    Attributes:
        ids: (N, k) int64; where there are fewer than k, the sample itself.
        weights: (N, k), rows sum to 1; all 0 where there is no neighbour.
    """

    ids: Tensor
    weights: Tensor


def routing_vectors(
    router_logits: Sequence[Tensor],
    token_mask: Tensor,
    *,
    num_layers: int = 5,
    probs: Callable[[Tensor], Tensor] = softmax_probs,
) -> Tensor:
    """What the last layers' routers say of every sample's last token.

    Args:
        router_logits: One (B * S, E) a layer, as `model(..., output_router_logits=True)` gives.
        token_mask: (B, S), 0 or False marks padding, on either side.
        num_layers: Layers from the end. Default of the paper: 5.
        probs: Logits to probabilities.

    Returns:
        (B, num_layers * E), float32 or wider, with the logits' gradient.

    Raises:
        ValueError: There are no logits, or their rows are not the mask's tokens.
    """
    if not router_logits:
        raise ValueError("router_logits is empty; call the model with output_router_logits=True")
    samples, length = token_mask.shape
    last = (token_mask.bool() * torch.arange(1, length + 1, device=token_mask.device)).argmax(1)
    rows = torch.arange(samples, device=token_mask.device) * length + last
    for index, logits in enumerate(router_logits):
        if logits.shape[0] != samples * length:
            raise ValueError(
                f"router_logits[{index}] has {logits.shape[0]} rows, but token_mask has "
                f"{samples} * {length} tokens; pass the mask of the same call"
            )
    kept = [logits[rows.to(logits.device)] for logits in router_logits[-num_layers:]]
    wide = [row.to(torch.promote_types(row.dtype, torch.float32)) for row in kept]
    return torch.cat([probs(row).to(wide[0].device) for row in wide], dim=-1)


def solved_neighbors(
    embeddings: Tensor, solved: Tensor, *, count: int = 3, sigma: float | None = None
) -> Neighbors:
    """Find for each sample the nearest others that the model solves.

    Args:
        embeddings: (N, D) of the samples' texts, by a frozen encoder.
        solved: (N,) bool, whether the model before training answers right.
        count: k. Default of the paper: 3.
        sigma: Width of the similarity; the median distance to a neighbour by default.

    Returns:
        Their ids and weights; a sample is never its own neighbour.

    Raises:
        ValueError: count is below 1, or sigma not above 0.
    """
    if count < 1 or (sigma is not None and sigma <= 0):
        raise ValueError(f"count={count} must be at least 1, sigma={sigma} above 0")
    distances = torch.cdist(embeddings, embeddings)
    distances = distances.masked_fill(~solved.to(torch.bool)[None], torch.inf)
    distances.fill_diagonal_(torch.inf)
    nearest = distances.topk(min(count, len(distances)), largest=False)
    exists = nearest.values.isfinite()
    found = nearest.values[exists]
    width = sigma if sigma is not None else (found.median().item() if found.numel() else 1.0)
    scaled = -nearest.values.square() / (2 * max(width, torch.finfo(distances.dtype).eps) ** 2)
    weights = torch.softmax(scaled.where(exists, -torch.inf), dim=-1).nan_to_num(0.0)
    everyone = torch.arange(len(distances), device=distances.device)[:, None]
    return Neighbors(ids=nearest.indices.where(exists, everyone), weights=weights)


def alignment_loss(vectors: Tensor, targets: Tensor, weights: Tensor) -> Tensor:
    """Mean over samples of the weighted squared distance to the neighbours' routing.

    0 where every sample is routed as its neighbours, and for samples without any.

    Args:
        vectors: (B, R) of `routing_vectors`, of this batch.
        targets: (B, k, R) those of the samples' neighbours, `kept[neighbors.ids[rows]]`.
        weights: (B, k), `neighbors.weights[rows]`.

    Returns:
        Scalar; its gradient reaches `vectors`, and `targets` where they have one.

    Raises:
        ValueError: The shapes do not fit.

    Example:
        >>> outputs = model(**batch, labels=labels, output_router_logits=True)
        >>> vectors = routing_vectors(outputs.router_logits, batch["attention_mask"])
        >>> loss = outputs.loss + alignment_loss(vectors, kept[near.ids[rows]], near.weights[rows])
    """
    if targets.shape != (*weights.shape, vectors.shape[-1]) or len(weights) != len(vectors):
        raise ValueError(
            f"vectors {tuple(vectors.shape)}, targets {tuple(targets.shape)} and weights "
            f"{tuple(weights.shape)} do not fit: (B, R), (B, k, R) and (B, k) are needed"
        )
    apart = (vectors[:, None] - targets).square().sum(-1)  # (B, k)
    return (apart * weights).sum() / max(len(vectors), 1)
