"""Every size that a benchmark runs at, by name. Those of routers stand in `gate_shapes`.

Axes: T tokens, H hidden, I intermediate, E experts, K slots per token.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from benchmarks.forms import GPT_OSS, SWIGLU, Form
from benchmarks.lora_baselines import SHAPES as LORA_SHAPE_LIST
from benchmarks.lora_baselines import LoRAShape

__all__ = [
    "CPU_TOKENS",
    "DTYPES",
    "EXPERT_LORA_SHAPES",
    "EXPERT_SHAPES",
    "FLOOR_SHAPES",
    "GPU_TOKENS",
    "INPUT_SETS",
    "LORA_FLOOR_CASES",
    "LORA_SHAPES",
    "MANY_EXPERTS",
    "MEMORY_SHAPE",
    "MEMORY_TOKENS",
    "ROTATE_BELOW_TOKENS",
    "ROUTINGS",
    "ExpertLoRAShape",
    "ExpertShape",
    "LoRAShape",
    "expert_shape",
    "make_routing",
]


@dataclass(frozen=True, slots=True)
class ExpertShape:
    """The sizes of one layer of routed gated MLPs.

    Attributes:
        name: Stands in the tables and in results.csv.
        hidden_size: H.
        intermediate_size: I of one expert.
        num_experts: E.
        top_k: K.
        form: How its weights lie, and its activation.
    """

    name: str
    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int
    form: Form = SWIGLU

    def experts_hit(self, tokens: int) -> float:
        """How many experts a number of tokens is expected to choose, all alike."""
        return self.num_experts * (1 - (1 - self.top_k / self.num_experts) ** tokens)


_EXPERT_SHAPES = (
    # Small enough for two CPU cores, wide enough that the weights of a layer leave its caches.
    ExpertShape("E8k2", 1024, 512, 8, 2),
    ExpertShape("E64k8", 1024, 256, 64, 8),
    ExpertShape("E128k8", 1024, 256, 128, 8),
    ExpertShape("E32k4", 1024, 512, 32, 4),
    # Bytes saved for backward do not depend on E: few experts, the width of Qwen3-30B-A3B.
    ExpertShape("d2048n768k8", 2048, 768, 16, 8),
    # For a second's trial of the benchmark itself.
    ExpertShape("tiny", 32, 16, 4, 2),
    ExpertShape("tiny-gpt-oss", 32, 16, 4, 2, GPT_OSS),
    # Whose kernels are compiled ahead of time; every size is a multiple of a tile's.
    ExpertShape("compiled", 256, 128, 8, 2),
    # Released models, one layer: for a GPU.
    ExpertShape("mixtral-8x7b", 4096, 14336, 8, 2),
    ExpertShape("qwen3-30b-a3b", 2048, 768, 128, 8),
    ExpertShape("olmoe-1b-7b", 2048, 1024, 64, 8),
    ExpertShape("deepseek-v3-ep8", 7168, 2048, 32, 1),
    ExpertShape("deepseek-v2-lite", 2048, 1408, 64, 6),
    ExpertShape("gpt-oss-20b", 2880, 2880, 32, 4, GPT_OSS),
)

EXPERT_SHAPES: Mapping[str, ExpertShape] = MappingProxyType({s.name: s for s in _EXPERT_SHAPES})
"""Every layer of routed MLPs, by name."""

OWN_SHAPE = re.compile(r"(\d+)x(\d+)-E(\d+)k(\d+)")
"""How a layer that stands in no list is named: hidden size x intermediate size, E, K."""


def expert_shape(name: str) -> ExpertShape:
    """Look a layer up, or read its sizes off a name such as "2048x768-E128k8".

    Args:
        name: A key of `EXPERT_SHAPES`, or sizes.

    Raises:
        ValueError: neither, or sizes that no layer has.
    """
    if name in EXPERT_SHAPES:
        return EXPERT_SHAPES[name]
    found = OWN_SHAPE.fullmatch(name)
    if found is None:
        known = ", ".join(EXPERT_SHAPES)
        raise ValueError(f"unknown shape {name!r}; use one of {known}, or sizes: 2048x768-E128k8")
    hidden, inner, experts, slots = map(int, found.groups())
    if not (hidden and inner and 1 <= slots <= experts):
        raise ValueError(f"shape {name!r}: every size is at least 1, and K at most E")
    return ExpertShape(name, hidden, inner, experts, slots)


FLOOR_SHAPES = ("E8k2", "E64k8", "E128k8")
"""The shapes that `make bench` times and judges."""

MANY_EXPERTS = 64
"""E at which transformers' eager is to be left far behind."""

