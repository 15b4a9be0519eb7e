"""The sizes of decoders whose layers are skipped, by name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

__all__ = ["CONTEXT", "DEPTH_NAMES", "DEPTH_SHAPES", "DEPTH_TOKENS", "VOCABULARY", "DepthShape"]

CONTEXT = 300
"""Tokens in the cache of a decoding step."""
VOCABULARY = 1000
DEPTH_TOKENS = (256, 1)


@dataclass(frozen=True, slots=True)
class DepthShape:
    """A Llama and how often each of its layers runs.

    Attributes:
        name: Stands in the tables and in results.csv.
        actions: One number a layer.
        hidden_size: H.
        intermediate_size: I.
        num_heads: Of attention.
    """

    name: str
    actions: tuple[int, ...]
    hidden_size: int = 768
    intermediate_size: int = 2048
    num_heads: int = 12

    @property
    def num_layers(self) -> int:
        """L."""
        return len(self.actions)


DEPTH_SHAPES: Mapping[str, DepthShape] = MappingProxyType(
    {
        shape.name: shape
        for shape in (
            DepthShape("L12-half", (1, 0) * 6),
            DepthShape("L12-all", (1,) * 12),
            DepthShape("tiny-half", (1, 0, 1, 0), 32, 48, 4),
            DepthShape("tiny-all", (1,) * 4, 32, 48, 4),
        )
    }
)
"""Decoders, by name."""
DEPTH_NAMES = ("L12-half", "L12-all")
"""Those that `make bench` times and judges."""
