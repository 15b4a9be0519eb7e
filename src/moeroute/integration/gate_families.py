"""The gates of transformers' model families, as rows over the routers of the same convention.

A gate is known by the name of its class. Each of these answers (router_logits, weights, ids), which
is what the hook on a gate relies on; the other routers of transformers are named in
`OTHER_CONVENTIONS` with the reason why no method can stand at them.

This module imports no part of transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from operator import attrgetter
from types import MappingProxyType
from typing import Any

from moeroute.integration import gate_routers
from moeroute.routers.composed import ComposedRouter

MakeRouter = Callable[[Any, tuple[int, int, int]], ComposedRouter]
"""From a gate and (hidden_size, num_experts, top_k) to an untrained router of its convention."""


def _one(_: Any) -> float:
    return 1.0


@dataclass(frozen=True, kw_only=True, slots=True)
class GateFamily:
    """How a class of gates is read.

    Attributes:
        make: Makes a router of the same convention.
        weight: Where its (E, H) weight is.
        top_k: Where its number of slots is.
        scaling: From the gate to the factor on its weights.
        answers_probs: Whether it answers softmax probabilities in the place of logits.
    """

    make: MakeRouter
    weight: str = "weight"
    top_k: str = "top_k"
    scaling: Callable[[Any], float] = _one
    answers_probs: bool = False


SCALING = attrgetter("routed_scaling_factor")
MIXTRAL = GateFamily(make=gate_routers.mixtral)
QWEN = GateFamily(make=gate_routers.qwen)
GRANITE = GateFamily(make=gate_routers.granite)
DEEPSEEK_V2 = GateFamily(make=gate_routers.deepseek_v2, scaling=SCALING)
DEEPSEEK_V3 = GateFamily(make=gate_routers.deepseek_v3, scaling=SCALING)
DEEPSEEK_V4 = GateFamily(make=gate_routers.deepseek_v4, scaling=SCALING)
ERNIE = GateFamily(make=gate_routers.ernie)
GEMMA4 = GateFamily(
    make=gate_routers.gemma4, weight="proj.weight", top_k="config.top_k_experts", answers_probs=True
)
HUNYUAN3 = GateFamily(make=gate_routers.hunyuan3, scaling=attrgetter("router_scaling_factor"))
MINIMAX_M2 = GateFamily(make=gate_routers.minimax_m2)
MISTRAL4 = GateFamily(make=gate_routers.mistral4, scaling=SCALING)

GATES: Mapping[str, GateFamily] = MappingProxyType(
    {
        "AXK1TopkRouter": DEEPSEEK_V3,
        "AXK2TopkRouter": DEEPSEEK_V3,
        "AfmoeTokenChoiceRouter": GateFamily(
            make=gate_routers.afmoe, weight="gate.weight", scaling=attrgetter("route_scale")
        ),
        "AriaTextTopKRouter": GRANITE,
        "BailingHybridTopkRouter": DEEPSEEK_V3,
        "BeamTopKRouter": GateFamily(make=gate_routers.beam),
        "Cohere2MoeTopKRouter": GateFamily(make=gate_routers.cohere),
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
        "FlintTopKRouter": GateFamily(make=gate_routers.flint),
        "Gemma4TextRouter": GEMMA4,
        "Glm4MoeLiteTopkRouter": DEEPSEEK_V3,
        "Glm4MoeTopkRouter": DEEPSEEK_V3,
        "Glm4vMoeTextTopkRouter": DEEPSEEK_V3,
        "Glm5NextTextTopkRouter": DEEPSEEK_V3,
        "GlmMoeDsaTopkRouter": DEEPSEEK_V3,
        "GptOssTopKRouter": GateFamily(make=gate_routers.gpt_oss),
        "GraniteMoeHybridTopKRouter": GRANITE,
        "GraniteMoeSWATopKRouter": GRANITE,
        "GraniteMoeSharedTopKRouter": GRANITE,
        "GraniteMoeTopKRouter": GRANITE,
        "HYV3TopKRouter": HUNYUAN3,
        "HYV4TopkRouter": DEEPSEEK_V3,
        "HunYuanMoEV1Gate": GateFamily(make=gate_routers.mixtral, weight="wg.weight"),
        "Inkling2TopKRouter": DEEPSEEK_V4,
        "JambaTopKRouter": GateFamily(make=gate_routers.jamba),
        "KimiLinearTopkRouter": DEEPSEEK_V3,
        "Kolibri1TopKRouter": GateFamily(make=gate_routers.kolibri),
        "LagunaTopKRouter": GateFamily(make=gate_routers.laguna),
        "Lfm2MoeTopKRouter": GateFamily(make=gate_routers.lfm2, scaling=SCALING),
        "LongcatFlashTopkRouter": GateFamily(
            make=gate_routers.longcat, weight="classifier.weight", scaling=SCALING
        ),
        "MellumTopKRouter": QWEN,
        "MiMoV2FlashTopkRouter": DEEPSEEK_V3,
        "MiniMaxM2TopKRouter": MINIMAX_M2,
        "MiniMaxM3VLTopKRouter": MINIMAX_M2,
        "MiniMaxTopKRouter": MIXTRAL,
        "Mistral4TopkRouter": MISTRAL4,
        "MistralLarge4TextTopkRouter": MISTRAL4,
        "MixtralTopKRouter": MIXTRAL,
        "MuseSparkTopkRouter": GateFamily(make=gate_routers.muse_spark, scaling=SCALING),
        "NemotronHTopkRouter": DEEPSEEK_V3,
        "OlmoeTopKRouter": QWEN,
        "OpenAIPrivacyFilterTopKRouter": GateFamily(
            make=gate_routers.privacy_filter, scaling=gate_routers.by_slots
        ),
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
