"""Reads the gate of a transformers checkpoint: its sizes, and a router of our parts that equals it.

This module imports no part of transformers.
"""

from __future__ import annotations

import functools
from functools import partial
from operator import attrgetter
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moeroute.integration.experts_report import experts_report
from moeroute.integration.gate_families import GATES, OTHER_CONVENTIONS
from moeroute.routers.composed import ComposedRouter
from moeroute.routers.expert_scale import ExpertScale
from moeroute.routers.score_maps import NormedScore
from moeroute.routers.scores import LinearScore
from moeroute.routers.selection_bias import SelectionBias
from moeroute.types import GateForm

if TYPE_CHECKING:
    from moeroute.integration.gate_families import GateFamily

GATE_NAMES = ("gate", "router")
HOST_NAME = "route_host"  # the submodule of a gate that answers for it
BIAS_PLACES = ("e_score_correction_bias", "moe_statics.e_score_correction_bias")
BLOCK_BIAS_PLACES = ("expert_bias", "e_score_correction_bias")


def gate_family(module: nn.Module) -> GateFamily | None:
    """How a module is read as a gate; None if it is no gate that moeroute knows."""
    return GATES.get(type(module).__name__)


def gate_sizes(gate: nn.Module) -> tuple[int, int, int]:
    """(hidden_size, num_experts, top_k) of a known gate."""
    family = GATES[type(gate).__name__]
    weight = attrgetter(family.weight)(gate)
    return weight.shape[1], weight.shape[0], attrgetter(family.top_k)(gate)


def gate_form(gate: nn.Module, block: nn.Module) -> GateForm:
    """What a known gate does.

    Args:
        gate: The gate.
        block: The module around it, which holds the selection bias in some families.
    """
    family = GATES[type(gate).__name__]
    return GateForm(
        top_k=gate_sizes(gate)[2],
        routed_scaling_factor=family.scaling(gate),
        make_router=partial(equal_router, gate, block),
    )


@torch.no_grad()
def equal_router(gate: Any, block: nn.Module | None = None) -> ComposedRouter:
    """A router of our parts that routes as a gate does, in float32, with copies of its weights.

    Args:
        gate: A gate of a known family.
        block: The module around it, which holds the selection bias in some families.

    Raises:
        ValueError: The family is not known.
    """
    family = gate_family(gate)
    if family is None:
        raise ValueError(f"{type(gate).__name__} is no gate that moeroute knows: {known_gates()}")
    router = family.make(gate, gate_sizes(gate))
    score: Any = router.score
    if isinstance(score, NormedScore):
        _copy(gate.scale, score.scale)
    linear = score if isinstance(score, LinearScore) else score.score
    _copy(attrgetter(family.weight)(gate), linear.weight)
    if linear.bias is not None:
        _copy(gate.bias, linear.bias)
    if isinstance(router.select, ExpertScale):
        _copy(gate.per_expert_scale, router.select.per_expert_scale)
    found = _selection_bias(gate, block)
    for part in router.modules():
        if isinstance(part, SelectionBias) and found is not None:
            _copy(found, part.e_score_correction_bias)
    return router


def hosts_by_experts(model: nn.Module) -> dict[int, nn.Module]:
    """The hosts of a model's wrapped gates, by the identity of the experts they answer for."""
    found = {}
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == HOST_NAME:
            experts = getattr(module, "gate_experts", None)
            found[id(experts)] = module
    return found


def known_gates() -> str:
    """The classes of gates that methods can stand at, as one line."""
    return ", ".join(sorted(GATES))


def unknown_gates(model: nn.Module) -> dict[str, str]:
    """Routers beside experts at which no method can stand: module name -> class and reason."""
    report = experts_report(model)
    experts = [*report.dispatched, *report.fp8, *(name for name, _ in report.ignored)]
    found = {}
    for name in experts:
        block = name.rpartition(".")[0]
        for child in GATE_NAMES:
            gate = getattr(model.get_submodule(block), child, None)
            if isinstance(gate, nn.Module) and gate_family(gate) is None:
                found[f"{block}.{child}".lstrip(".")] = _reason(type(gate).__name__)
    return found


def _reason(class_name: str) -> str:
    why = OTHER_CONVENTIONS.get(class_name, "moeroute does not know what it answers")
    return f"{class_name}: {why}"


def _copy(source: Tensor, target: Tensor) -> None:
    """Copy values; what has none yet, or none to keep them in, is filled when it is loaded."""
    if not source.is_meta and not target.is_meta:
        target.copy_(source.reshape(target.shape))


def _selection_bias(gate: nn.Module, block: nn.Module | None) -> Tensor | None:
    for owner, places in ((gate, BIAS_PLACES), (block, BLOCK_BIAS_PLACES)):
        for place in places:
            found = functools.reduce(
                lambda module, part: getattr(module, part, None), place.split("."), owner
            )
            if isinstance(found, Tensor):
                return found
    return None
