"""The gates of transformers' model families, as rows over the routers of the same convention.

A gate is known by the name of its class. Each of these answers (router_logits, weights, ids), which
is what the hook on a gate relies on; the other routers of transformers are named in
`OTHER_CONVENTIONS` with the reason why no method can stand at them.

This module imports no part of transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from moeroute.ops.probs import TINY, sigmoid_probs, sqrt_softplus_probs
from moeroute.routers import families, families_sigmoid, families_softmax
from moeroute.routers.composed import ComposedRouter

Sizes = tuple[int, int, int]
MakeRouter = Callable[[Any, Sizes], ComposedRouter]
"""From a gate and (hidden_size, num_experts, top_k) to an untrained router of its convention."""


@dataclass(frozen=True, kw_only=True, slots=True)
class GateFamily:
    """How a class of gates is read.

    Attributes:
        make: Makes a router of the same convention.
        weight: Where its (E, H) weight is.
        top_k: Where its number of slots is.
        scaling: Where the factor on its weights is; "" if it has none.
        answers_probs: Whether it answers softmax probabilities in the place of logits.
    """

    make: MakeRouter
    weight: str = "weight"
    top_k: str = "top_k"
    scaling: str = ""
    answers_probs: bool = False


def _mixtral(_: Any, sizes: Sizes) -> ComposedRouter:
    return families.mixtral_router(*sizes)


def _qwen(gate: Any, sizes: Sizes) -> ComposedRouter:
    return families.qwen_moe_router(*sizes, norm_topk_prob=gate.norm_topk_prob)


def _jamba(_: Any, sizes: Sizes) -> ComposedRouter:
    return families.qwen_moe_router(*sizes, norm_topk_prob=False)


def _granite(_: Any, sizes: Sizes) -> ComposedRouter:
    return families_softmax.granite_moe_router(*sizes)


def _gpt_oss(_: Any, sizes: Sizes) -> ComposedRouter:
    return families.gpt_oss_router(*sizes)


def _cohere(gate: Any, sizes: Sizes) -> ComposedRouter:
    if gate.expert_selection_fn == "softmax":
        return families_softmax.granite_moe_router(*sizes)
    return families_sigmoid.flint_router(*sizes, norm_topk_prob=gate.norm_topk_prob)


def _deepseek_v2(gate: Any, sizes: Sizes) -> ComposedRouter:
    grouped = gate.topk_method != "greedy"
    return families_softmax.deepseek_v2_router(
        *sizes,
        num_groups=gate.num_group if grouped else 1,
        top_k_groups=gate.topk_group if grouped else 1,
        routed_scaling_factor=gate.routed_scaling_factor,
    )


def _mistral4(gate: Any, sizes: Sizes) -> ComposedRouter:
    return families_softmax.mistral4_router(
        *sizes,
        num_groups=gate.num_group,
        top_k_groups=gate.topk_group,
        norm_topk_prob=gate.norm_topk_prob,
        routed_scaling_factor=gate.routed_scaling_factor,
    )


def _ernie(gate: Any, sizes: Sizes) -> ComposedRouter:
    return families_softmax.ernie_router(*sizes, norm_min=gate.norm_min)


def _longcat(gate: Any, sizes: Sizes) -> ComposedRouter:
    return families_softmax.longcat_router(*sizes, routed_scaling_factor=gate.routed_scaling_factor)


def _gemma4(gate: Any, sizes: Sizes) -> ComposedRouter:
    return families_softmax.gemma4_router(*sizes, eps=gate.eps)


def _deepseek_v3(gate: Any, sizes: Sizes) -> ComposedRouter:
    return families.deepseek_v3_router(
        *sizes,
        num_groups=gate.num_group or 1,
        top_k_groups=gate.topk_group or 1,
        norm_topk_prob=gate.norm_topk_prob,
        routed_scaling_factor=gate.routed_scaling_factor,
    )


def _beam(gate: Any, sizes: Sizes) -> ComposedRouter:
    return families.deepseek_v3_router(
        *sizes,
        num_groups=gate.num_group,
        top_k_groups=gate.topk_group,
        norm_topk_prob=gate.norm_topk_prob,
        routed_scaling_factor=1.0,  # its block scales what the experts answer
    )


def _minimax_m2(_: Any, sizes: Sizes) -> ComposedRouter:
    return families_sigmoid.minimax_m2_router(*sizes)


def _afmoe(gate: Any, sizes: Sizes) -> ComposedRouter:
    return families_sigmoid.minimax_m2_router(
        *sizes, normalize_eps=TINY, routed_scaling_factor=gate.route_scale
    )


def _hunyuan3(gate: Any, sizes: Sizes) -> ComposedRouter:
    return families_sigmoid.minimax_m2_router(
        *sizes, normalize_eps=TINY, routed_scaling_factor=gate.router_scaling_factor
    )


def _laguna(gate: Any, sizes: Sizes) -> ComposedRouter:
    return families_sigmoid.laguna_router(*sizes, softcap=gate.router_logit_softcapping)


def _lfm2(gate: Any, sizes: Sizes) -> ComposedRouter:
    return families_sigmoid.lfm2_moe_router(
        *sizes,
        use_expert_bias=gate.use_expert_bias,
        norm_topk_prob=gate.norm_topk_prob,
        routed_scaling_factor=gate.routed_scaling_factor,
    )


def _muse_spark(gate: Any, sizes: Sizes) -> ComposedRouter:
    return families_sigmoid.muse_spark_router(
        *sizes,
        output_multiplier=gate.output_multiplier,
        routed_scaling_factor=gate.routed_scaling_factor,
    )


def _flint(gate: Any, sizes: Sizes) -> ComposedRouter:
    return families_sigmoid.flint_router(*sizes, norm_topk_prob=gate.norm_topk_prob)


def _kolibri(gate: Any, sizes: Sizes) -> ComposedRouter:
    return families_sigmoid.kolibri_router(*sizes, norm_topk_prob=gate.norm_topk_prob)


def _deepseek_v4(gate: Any, sizes: Sizes) -> ComposedRouter:
    name = type(gate.score_fn).__name__
    return families_sigmoid.deepseek_v4_router(
        *sizes, probs=SCORE_FUNCTIONS[name], routed_scaling_factor=gate.routed_scaling_factor
    )


SCORE_FUNCTIONS = MappingProxyType(
    {
        "SqrtSoftplusActivation": sqrt_softplus_probs,
        "Sigmoid": sigmoid_probs,
    }
)

SCALING = "routed_scaling_factor"
MIXTRAL = GateFamily(make=_mixtral)
QWEN = GateFamily(make=_qwen)
GRANITE = GateFamily(make=_granite)
GPT_OSS = GateFamily(make=_gpt_oss)
DEEPSEEK_V2 = GateFamily(make=_deepseek_v2, scaling=SCALING)
DEEPSEEK_V3 = GateFamily(make=_deepseek_v3, scaling=SCALING)
DEEPSEEK_V4 = GateFamily(make=_deepseek_v4, scaling=SCALING)
ERNIE = GateFamily(make=_ernie)
GEMMA4 = GateFamily(
    make=_gemma4, weight="proj.weight", top_k="config.top_k_experts", answers_probs=True
)
HUNYUAN3 = GateFamily(make=_hunyuan3, scaling="router_scaling_factor")
MINIMAX_M2 = GateFamily(make=_minimax_m2)
MISTRAL4 = GateFamily(make=_mistral4, scaling=SCALING)

GATES: Mapping[str, GateFamily] = MappingProxyType(
    {
        "AXK1TopkRouter": DEEPSEEK_V3,
        "AXK2TopkRouter": DEEPSEEK_V3,
        "AfmoeTokenChoiceRouter": GateFamily(
            make=_afmoe, weight="gate.weight", scaling="route_scale"
        ),
        "AriaTextTopKRouter": GRANITE,
        "BailingHybridTopkRouter": DEEPSEEK_V3,
        "BeamTopKRouter": GateFamily(make=_beam),
        "Cohere2MoeTopKRouter": GateFamily(make=_cohere),
        "DeepseekOcr2TextTopkRouter": DEEPSEEK_V2,
        "DeepseekV2TopkRouter": DEEPSEEK_V2,
        "DeepseekV32TopkRouter": DEEPSEEK_V3,
        "DeepseekV3TopkRouter": DEEPSEEK_V3,
        "DeepseekV4TopKRouter": DEEPSEEK_V4,
        "DiffusionGemmaTextRouter": GEMMA4,
        "Dots1TopkRouter": DEEPSEEK_V3,
        "Dots3NoteTextTopkRouter": DEEPSEEK_V3,
        "Dots3NoteVisionTopKRouter": HUNYUAN3,
        "Ernie4_5_MoeTopKRouter": ERNIE,
        "Ernie4_5_VLMoeMoeTopKRouter": ERNIE,
        "ExaoneMoeTopkRouter": DEEPSEEK_V3,
        "FlexOlmoTopKRouter": QWEN,
        "FlintTopKRouter": GateFamily(make=_flint),
        "Gemma4TextRouter": GEMMA4,
        "Glm4MoeLiteTopkRouter": DEEPSEEK_V3,
        "Glm4MoeTopkRouter": DEEPSEEK_V3,
        "Glm4vMoeTextTopkRouter": DEEPSEEK_V3,
        "Glm5NextTextTopkRouter": DEEPSEEK_V3,
        "GlmMoeDsaTopkRouter": DEEPSEEK_V3,
        "GptOssTopKRouter": GPT_OSS,
        "GraniteMoeHybridTopKRouter": GRANITE,
        "GraniteMoeSWATopKRouter": GRANITE,
        "GraniteMoeSharedTopKRouter": GRANITE,
        "GraniteMoeTopKRouter": GRANITE,
        "HYV3TopKRouter": HUNYUAN3,
        "HYV4TopkRouter": DEEPSEEK_V3,
        "HunYuanMoEV1Gate": GateFamily(make=_mixtral, weight="wg.weight"),
        "Inkling2TopKRouter": DEEPSEEK_V4,
        "JambaTopKRouter": GateFamily(make=_jamba),
        "KimiLinearTopkRouter": DEEPSEEK_V3,
        "Kolibri1TopKRouter": GateFamily(make=_kolibri),
        "LagunaTopKRouter": GateFamily(make=_laguna),
        "Lfm2MoeTopKRouter": GateFamily(make=_lfm2, scaling=SCALING),
        "LongcatFlashTopkRouter": GateFamily(
            make=_longcat, weight="classifier.weight", scaling=SCALING
        ),
        "MellumTopKRouter": QWEN,
        "MiMoV2FlashTopkRouter": DEEPSEEK_V3,
        "MiniMaxM2TopKRouter": MINIMAX_M2,
        "MiniMaxM3VLTopKRouter": MINIMAX_M2,
        "MiniMaxTopKRouter": MIXTRAL,
        "Mistral4TopkRouter": MISTRAL4,
        "MistralLarge4TextTopkRouter": MISTRAL4,
        "MixtralTopKRouter": MIXTRAL,
        "MuseSparkTopkRouter": GateFamily(make=_muse_spark, scaling=SCALING),
        "NemotronHTopkRouter": DEEPSEEK_V3,
        "OlmoeTopKRouter": QWEN,
        "OpenAIPrivacyFilterTopKRouter": GPT_OSS,
        "Qwen2MoeTopKRouter": QWEN,
        "Qwen3MoeTopKRouter": QWEN,
        "Qwen3NextTopKRouter": QWEN,
        "Qwen3OmniMoeTalkerTextTopKRouter": QWEN,
        "Qwen3OmniMoeTextTopKRouter": MIXTRAL,
        "Qwen3OmniMoeThinkerTextTopKRouter": QWEN,
        "Qwen3VLMoeTextTopKRouter": MIXTRAL,
        "Qwen3_5MoeTopKRouter": MIXTRAL,
        "Qwen4ExpTextTopKRouter": QWEN,
        "SolarOpenTopkRouter": DEEPSEEK_V3,
        "Step3p7TopKRouter": MINIMAX_M2,
        "UnlimitedOcrTextTopkRouter": DEEPSEEK_V2,
    }
)
"""Class of a gate -> how it is read."""

OTHER_CONVENTIONS: Mapping[str, str] = MappingProxyType(
    {
        "DbrxRouter": "it answers logits alone, and its block chooses",
        "DeepseekV4HashRouter": "it chooses by token id, not by logits",
        "InklingTopkRouter": "it weighs the shared experts as well",
        "JetMoeTopKGating": "it answers rows in the order of experts",
        "Llama4Router": "its weights multiply the experts' input",
        "NllbMoeTop2Router": "it answers dispatch masks",
        "PhimoeTopKRouter": "it chooses by SparseMixer, which is not among our parts",
        "SwitchTransformersTop1Router": "it answers dispatch masks",
        "ZayaRouter": "it hands a state of its own to the next layer",
    }
)
"""Class of a router at which no method can stand -> why."""
