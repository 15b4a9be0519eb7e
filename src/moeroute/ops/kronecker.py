"""Products with Kronecker matrices (B A) (x) K that are never made.

With X = x reshaped to (w, s), the product is B (A X) K^T, flattened; where s does not divide a
width, x is padded with zeros and the answer cropped.

Axes: T tokens, I in, O out, R rank, s kernel size, n kernels of one size, w = ceil(I / s),
h = ceil(O / s).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

# Measured on a CPU at R = 8 and 32, I = O = 1024: from here on spread matrices win.
MANY_TOKENS = 64


def gated_kronecker(
    x: Tensor,
    meta_a: Tensor,
    meta_b: Tensor,
    kernels: Sequence[Tensor],
    gates: Sequence[Tensor],
    out_features: int,
) -> Tensor:
    """Sum of gated Kronecker products over one shared low-rank matrix.

        y_t = sum over sizes s, kernels e of gates[s]_te ((B[:h] A[:, :w]) (x) K_e) x_t

    The kernels of one size share A X and B, so the cost grows with the number of sizes.
    Differentiable in everything.

    Args:
        x: (T, I).
        meta_a: (R, at least w of the smallest size).
        meta_b: (at least h of the smallest size, R).
        kernels: One (n, s, s) a size.
        gates: One (T, n) a size.
        out_features: O.

    Returns:
        (T, O).
    """
    mixed = [
        functional.linear(own, stack.flatten(1).T).unflatten(1, stack.shape[1:])
        for own, stack in zip(gates, kernels, strict=True)
    ]  # a (T, s, s) kernel a token and size
    apply = _by_blocks if x.shape[0] < MANY_TOKENS else _by_spread_matrices
    return apply(x, meta_a, meta_b, mixed, out_features)


def _by_blocks(
    x: Tensor, meta_a: Tensor, meta_b: Tensor, mixed: Sequence[Tensor], out_features: int
) -> Tensor:
    """A small product a token; no wasted arithmetic, but slow for many tokens."""
    tokens, in_features = x.shape
    parts = []
    for kernel in mixed:
        size = kernel.shape[-1]
        columns, rows = math.ceil(in_features / size), math.ceil(out_features / size)
        padded = functional.pad(x, (0, columns * size - in_features))
        blocks = padded.unflatten(1, (columns, size))  # (T, w, s)
        middle = torch.bmm(meta_a[:, :columns].expand(tokens, -1, -1), blocks)  # (T, R, s)
        out = torch.bmm(
            meta_b[:rows].expand(tokens, -1, -1), torch.bmm(middle, kernel.mT)
        )  # (T, h, s)
        parts.append(out.flatten(1)[:, :out_features])
    return torch.stack(parts).sum(0)


def _by_spread_matrices(
    x: Tensor, meta_a: Tensor, meta_b: Tensor, mixed: Sequence[Tensor], out_features: int
) -> Tensor:
    """One LoRA of rank R * sum of s out of A (x) I_s and B (x) I_s: two large products."""
    rank, in_features = meta_a.shape[0], x.shape[1]
    downs, ups = [], []
    for kernel in mixed:
        size = kernel.shape[-1]
        columns, rows = math.ceil(in_features / size), math.ceil(out_features / size)
        unit = torch.eye(size, dtype=meta_a.dtype, device=meta_a.device)
        downs.append(torch.kron(meta_a[:, :columns], unit)[:, :in_features])  # (R * s, I)
        ups.append(torch.kron(meta_b[:rows], unit)[:out_features])  # (O, R * s)
    middle = functional.linear(x, torch.cat(downs))  # (T, R * sum of s)
    widths = [down.shape[0] for down in downs]
    turned = [
        torch.bmm(part.unflatten(1, (rank, -1)), kernel.mT).flatten(1)
        for part, kernel in zip(middle.split(widths, dim=1), mixed, strict=True)
    ]
    return functional.linear(torch.cat(turned, dim=1), torch.cat(ups, dim=1))
