"""More routers of checkpoints whose probabilities do not compete, as rows over the shared parts.

See `moeroute.routers.families` for what all of them have in common.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from moeroute.ops.probs import TINY, sigmoid_probs, sqrt_softplus_probs
from moeroute.routers.composed import ComposedRouter
from moeroute.routers.score_maps import ScaledScore, SoftCappedScore
from moeroute.routers.scores import LinearScore
from moeroute.routers.select import TopK
from moeroute.routers.selection_bias import SelectionBias
from moeroute.routers.top_k_logits import TopKLogits


def minimax_m2_router(
    hidden_size: int,
    num_experts: int,
    top_k: int,
    *,
    normalize_eps: float = 0.0,
    routed_scaling_factor: float = 1.0,
) -> ComposedRouter:
    """Sigmoid, bias for choosing only, renormalised, scaled (MiniMax-M2, Hunyuan 3, Trinity)."""
    select = TopK(
        top_k,
        probs=sigmoid_probs,
        normalize=True,
        normalize_eps=normalize_eps,
        routed_scaling_factor=routed_scaling_factor,
        selection_bias=SelectionBias(num_experts),
    )
    return ComposedRouter(LinearScore(hidden_size, num_experts), select)


def laguna_router(
    hidden_size: int, num_experts: int, top_k: int, *, softcap: float = 0.0
) -> ComposedRouter:
    """As MiniMax-M2, on logits within +-softcap; 0 leaves them as they are (Laguna)."""
    plain = minimax_m2_router(hidden_size, num_experts, top_k)
    if not softcap:
        return plain
    return ComposedRouter(
        SoftCappedScore(LinearScore(hidden_size, num_experts), cap=softcap), plain.select
    )


def muse_spark_router(
    hidden_size: int,
    num_experts: int,
    top_k: int,
    *,
    output_multiplier: float = 1.0,
    routed_scaling_factor: float = 1.0,
) -> ComposedRouter:
    """As MiniMax-M2, on logits times a constant (Muse Spark)."""
    select = minimax_m2_router(
        hidden_size,
        num_experts,
        top_k,
        normalize_eps=1e-15,
        routed_scaling_factor=routed_scaling_factor,
    ).select
    score = ScaledScore(LinearScore(hidden_size, num_experts), factor=output_multiplier)
    return ComposedRouter(score, select)


def lfm2_moe_router(
    hidden_size: int,
    num_experts: int,
    top_k: int,
    *,
    use_expert_bias: bool = True,
    norm_topk_prob: bool = True,
    routed_scaling_factor: float = 1.0,
) -> ComposedRouter:
    """Sigmoid, perhaps a bias for choosing, perhaps renormalised, scaled (LFM2-MoE)."""
    select = TopK(
        top_k,
        probs=sigmoid_probs,
        normalize=norm_topk_prob,
        normalize_eps=1e-6,
        routed_scaling_factor=routed_scaling_factor,
        selection_bias=SelectionBias(num_experts) if use_expert_bias else None,
    )
    return ComposedRouter(LinearScore(hidden_size, num_experts), select)


def flint_router(
    hidden_size: int, num_experts: int, top_k: int, *, norm_topk_prob: bool = True
) -> ComposedRouter:
    """Sigmoid, top-k, perhaps renormalised, no bias (Flint; Cohere 2 MoE with sigmoid)."""
    select = TopK(top_k, probs=sigmoid_probs, normalize=norm_topk_prob)
    return ComposedRouter(LinearScore(hidden_size, num_experts), select)


def kolibri_router(
    hidden_size: int, num_experts: int, top_k: int, *, norm_topk_prob: bool = True
) -> ComposedRouter:
    """Bias added to the logits for choosing, sigmoid of the chosen (Kolibri)."""
    select = TopKLogits(top_k, normalize=norm_topk_prob, selection_bias=SelectionBias(num_experts))
    return ComposedRouter(LinearScore(hidden_size, num_experts), select)


def llama4_router(hidden_size: int, num_experts: int, top_k: int) -> ComposedRouter:
    """Top-k of the logits, sigmoid of the chosen (Llama 4).

    Llama 4 multiplies the experts' input by these weights, not their output.
    """
    return ComposedRouter(LinearScore(hidden_size, num_experts), TopKLogits(top_k))


def deepseek_v4_router(
    hidden_size: int,
    num_experts: int,
    top_k: int,
    *,
    probs: Callable[[Tensor], Tensor] = sqrt_softplus_probs,
    routed_scaling_factor: float = 1.0,
) -> ComposedRouter:
    """A configurable score, bias for choosing only, renormalised, scaled (DeepSeek-V4, Inkling 2).

    DeepSeek-V4's layers that choose by token id share its score and its weights, but not this
    selection.
    """
    select = TopK(
        top_k,
        probs=probs,
        normalize=True,
        normalize_eps=TINY,
        routed_scaling_factor=routed_scaling_factor,
        selection_bias=SelectionBias(num_experts),
    )
    return ComposedRouter(LinearScore(hidden_size, num_experts), select)
