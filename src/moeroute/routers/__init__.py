"""Routers from parts: a score, then a selection.

The package is also a function: `moeroute.routers(model)` gives the routers that stand in a model.
"""

import sys
from types import ModuleType

from torch import nn

from moeroute.ops.probs import normalized_sigmoid_probs as normalized_sigmoid_probs
from moeroute.ops.probs import sigmoid_probs as sigmoid_probs
from moeroute.ops.probs import softmax_probs as softmax_probs
from moeroute.ops.probs import sqrt_softplus_probs as sqrt_softplus_probs
from moeroute.routers.by_probability import Threshold as Threshold
from moeroute.routers.by_probability import TopP as TopP
from moeroute.routers.capacity import Capacity as Capacity
from moeroute.routers.causal_gate import PreGate as PreGate
from moeroute.routers.chunk_control import ChunkControl as ChunkControl
from moeroute.routers.collect import routers_in as routers_in
from moeroute.routers.composed import ComposedRouter as ComposedRouter
from moeroute.routers.cosine import CosineScore as CosineScore
from moeroute.routers.density import DensityControl as DensityControl
from moeroute.routers.expert_choice import ExpertChoice as ExpertChoice
from moeroute.routers.expert_scale import ExpertScale as ExpertScale
from moeroute.routers.families import deepseek_v3_router as deepseek_v3_router
from moeroute.routers.families import gpt_oss_router as gpt_oss_router
from moeroute.routers.families import mixtral_router as mixtral_router
from moeroute.routers.families import noisy_top_k_router as noisy_top_k_router
from moeroute.routers.families import olmoe_router as olmoe_router
from moeroute.routers.families import qwen_moe_router as qwen_moe_router
from moeroute.routers.families_sigmoid import deepseek_v4_router as deepseek_v4_router
from moeroute.routers.families_sigmoid import flint_router as flint_router
from moeroute.routers.families_sigmoid import kolibri_router as kolibri_router
from moeroute.routers.families_sigmoid import laguna_router as laguna_router
from moeroute.routers.families_sigmoid import lfm2_moe_router as lfm2_moe_router
from moeroute.routers.families_sigmoid import llama4_router as llama4_router
from moeroute.routers.families_sigmoid import minimax_m2_router as minimax_m2_router
from moeroute.routers.families_sigmoid import muse_spark_router as muse_spark_router
from moeroute.routers.families_softmax import deepseek_v2_router as deepseek_v2_router
from moeroute.routers.families_softmax import ernie_router as ernie_router
from moeroute.routers.families_softmax import gemma4_router as gemma4_router
from moeroute.routers.families_softmax import granite_moe_router as granite_moe_router
from moeroute.routers.families_softmax import longcat_router as longcat_router
from moeroute.routers.families_softmax import mistral4_router as mistral4_router
from moeroute.routers.fixed import fixed as fixed
from moeroute.routers.group_top_k import GroupTopK as GroupTopK
from moeroute.routers.hash import HashScore as HashScore
from moeroute.routers.hash import balanced_table as balanced_table
from moeroute.routers.jitter import JitteredScore as JitteredScore
from moeroute.routers.mlp_score import MLPScore as MLPScore
from moeroute.routers.momentum import MomentumRouter as MomentumRouter
from moeroute.routers.noisy import NoisyScore as NoisyScore
from moeroute.routers.pathway import PathwayRouter as PathwayRouter
from moeroute.routers.positive import Positive as Positive
from moeroute.routers.positive import PositiveRMS as PositiveRMS
from moeroute.routers.pre_gate import PreGateRouter as PreGateRouter
from moeroute.routers.recurrent import RecurrentRouter as RecurrentRouter
from moeroute.routers.running_load import RunningLoad as RunningLoad
from moeroute.routers.score_maps import NormedScore as NormedScore
from moeroute.routers.score_maps import ScaledScore as ScaledScore
from moeroute.routers.score_maps import SoftCappedScore as SoftCappedScore
from moeroute.routers.scores import LinearScore as LinearScore
from moeroute.routers.scores import NoisyLinearScore as NoisyLinearScore
from moeroute.routers.scores import Score as Score
from moeroute.routers.select import All as All
from moeroute.routers.select import Select as Select
from moeroute.routers.select import Selection as Selection
from moeroute.routers.select import TopK as TopK
from moeroute.routers.select import TopKSoftmax as TopKSoftmax
from moeroute.routers.selection_bias import SelectionBias as SelectionBias
from moeroute.routers.sequence_capacity import SequenceCapacity as SequenceCapacity
from moeroute.routers.sinkhorn import SinkhornTopK as SinkhornTopK
from moeroute.routers.sinkhorn import base_router as base_router
from moeroute.routers.top_k_logits import TopKLogits as TopKLogits

__all__ = [
    "All",
    "Capacity",
    "ChunkControl",
    "ComposedRouter",
    "CosineScore",
    "DensityControl",
    "ExpertChoice",
    "ExpertScale",
    "GroupTopK",
    "HashScore",
    "JitteredScore",
    "LinearScore",
    "MLPScore",
    "MomentumRouter",
    "NoisyLinearScore",
    "NoisyScore",
    "NormedScore",
    "PathwayRouter",
    "Positive",
    "PositiveRMS",
    "PreGate",
    "PreGateRouter",
    "RecurrentRouter",
    "RunningLoad",
    "ScaledScore",
    "Score",
    "Select",
    "Selection",
    "SelectionBias",
    "SequenceCapacity",
    "SinkhornTopK",
    "SoftCappedScore",
    "Threshold",
    "TopK",
    "TopKLogits",
    "TopKSoftmax",
    "TopP",
    "balanced_table",
    "base_router",
    "deepseek_v2_router",
    "deepseek_v3_router",
    "deepseek_v4_router",
    "ernie_router",
    "fixed",
    "flint_router",
    "gemma4_router",
    "gpt_oss_router",
    "granite_moe_router",
    "kolibri_router",
    "laguna_router",
    "lfm2_moe_router",
    "llama4_router",
    "longcat_router",
    "minimax_m2_router",
    "mistral4_router",
    "mixtral_router",
    "muse_spark_router",
    "noisy_top_k_router",
    "normalized_sigmoid_probs",
    "olmoe_router",
    "qwen_moe_router",
    "routers_in",
    "sigmoid_probs",
    "softmax_probs",
    "sqrt_softplus_probs",
]


class _CallablePackage(ModuleType):
    """A package that answers a call with the routers of a model."""

    def __call__(self, model: nn.Module) -> dict[str, nn.Module]:
        """Every router of a model, by the full module name of the layer that hosts it."""
        return routers_in(model)


sys.modules[__name__].__class__ = _CallablePackage
