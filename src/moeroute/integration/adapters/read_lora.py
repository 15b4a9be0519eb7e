"""Reads ordinary PEFT LoRA adapters: what each linear gets of rank, scaling and weights."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from peft import LoraConfig, PeftConfig
from peft.utils import load_peft_weights
from peft.utils.other import get_pattern_key
from torch import Tensor

PREFIX = "base_model.model."
HALVES = {".lora_A.weight": 0, ".lora_B.weight": 1}


@dataclass(frozen=True, slots=True)
class SiteLoRA:
    """What an adapter says of one linear.

    Attributes:
        lora_a: (r, in_features).
        lora_b: (out_features, r).
        scaling: What multiplies B A.
    """

    lora_a: Tensor
    lora_b: Tensor
    scaling: float


@dataclass(frozen=True, slots=True)
class LoRAAdapter:
    """One adapter.

    Attributes:
        name: What the caller called it.
        base: The base model that its config names, or "".
        sites: Full name of a linear -> what the adapter says of it.
    """

    name: str
    base: str
    sites: dict[str, SiteLoRA]


def read_lora(name: str, path: str | Path) -> LoRAAdapter:
    """Read an adapter's config and weights.

    Args:
        name: What to call it in errors and in the mixture.
        path: Folder or hub id.

    Raises:
        ValueError: No LoRA adapter is there, or one with parts that a mixture of low-rank experts
            cannot hold (DoRA, biases, embeddings, whole modules, expert stacks).
    """
    config = PeftConfig.from_pretrained(str(path))
    if not isinstance(config, LoraConfig):
        raise ValueError(
            f"adapter {name!r} at {path} is of type {config.peft_type}; only LoRA adapters can be "
            "mixed"
        )
    if config.use_dora:
        raise ValueError(
            f"adapter {name!r} uses DoRA, whose norms do not add up in a mixture; train it with "
            "use_dora=False"
        )
    halves: dict[str, dict[int, Tensor]] = {}
    for key, tensor in load_peft_weights(str(path), device="cpu").items():
        site, half = _site_of(key, name)
        halves.setdefault(site, {})[half] = tensor
    sites = {}
    for site, pair in halves.items():
        if len(pair) < len(HALVES):
            raise ValueError(f"adapter {name!r} holds one half only of its LoRA of {site}")
        sites[site] = SiteLoRA(pair[0], pair[1], _scaling(config, site, pair[0].shape[0]))
    if not sites:
        raise ValueError(f"adapter {name!r} at {path} holds no LoRA weights")
    return LoRAAdapter(name, config.base_model_name_or_path or "", sites)


def _site_of(key: str, name: str) -> tuple[str, int]:
    for ending, half in HALVES.items():
        plain = key.startswith(PREFIX) and key.endswith(ending) and ".base_layer." not in key
        if plain:
            return key.removeprefix(PREFIX).removesuffix(ending), half
    raise ValueError(
        f"adapter {name!r} holds {key}, which is no LoRA weight of a linear; a mixture cannot hold "
        "it. Train the adapter without it (bias, modules_to_save, target_parameters, embeddings)"
    )


def _scaling(config: LoraConfig, site: str, rank: int) -> float:
    """lora_alpha / r or lora_alpha / sqrt(r), with the config's patterns."""
    patterns = dict(config.alpha_pattern or {})
    alpha = patterns.get(get_pattern_key(list(patterns), site), config.lora_alpha)
    return alpha / (math.sqrt(rank) if config.use_rslora else rank)
