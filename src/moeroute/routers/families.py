"""The routers of well-known checkpoints, as rows over the shared parts.

Each gives the logits, weights and ids of transformers' router of the same family in float32. In
lower precision pass `compute_dtype` where the family computes its logits in the model's dtype.
"""

from __future__ import annotations

import torch

from moeroute.routers.composed import ComposedRouter
from moeroute.routers.scores import LinearScore, NoisyLinearScore
from moeroute.routers.select import GroupTopK, TopK, TopKSoftmax
from moeroute.routers.selection_bias import SelectionBias


def mixtral_router(
    hidden_size: int, num_experts: int, top_k: int, *, compute_dtype: torch.dtype | None = None
) -> ComposedRouter:
    """Softmax over all, top-k, always renormalised (Mixtral, arXiv 2401.04088)."""
    score = LinearScore(hidden_size, num_experts, compute_dtype=compute_dtype)
    return ComposedRouter(score, TopK(top_k, normalize=True))


def qwen_moe_router(
    hidden_size: int,
    num_experts: int,
    top_k: int,
    *,
    norm_topk_prob: bool,
    compute_dtype: torch.dtype | None = None,
) -> ComposedRouter:
    """Softmax over all, top-k, renormalised if norm_topk_prob (Qwen3-MoE, arXiv 2505.09388)."""
    score = LinearScore(hidden_size, num_experts, compute_dtype=compute_dtype)
    return ComposedRouter(score, TopK(top_k, normalize=norm_topk_prob))


def olmoe_router(
    hidden_size: int,
    num_experts: int,
    top_k: int,
    *,
    norm_topk_prob: bool = False,
    compute_dtype: torch.dtype | None = None,
) -> ComposedRouter:
    """Softmax over all, top-k, by default not renormalised (OLMoE, arXiv 2409.02060)."""
    score = LinearScore(hidden_size, num_experts, compute_dtype=compute_dtype)
    return ComposedRouter(score, TopK(top_k, normalize=norm_topk_prob))


def deepseek_v3_router(
    hidden_size: int,
    num_experts: int,
    top_k: int,
    *,
    num_groups: int = 1,
    top_k_groups: int = 1,
    norm_topk_prob: bool = True,
    routed_scaling_factor: float = 2.5,
) -> ComposedRouter:
    """Sigmoid, selection bias, group limit, scaled (DeepSeek-V3, arXiv 2412.19437)."""
    select = GroupTopK(
        top_k,
        num_groups=num_groups,
        top_k_groups=top_k_groups,
        selection_bias=SelectionBias(num_experts),
        normalize=norm_topk_prob,
        routed_scaling_factor=routed_scaling_factor,
    )
    return ComposedRouter(LinearScore(hidden_size, num_experts), select)


def gpt_oss_router(
    hidden_size: int, num_experts: int, top_k: int, *, compute_dtype: torch.dtype | None = None
) -> ComposedRouter:
    """Router bias, top-k of the logits, softmax over the chosen (gpt-oss, arXiv 2508.10925)."""
    score = LinearScore(hidden_size, num_experts, bias=True, compute_dtype=compute_dtype)
    return ComposedRouter(score, TopKSoftmax(top_k))


def noisy_top_k_router(hidden_size: int, num_experts: int, top_k: int) -> ComposedRouter:
    """Noisy top-k gating: learned noise in training, softmax over the chosen (arXiv 1701.06538)."""
    return ComposedRouter(NoisyLinearScore(hidden_size, num_experts), TopKSoftmax(top_k))