MEMORY_SHAPE = "d2048n768k8"
"""The shape at which the bytes saved for backward are judged."""

CPU_TOKENS = (1, 16, 128, 1024)
MEMORY_TOKENS = (1024,)
GPU_TOKENS = (1, 2, 4, 8, 16, 64, 128, 512, 2048, 8192, 32768)

COMPILED_SHAPE = "compiled"
COMPILED_TOKENS: Mapping[str, int] = MappingProxyType({"few": 32, "some": 256, "many": 1024})
"""Tokens of the layer that is compiled ahead of time, by class of rows per expert."""
COMPILED_RANK = 16
WARP_THREADS = 32
"""Of every CUDA device; the compiler wants to be told."""
COMPILED_SLOTS = (4, 256, 2048)
"""Tokens that are sorted: one for each kind of sort."""

GPU_SHAPES = ("qwen3-30b-a3b", "olmoe-1b-7b", "gpt-oss-20b", "mixtral-8x7b", "deepseek-v3-ep8")
"""The layers of `--suite gpu`."""
GPU_SUITE_TOKENS: Mapping[str, tuple[int, ...]] = MappingProxyType(
    {
        "qwen3-30b-a3b": (32768, 8192, 2048, 512, 128, 16, 1),
        "olmoe-1b-7b": (32768, 8192, 512, 128, 16, 1),
        "gpt-oss-20b": (32768, 8192, 512, 128, 16, 1),
        "mixtral-8x7b": (32768, 8192, 512, 1),
        "deepseek-v3-ep8": (32768, 8192, 512, 1),
    }
)
"""T of `--suite gpu`, by layer, from many to few: a peer that tunes itself once does so at many."""
GPU_SKEWED_TOKENS = (8192, 128)
"""T at which the suite times skewed routing too."""
GPU_JUDGED_SHAPE = "qwen3-30b-a3b"
GPU_JUDGED_TOKENS = 32768
GPU_NEAR_SHAPES = ("olmoe-1b-7b", "gpt-oss-20b")
"""Layers that are to come near the judged one."""
GPU_MANY_TOKENS = 8192
"""T from which on the lead over other kernels is judged."""
GPU_FEW_TOKENS = 512
"""T up to which reading the weights once is most of the work."""
GPU_GRAPH_TOKENS = (128, 1)
"""T at which a layer is captured in a CUDA graph."""

COMPILE_SEEN_TOKENS = (1, 3, 40, 200, 700, 2000, 6000)
"""T that come first: one for each way to sort and each class of rows per expert."""
COMPILE_TOKENS = tuple(5 + 11 * step**2 for step in range(20))
"""Twenty T after which no kernel may be new, 5 to 3976."""

_GPU_LORA_SHAPES = (
    LoRAShape(8192, 4, 1, 8),
    LoRAShape(8192, 8, 2, 32),
    LoRAShape(8192, 4, 2, 8, 4096),
    LoRAShape(8192, 8, 2, 16, 4096),
    LoRAShape(8192, 8, 2, 64, 4096),
    LoRAShape(8192, 16, 4, 64, 4096),
)
GPU_LORA_NAMES = tuple(shape.name for shape in _GPU_LORA_SHAPES)
"""Mixtures of LoRA of `--suite gpu`."""
GPU_LORA_TOKENS = (8192, 64)

LORA_SHAPES: Mapping[str, LoRAShape] = MappingProxyType(
    {
        shape.name: shape
        for shape in (*LORA_SHAPE_LIST, LoRAShape(64, 8, 2, 16, 2048), *_GPU_LORA_SHAPES)
    }
)
"""Mixtures of LoRA over one linear, by name."""

MIXTURE_NAMES = ("E8k2r16", "E8k2r16-d2048")
MIXTURE_TOKENS = (64, 512, 4096)
"""Where a whole mixture over one linear is timed beside plain LoRA."""
LORA_FLOOR_CASES = tuple((shape.name, shape.tokens) for shape in LORA_SHAPE_LIST)
"""Name and T of each row that `make bench` times and judges."""


