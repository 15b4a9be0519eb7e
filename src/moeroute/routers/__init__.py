"""Routers from parts: a score, then a selection.

The package is also a function: `moeroute.routers(model)` gives the routers that stand in a model.
"""

import sys
from types import ModuleType

from torch import nn

from moeroute.ops.probs import normalized_sigmoid_probs as normalized_sigmoid_probs
from moeroute.ops.probs import sigmoid_probs as sigmoid_probs
from moeroute.ops.probs import softmax_probs as softmax_probs
from moeroute.routers.collect import routers_in as routers_in
from moeroute.routers.composed import ComposedRouter as ComposedRouter
from moeroute.routers.families import deepseek_v3_router as deepseek_v3_router
from moeroute.routers.families import gpt_oss_router as gpt_oss_router
from moeroute.routers.families import mixtral_router as mixtral_router
from moeroute.routers.families import noisy_top_k_router as noisy_top_k_router
from moeroute.routers.families import olmoe_router as olmoe_router
from moeroute.routers.families import qwen_moe_router as qwen_moe_router
from moeroute.routers.group_top_k import GroupTopK as GroupTopK
from moeroute.routers.scores import LinearScore as LinearScore
from moeroute.routers.scores import NoisyLinearScore as NoisyLinearScore
from moeroute.routers.scores import Score as Score
from moeroute.routers.select import All as All
from moeroute.routers.select import Select as Select
from moeroute.routers.select import Selection as Selection
from moeroute.routers.select import TopK as TopK
from moeroute.routers.select import TopKSoftmax as TopKSoftmax
from moeroute.routers.selection_bias import SelectionBias as SelectionBias

__all__ = [
    "All",
    "ComposedRouter",
    "GroupTopK",
    "LinearScore",
    "NoisyLinearScore",
    "Score",
    "Select",
    "Selection",
    "SelectionBias",
    "TopK",
    "TopKSoftmax",
    "deepseek_v3_router",
    "gpt_oss_router",
    "mixtral_router",
    "noisy_top_k_router",
    "normalized_sigmoid_probs",
    "olmoe_router",
    "qwen_moe_router",
    "routers_in",
    "sigmoid_probs",
    "softmax_probs",
]


class _CallablePackage(ModuleType):
    """A package that answers a call with the routers of a model."""

    def __call__(self, model: nn.Module) -> dict[str, nn.Module]:
        """Every router of a model, by the full module name of the layer that hosts it."""
        return routers_in(model)


sys.modules[__name__].__class__ = _CallablePackage
