"""How many experts consecutive tokens use together.

Axes: B samples, S tokens of a sample, T = B * S tokens, K slots a token, E experts, C tokens of a
chunk.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from moeroute.ops.gates import expert_table

EPS = 1e-5


def chunk_activation(
    router_logits: Tensor, token_mask: Tensor | None, shape: tuple[int, int], chunk_size: int
) -> Tensor:
    """Mean over chunks and experts of the chance that an expert of positive logit is active.

        q_te = relu(z_te) / sum_f relu(z_tf);  chance = 1 - prod_{t in chunk} (1 - q_te)

    Source: BlockFFN, Song et al., 2025, arXiv 2507.08771; eps as in the official code, by which a
    chunk where nothing is active counts -1e-5 * C.

    Args:
        router_logits: (T, E).
        token_mask: (T,) bool, False marks padding; None means all real.
        shape: (B, S).
        chunk_size: C; the last chunk of a sample may be shorter.

    Returns:
        Scalar; chunks of padding alone are left out, 0 if there are no others.
    """
    real = _real(router_logits, token_mask)
    active = torch.relu(router_logits.masked_fill(~real[:, None], 0.0))
    scaled = active * torch.rsqrt(active.square().mean(-1, keepdim=True) + EPS)
    share = scaled / (scaled.sum(-1, keepdim=True) + EPS)  # (T, E)
    stays_off = torch.log(1.0 - share + EPS) * real[:, None]
    chance = 1.0 - _in_chunks(stays_off, shape, chunk_size).sum(2).exp()  # (B, chunks, E)
    exists = _in_chunks(real[:, None].to(share), shape, chunk_size).sum((2, 3)) > 0
    return (chance.mean(-1) * exists).sum() / exists.sum().clamp(min=1)


def chunk_sparsity(
    selected_experts: Tensor,
    size: int,
    shape: tuple[int, int],
    chunk_size: int,
    token_mask: Tensor | None = None,
) -> Tensor:
    """The share of experts that whole chunks leave alone (CLS); with a chunk of 1, tokens' (TLS).

    Source: BlockFFN, Song et al., 2025, arXiv 2507.08771, section 4. A sample's last tokens that
    fill no chunk are left out, as are chunks with padding.

    Args:
        selected_experts: (T, K) integers; anything outside [0, E) is an empty slot.
        size: E.
        shape: (B, S).
        chunk_size: C.
        token_mask: (T,) bool, False marks padding; None means all real.

    Returns:
        Scalar float32 in [0, 1]; NaN if there is no whole chunk.
    """
    length = shape[1] - shape[1] % chunk_size
    filled = torch.ones_like(selected_experts, dtype=torch.float32)
    used = expert_table(selected_experts, filled, size).unflatten(0, shape)[:, :length]
    used = used.reshape(shape[0], -1, chunk_size, size).amax(2) > 0  # (B, chunks, E)
    real = _real(selected_experts, token_mask).unflatten(0, shape)[:, :length]
    whole = real.reshape(shape[0], -1, chunk_size).all(-1)
    return 1.0 - used[whole].float().mean()


def _in_chunks(rows: Tensor, shape: tuple[int, int], chunk_size: int) -> Tensor:
    """(T, N) rows as (B, chunks, C, N), filled up with zeros."""
    padded = functional.pad(rows.unflatten(0, shape), (0, 0, 0, -shape[1] % chunk_size))
    return padded.unflatten(1, (-1, chunk_size))


def _real(rows: Tensor, token_mask: Tensor | None) -> Tensor:
    """(T,) bool."""
    if token_mask is not None:
        return token_mask.to(torch.bool)
    return torch.ones(rows.shape[0], dtype=torch.bool, device=rows.device)