@dataclass(frozen=True, slots=True)
class ExpertLoRAShape:
    """LoRA on the first matrix of every expert of a layer.

    Attributes:
        name: Stands in the tables and in results.csv.
        layer: Gives the sizes of the frozen experts: I = H in, O = 2 * I out, E and K.
        r: Rank of one expert's pair.
        num_adapters: Pairs per expert; each token has an adapter of its own.
    """

    name: str
    layer: ExpertShape
    r: int
    num_adapters: int = 1


def _on_experts(layer: str, r: int, num_adapters: int = 1) -> ExpertLoRAShape:
    several = f"a{num_adapters}" if num_adapters > 1 else ""
    return ExpertLoRAShape(f"{layer}-r{r}{several}", EXPERT_SHAPES[layer], r, num_adapters)


_EXPERT_LORA_SHAPES = (
    _on_experts("E8k2", 16),
    _on_experts("E64k8", 16),
    _on_experts("E32k4", 16),
    _on_experts("tiny", 2),
    _on_experts("tiny", 2, 3),
    *(_on_experts("qwen3-30b-a3b", r) for r in (8, 16, 64)),
    *(_on_experts("olmoe-1b-7b", r) for r in (8, 64)),
    *(_on_experts("qwen3-30b-a3b", 16, adapters) for adapters in (4, 16)),
)

EXPERT_LORA_SHAPES: Mapping[str, ExpertLoRAShape] = MappingProxyType(
    {shape.name: shape for shape in _EXPERT_LORA_SHAPES}
)
"""LoRA on experts, by name."""

EXPERT_LORA_FLOOR_CASES = tuple(
    (name, tokens) for name in ("E8k2-r16", "E64k8-r16") for tokens in (16, 256)
)
"""Name and T of each row of forward + backward that `make bench` times and judges."""
EXPERT_LORA_DECODE_SHAPE = "E32k4-r16"
"""The shape at which one token alone is judged."""

GPU_EXPERT_LORA_NAMES = tuple(
    shape.name for shape in _EXPERT_LORA_SHAPES if shape.layer.name in GPU_SHAPES
)
"""LoRA on experts of `--suite gpu`."""
GPU_EXPERT_LORA_TOKENS = (8192, 64)


CEILING_SIZES: Mapping[str, tuple[int, int]] = MappingProxyType(
    {"cpu": (1536, 2**25), "cuda": (8192, 2**28)}
)
"""Width of the product and number of float32 copied that show what a device does at best."""

DTYPES: Mapping[str, torch.dtype] = MappingProxyType(
    {"fp32": torch.float32, "bf16": torch.bfloat16}
)

INPUT_SETS = 3
"""Different inputs that take turns where T is small, so that no cache holds the last answer."""

ROTATE_BELOW_TOKENS = 512

ROUTINGS = ("uniform", "zipf", "one_hot")
"""How tokens choose: all experts alike, expert e with weight 1 / (e + 1), all tokens the same K."""


def make_routing(
    routing: str, tokens: int, shape: ExpertShape, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Draw each token's experts, no expert twice in a token.

    Args:
        routing: One of `ROUTINGS`.
        tokens: T.
        shape: Gives E and K.
        generator: Of a CPU.

    Returns:
        selected_experts (T, K) int64 and routing_weights (T, K) float32 that sum to 1 per token.

    Raises:
        ValueError: an unknown routing.
    """
    if routing not in ROUTINGS:
        raise ValueError(f"unknown routing {routing!r}; use one of {', '.join(ROUTINGS)}")
    experts = shape.num_experts
    if routing == "one_hot":
        chosen = torch.arange(shape.top_k).expand(tokens, shape.top_k).contiguous()
    else:
        ranks = torch.arange(1, experts + 1, dtype=torch.float32)
        chances = 1 / ranks if routing == "zipf" else torch.ones(experts)
        # An empty batch has nothing to draw from.
        rows = chances.expand(max(tokens, 1), experts)
        chosen = torch.multinomial(rows, shape.top_k, generator=generator)[:tokens]
    weights = torch.randn((tokens, shape.top_k), generator=generator).softmax(-1)
    return chosen, weights
