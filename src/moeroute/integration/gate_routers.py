"""From a transformers gate to an untrained router of the same convention, family by family.

Each function takes the gate, whose settings it reads, and (hidden_size, num_experts, top_k).
"""

from __future__ import annotations

from types import MappingProxyType
from typing import Any

from moeroute.ops.probs import TINY, sigmoid_probs, sqrt_softplus_probs
from moeroute.routers import families, families_sigmoid, families_softmax
from moeroute.routers.composed import ComposedRouter
from moeroute.routers.select import TopK

Sizes = tuple[int, int, int]

SCORE_FUNCTIONS = MappingProxyType(
    {
        "SqrtSoftplusActivation": sqrt_softplus_probs,
        "Sigmoid": sigmoid_probs,
    }
)


def mixtral(_: Any, sizes: Sizes) -> ComposedRouter:
    """Mixtral and those that route as it does."""
    return families.mixtral_router(*sizes)


def qwen(gate: Any, sizes: Sizes) -> ComposedRouter:
    """Renormalised or not, as the gate says."""
    return families.qwen_moe_router(*sizes, norm_topk_prob=gate.norm_topk_prob)


def jamba(_: Any, sizes: Sizes) -> ComposedRouter:
    """Never renormalised."""
    return families.qwen_moe_router(*sizes, norm_topk_prob=False)


def granite(_: Any, sizes: Sizes) -> ComposedRouter:
    """Softmax over the chosen."""
    return families_softmax.granite_moe_router(*sizes)


def gpt_oss(_: Any, sizes: Sizes) -> ComposedRouter:
    """Softmax over the chosen, with a bias."""
    return families.gpt_oss_router(*sizes)


def by_slots(gate: Any) -> float:
    """The factor on the weights of OpenAI Privacy Filter."""
    return 1.0 / gate.top_k


def privacy_filter(gate: Any, sizes: Sizes) -> ComposedRouter:
    """As gpt-oss, divided by the number of slots, which its block multiplies by."""
    score = families.gpt_oss_router(*sizes).score
    return ComposedRouter(score, TopK(sizes[2], routed_scaling_factor=by_slots(gate)))


def cohere(gate: Any, sizes: Sizes) -> ComposedRouter:
    """Softmax or sigmoid of the chosen, as the gate says."""
    if gate.expert_selection_fn == "softmax":
        return families_softmax.granite_moe_router(*sizes)
    return families_sigmoid.flint_router(*sizes, norm_topk_prob=gate.norm_topk_prob)


def deepseek_v2(gate: Any, sizes: Sizes) -> ComposedRouter:
    """In groups or not, as the gate says."""
    grouped = gate.topk_method != "greedy"
    return families_softmax.deepseek_v2_router(
        *sizes,
        num_groups=gate.num_group if grouped else 1,
        top_k_groups=gate.topk_group if grouped else 1,
        routed_scaling_factor=gate.routed_scaling_factor,
    )


def mistral4(gate: Any, sizes: Sizes) -> ComposedRouter:
    """Softmax in groups."""
    return families_softmax.mistral4_router(
        *sizes,
        num_groups=gate.num_group,
        top_k_groups=gate.topk_group,
        norm_topk_prob=getattr(gate, "norm_topk_prob", True),  # Mistral Large 4 has no choice
        routed_scaling_factor=gate.routed_scaling_factor,
    )


def ernie(gate: Any, sizes: Sizes) -> ComposedRouter:
    """Softmax with a bias for choosing."""
    return families_softmax.ernie_router(*sizes, norm_min=gate.norm_min)


def longcat(gate: Any, sizes: Sizes) -> ComposedRouter:
    """Softmax with a bias for choosing, scaled."""
    return families_softmax.longcat_router(*sizes, routed_scaling_factor=gate.routed_scaling_factor)


def gemma4(gate: Any, sizes: Sizes) -> ComposedRouter:
    """Normed tokens, and a scale an expert."""
    return families_softmax.gemma4_router(*sizes, eps=gate.eps)


def deepseek_v3(gate: Any, sizes: Sizes) -> ComposedRouter:
    """Sigmoid in groups, with a bias for choosing."""
    return families.deepseek_v3_router(
        *sizes,
        num_groups=gate.num_group or 1,
        top_k_groups=gate.topk_group or 1,
        norm_topk_prob=gate.norm_topk_prob,
        routed_scaling_factor=gate.routed_scaling_factor,
    )


def beam(gate: Any, sizes: Sizes) -> ComposedRouter:
    """As DeepSeek-V3; its block scales what the experts answer."""
    return families.deepseek_v3_router(
        *sizes,
        num_groups=gate.num_group,
        top_k_groups=gate.topk_group,
        norm_topk_prob=gate.norm_topk_prob,
        routed_scaling_factor=1.0,
    )


def minimax_m2(_: Any, sizes: Sizes) -> ComposedRouter:
    """Sigmoid with a bias for choosing."""
    return families_sigmoid.minimax_m2_router(*sizes)


def afmoe(gate: Any, sizes: Sizes) -> ComposedRouter:
    """As MiniMax-M2, scaled."""
    return families_sigmoid.minimax_m2_router(
        *sizes, normalize_eps=TINY, routed_scaling_factor=gate.route_scale
    )


def hunyuan3(gate: Any, sizes: Sizes) -> ComposedRouter:
    """As MiniMax-M2, scaled."""
    return families_sigmoid.minimax_m2_router(
        *sizes, normalize_eps=TINY, routed_scaling_factor=gate.router_scaling_factor
    )


def laguna(gate: Any, sizes: Sizes) -> ComposedRouter:
    """As MiniMax-M2, its logits perhaps capped."""
    return families_sigmoid.laguna_router(*sizes, softcap=gate.router_logit_softcapping)


def lfm2(gate: Any, sizes: Sizes) -> ComposedRouter:
    """Sigmoid, with a bias for choosing or without."""
    return families_sigmoid.lfm2_moe_router(
        *sizes,
        use_expert_bias=gate.use_expert_bias,
        norm_topk_prob=gate.norm_topk_prob,
        routed_scaling_factor=gate.routed_scaling_factor,
    )


def muse_spark(gate: Any, sizes: Sizes) -> ComposedRouter:
    """As MiniMax-M2, its logits scaled."""
    return families_sigmoid.muse_spark_router(
        *sizes,
        output_multiplier=gate.output_multiplier,
        routed_scaling_factor=gate.routed_scaling_factor,
    )


def flint(gate: Any, sizes: Sizes) -> ComposedRouter:
    """Sigmoid alone."""
    return families_sigmoid.flint_router(*sizes, norm_topk_prob=gate.norm_topk_prob)


def kolibri(gate: Any, sizes: Sizes) -> ComposedRouter:
    """A bias on logits."""
    return families_sigmoid.kolibri_router(*sizes, norm_topk_prob=gate.norm_topk_prob)


def deepseek_v4(gate: Any, sizes: Sizes) -> ComposedRouter:
    """A score that the config names, with a bias for choosing."""
    name = type(gate.score_fn).__name__
    return families_sigmoid.deepseek_v4_router(
        *sizes, probs=SCORE_FUNCTIONS[name], routed_scaling_factor=gate.routed_scaling_factor
    )
