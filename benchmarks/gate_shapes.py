"""The sizes of routers that are timed, by name.

Axes: H hidden, E experts, K slots per token.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

__all__ = ["GATE_NAMES", "GATE_SHAPES", "GATE_TOKENS", "GateShape"]


@dataclass(frozen=True, slots=True)
class GateShape:
    """A router of a checkpoint.

    Attributes:
        name: Stands in the tables and in results.csv.
        family: Of transformers.
        hidden_size: H.
        num_experts: E.
        top_k: K.
    """

    name: str
    family: str
    hidden_size: int = 2048
    num_experts: int = 64
    top_k: int = 8


_GATE_SHAPES = tuple(
    GateShape(f"{family}-E64k8", family)
    for family in ("mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "gpt_oss")
)
GATE_SHAPES: Mapping[str, GateShape] = MappingProxyType(
    {shape.name: shape for shape in (*_GATE_SHAPES, GateShape("tiny-gate", "mixtral", 32, 8, 2))}
)
"""Routers, by name."""
GATE_NAMES = tuple(shape.name for shape in _GATE_SHAPES)
"""Those that `make bench` times and judges."""
GATE_TOKENS = (4096,)
