"""The routers of well-known checkpoints, as rows over the shared parts.

Each gives the logits, weights, ids and gradients of transformers' router of the same family,
exactly in float32. A checkpoint in lower precision whose gate computes in the model's dtype (all of
these but DeepSeek-V3) is followed with `compute_dtype` set to that dtype; None, the default, is
float32 and chooses better on near-ties. Routing weights are float32 in any case.

Every function takes hidden_size (H), num_experts (E) and top_k (K), and raises ValueError where
they do not fit. A checkpoint's `gate.weight` is `score.weight` here, its `gate.bias` `score.bias`,
its `e_score_correction_bias` the one of `select.selection_bias`.
"""

from __future__ import annotations

import torch

from moeroute.routers.composed import ComposedRouter
from moeroute.routers.group_top_k import GroupTopK
from moeroute.routers.scores import LinearScore, NoisyLinearScore
from moeroute.routers.select import TopK, TopKSoftmax
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
    """Softmax over all, top-k, renormalised if norm_topk_prob.

    Qwen2-MoE has norm_topk_prob False, Qwen3-MoE (arXiv 2505.09388) True; there is no default,
    because the wrong one rescales every output without a sign.
    """
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
    """Sigmoid, selection bias, group limit, renormalised, scaled (DeepSeek-V3, arXiv 2412.19437).

    num_groups and top_k_groups are a checkpoint's `n_group` and `topk_group` (8 and 4 in
    DeepSeek-V3). Computed in float32 like the original. The bias balances the load only if somebody
    calls its `update`.
    """
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
    """Router bias, top-k of logits, softmax over the chosen (gpt-oss, arXiv 2508.10925)."""
    score = LinearScore(hidden_size, num_experts, bias=True, compute_dtype=compute_dtype)
    return ComposedRouter(score, TopKSoftmax(top_k))


def noisy_top_k_router(hidden_size: int, num_experts: int, top_k: int) -> ComposedRouter:
    """Noisy top-k gating: learned noise in training, softmax over the chosen (arXiv 1701.06538).

    The paper trains it with `moeroute.losses.ImportanceLoss`.
    """
    return ComposedRouter(NoisyLinearScore(hidden_size, num_experts), TopKSoftmax(top_k))
