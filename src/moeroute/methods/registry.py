"""The table of methods: one row a paper."""

from __future__ import annotations

import difflib
from dataclasses import asdict, fields
from typing import Any

from moeroute.methods.adamole import AdaMoLE
from moeroute.methods.arrow import Arrow
from moeroute.methods.aux_free import AuxFree
from moeroute.methods.blockffn import BlockFFN
from moeroute.methods.cosine import Cosine
from moeroute.methods.dr_llm import DrLLM
from moeroute.methods.duo_llm import DuoLLM
from moeroute.methods.dynmole import DynMoLE
from moeroute.methods.early_exit import EarlyExit
from moeroute.methods.ept import EPT
from moeroute.methods.expert_choice import ExpertChoice
from moeroute.methods.ftp import FTP
from moeroute.methods.glider import GLIDER
from moeroute.methods.group_limited import GroupLimited
from moeroute.methods.hash_layers import HashLayers
from moeroute.methods.hydralora import HydraLoRA
from moeroute.methods.informed_routing import InformedRouting
from moeroute.methods.lora_mixer import LoRAMixer
from moeroute.methods.loramoe import LoRAMoE
from moeroute.methods.mhr import MHR
from moeroute.methods.mixlora import MixLoRA
from moeroute.methods.mixture_of_depths import MixtureOfDepths
from moeroute.methods.moelora import MOELoRA
from moeroute.methods.mola import MoLA
from moeroute.methods.molora import MoLoRA
from moeroute.methods.norm_halting import NormHalting
from moeroute.methods.null_experts import NullExperts
from moeroute.methods.phatgoose import PHATGOOSE
from moeroute.methods.poly import Poly
from moeroute.methods.relu_routing import ReLURouting
from moeroute.methods.remix import ReMix
from moeroute.methods.rmoe import RMoE
from moeroute.methods.smora import SMoRA
from moeroute.methods.soft_moe import SoftMoE
from moeroute.methods.switch import Switch
from moeroute.methods.t2mir import T2MIR
from moeroute.methods.top_p import TopP
from moeroute.methods.union_of_experts import UnionOfExperts
from moeroute.methods.xlora import XLoRA
from moeroute.types import Method

METHODS: dict[str, type[Method]] = {
    "adamole": AdaMoLE,
    "arrow": Arrow,
    "aux_free": AuxFree,
    "blockffn": BlockFFN,
    "cosine": Cosine,
    "dr_llm": DrLLM,
    "duo_llm": DuoLLM,
    "dynmole": DynMoLE,
    "early_exit": EarlyExit,
    "ept": EPT,
    "expert_choice": ExpertChoice,
    "ftp": FTP,
    "glider": GLIDER,
    "group_limited": GroupLimited,
    "hash_layers": HashLayers,
    "hydralora": HydraLoRA,
    "informed_routing": InformedRouting,
    "lora_mixer": LoRAMixer,
    "loramoe": LoRAMoE,
    "mhr": MHR,
    "mixlora": MixLoRA,
    "mixture_of_depths": MixtureOfDepths,
    "moelora": MOELoRA,
    "mola": MoLA,
    "molora": MoLoRA,
    "norm_halting": NormHalting,
    "null_experts": NullExperts,
    "phatgoose": PHATGOOSE,
    "poly": Poly,
    "relu_routing": ReLURouting,
    "remix": ReMix,
    "rmoe": RMoE,
    "smora": SMoRA,
    "soft_moe": SoftMoE,
    "switch": Switch,
    "t2mir": T2MIR,
    "top_p": TopP,
    "union_of_experts": UnionOfExperts,
    "xlora": XLoRA,
}


def list_methods() -> list[str]:
    """The snake_case names of all methods, sorted."""
    return sorted(METHODS)


def get_method(name: str) -> type[Method]:
    """The class of a method.

    Args:
        name: A name that `list_methods` gives.

    Raises:
        ValueError: No method has this name; the nearest names are given.
    """
    if name not in METHODS:
        raise ValueError(f"unknown method {name!r}; {_nearest(name, list_methods())}")
    return METHODS[name]


def method_name(method: Method) -> str:
    """The registered name of a method's class.

    Raises:
        ValueError: The class is not in the table, so that a saved adapter could not name it.
    """
    for name, cls in METHODS.items():
        if type(method) is cls:
            return name
    raise ValueError(
        f"{type(method).__name__} is not a registered method; known: {', '.join(list_methods())}"
    )


def method_fields(method: Method) -> dict[str, Any]:
    """The hyperparameters of a method as plain data."""
    return asdict(method)  # type: ignore[call-overload]


def build_method(name: str, values: dict[str, Any]) -> Method:
    """Make a method from its registered name and fields.

    Raises:
        ValueError: Unknown name or field (the nearest are given), or a field out of range.
    """
    cls = get_method(name)
    known = method_field_names(name)
    for field in values:
        if field not in known:
            raise ValueError(f"{cls.__name__} has no field {field!r}; {_nearest(field, known)}")
    return cls(**values)


def method_field_names(name: str) -> list[str]:
    """The hyperparameter names of a method."""
    return [field.name for field in fields(get_method(name))]  # type: ignore[arg-type]


def _nearest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word.lower(), known, n=3, cutoff=0.4)
    return f"did you mean {' or '.join(close)}?" if close else f"known: {', '.join(known)}"
