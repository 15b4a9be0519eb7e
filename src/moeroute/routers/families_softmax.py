"""More routers of checkpoints whose probabilities are a softmax, as rows over the shared parts.

See `moeroute.routers.families` for what all of them have in common.
"""

from __future__ import annotations

from moeroute.ops.probs import softmax_probs
from moeroute.routers.composed import ComposedRouter
from moeroute.routers.expert_scale import ExpertScale
from moeroute.routers.group_top_k import GroupTopK
from moeroute.routers.score_maps import NormedScore
from moeroute.routers.scores import LinearScore
from moeroute.routers.select import TopK, TopKSoftmax
from moeroute.routers.selection_bias import SelectionBias


def granite_moe_router(hidden_size: int, num_experts: int, top_k: int) -> ComposedRouter:
    """Top-k of the logits, softmax over the chosen, no bias (Granite MoE, Aria, JetMoE, Cohere)."""
    return ComposedRouter(LinearScore(hidden_size, num_experts), TopKSoftmax(top_k))


def deepseek_v2_router(
    hidden_size: int,
    num_experts: int,
    top_k: int,
    *,
    num_groups: int = 1,
    top_k_groups: int = 1,
    routed_scaling_factor: float = 1.0,
) -> ComposedRouter:
    """Softmax, groups by their best expert, scaled, not renormalised (DeepSeek-V2, 2405.04434).

    As transformers has it; the original code renormalises instead of scaling where a checkpoint has
    norm_topk_prob. num_groups=1 is "greedy".
    """
    select = GroupTopK(
        top_k,
        num_groups=num_groups,
        top_k_groups=top_k_groups,
        group_score_size=1,
        probs=softmax_probs,
        normalize=False,
        routed_scaling_factor=routed_scaling_factor,
    )
    return ComposedRouter(LinearScore(hidden_size, num_experts), select)


def mistral4_router(
    hidden_size: int,
    num_experts: int,
    top_k: int,
    *,
    num_groups: int = 1,
    top_k_groups: int = 1,
    norm_topk_prob: bool = True,
    routed_scaling_factor: float = 1.0,
) -> ComposedRouter:
    """Softmax, groups by the sum of their two best, renormalised, scaled (Mistral 4)."""
    select = GroupTopK(
        top_k,
        num_groups=num_groups,
        top_k_groups=top_k_groups,
        probs=softmax_probs,
        normalize=norm_topk_prob,
        routed_scaling_factor=routed_scaling_factor,
    )
    return ComposedRouter(LinearScore(hidden_size, num_experts), select)


def ernie_router(
    hidden_size: int, num_experts: int, top_k: int, *, norm_min: float = 1e-12
) -> ComposedRouter:
    """Softmax, bias for choosing only, renormalised by at least norm_min (ERNIE 4.5)."""
    select = TopK(
        top_k,
        normalize=True,
        normalize_least=norm_min,
        selection_bias=SelectionBias(num_experts),
    )
    return ComposedRouter(LinearScore(hidden_size, num_experts), select)


def longcat_router(
    hidden_size: int, num_experts: int, top_k: int, *, routed_scaling_factor: float = 1.0
) -> ComposedRouter:
    """Softmax, bias for choosing only, scaled, not renormalised (LongCat-Flash).

    num_experts counts the experts that do nothing as well.
    """
    select = TopK(
        top_k,
        normalize=False,
        routed_scaling_factor=routed_scaling_factor,
        selection_bias=SelectionBias(num_experts),
    )
    return ComposedRouter(LinearScore(hidden_size, num_experts), select)


def gemma4_router(
    hidden_size: int, num_experts: int, top_k: int, *, eps: float = 1e-6
) -> ComposedRouter:
    """Normed tokens, softmax, top-k, renormalised, one learned scale an expert (Gemma 4)."""
    score = NormedScore(LinearScore(hidden_size, num_experts), eps=eps)
    return ComposedRouter(score, ExpertScale(TopK(top_k, normalize=True), num_experts))
