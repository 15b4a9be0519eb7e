"""The benchmarks, by name. A new op or layer is a file with a `BENCHMARK` and one line here."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from benchmarks import (
    depth,
    expert_lora,
    gated_lora,
    grouped_lora,
    lora_mixture,
    routed_mlp,
    router,
)
from benchmarks.cases import Benchmark

__all__ = ["BENCHMARKS"]

BENCHMARKS: Mapping[str, Benchmark] = MappingProxyType(
    {
        module.BENCHMARK.name: module.BENCHMARK
        for module in (
            routed_mlp,
            gated_lora,
            lora_mixture,
            grouped_lora,
            expert_lora,
            router,
            depth,
        )
    }
)
