"""How the contract suite builds each method at a gate small, and what it may expect of it.

A new method is a row here only if it is an exception: others are built from their defaults.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import moeroute

FAMILIES = ("mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss")
"""Every one of these is built with every method; other families in the test of the hook alone."""


@dataclass(frozen=True, kw_only=True)
class GateCase:
    """One method in the suite.

    Attributes:
        fields: Of the small method.
        second: Fields that another small method of the kind has.
        keeps_routing: Whether a fresh method routes as the checkpoint does.
        recurrent: Whether layers hand a state to the next.
        exceptions: Name of a test of the suite -> why it cannot hold for this method.
    """

    fields: Mapping[str, Any] = field(default_factory=dict)
    second: Mapping[str, Any] = field(default_factory=lambda: {"top_k": 1})
    keeps_routing: bool = False
    recurrent: bool = False
    exceptions: Mapping[str, str] = field(default_factory=dict)


GATE_CASES: Mapping[str, GateCase] = MappingProxyType(
    {
        "aux_free": GateCase(keeps_routing=True),
        "cosine": GateCase(fields={"space_size": 8}, second={"space_size": 4}),
        "group_limited": GateCase(fields={"num_groups": 2}, second={"num_groups": 1}),
        "relu_routing": GateCase(),
        "rmoe": GateCase(fields={"state_size": 8}, second={"state_size": 4}, recurrent=True),
        "switch": GateCase(fields={"router_jitter_noise": 0.0}, second={"top_k": 2}),
        "top_p": GateCase(fields={"top_p": 0.6}, second={"top_p": 0.3}),
    }
)

GATE_METHODS = tuple(
    name for name in moeroute.list_methods() if moeroute.get_method(name).site_kind == "gate"
)


def gate_case(name: str) -> GateCase:
    """The case of a registered method."""
    return GATE_CASES.get(name, GateCase())


def small_gate(name: str, **fields: Any) -> moeroute.types.Method:
    """A small method."""
    return moeroute.get_method(name)(**{**gate_case(name).fields, **fields})
