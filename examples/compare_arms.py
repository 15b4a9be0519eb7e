"""The arms of `compare_mixtures.py`: every method at the same number of trainable parameters."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from compare_training import Domains, Recipe, fit
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

import moeroute

PLAIN = "plain LoRA"
NUM_EXPERTS = 4
TASKS: Mapping[str, Any] = MappingProxyType({"num_tasks": 2})
FOUR: Mapping[str, Any] = MappingProxyType({"num_experts": NUM_EXPERTS})
TWO_OF_FOUR: Mapping[str, Any] = MappingProxyType({**FOUR, "top_k": 2})


@dataclass(frozen=True)
class Arm:
    """One row of the table.

    Attributes:
        fields: Of the method, but for its rank.
        multiple: The rank is a multiple of it.
        by_policy: Whether its router learns by policy gradient.
        mixes: Whether it mixes two adapters that were trained before, one a domain.
        labelled: Whether training tells the domain of each row.
    """

    fields: Mapping[str, Any] = field(default_factory=dict)
    multiple: int = 1
    by_policy: bool = False
    mixes: bool = False
    labelled: bool = True


ARMS: Mapping[str, Arm] = MappingProxyType(
    {
        "adamole": Arm(FOUR),
        "arrow": Arm({"top_k": 2}, mixes=True),
        "dynmole": Arm(FOUR),
        "ept": Arm(TASKS),
        "hydralora": Arm(FOUR),
        "lora_mixer": Arm({"top_k": 2}, mixes=True, labelled=False),
        "loramoe": Arm(FOUR),
        "mhr": Arm(TASKS),
        "mixlora": Arm(TWO_OF_FOUR),
        "moelora": Arm({**TASKS, **FOUR}, multiple=NUM_EXPERTS),
        "mola": Arm(TWO_OF_FOUR),
        "molora": Arm(FOUR),
        "phatgoose": Arm({"top_k": 2}, mixes=True),
        "poly": Arm(TASKS),
        "remix": Arm(TWO_OF_FOUR, by_policy=True),
        "smora": Arm({"top_k": 8}, multiple=4),
        "xlora": Arm({}, mixes=True),
    }
)
"""By the registered name of the method. GLIDER needs texts that tell its experts' tasks: no row."""


def fresh(base: str | Path) -> nn.Module:
    """The base model."""
    return AutoModelForCausalLM.from_pretrained(base)


def plain_lora(base: str | Path, rank: int) -> nn.Module:
    """LoRA of PEFT on every linear but the head."""
    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    return moeroute.accept_routing_inputs(get_peft_model(fresh(base), config))


def trainable(model: nn.Module) -> int:
    """Number of parameters that an optimizer would move."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def method_of(name: str, rank: int) -> moeroute.types.Method:
    """The arm's method at a rank, its scaling that of the plain LoRA: 2."""
    cls, values = moeroute.get_method(name), dict(ARMS[name].fields)
    known = cls.__dataclass_fields__
    wanted = {"r": rank, "lora_alpha": 2.0 * rank}
    return cls(**values, **{key: value for key, value in wanted.items() if key in known})


def rank_for(name: str, base: str | Path, budget: int) -> int:
    """The rank at which the arm's trainable parameters are nearest to the budget."""
    step, best = ARMS[name].multiple, (float("inf"), 1)
    rank = max(step, ARMS[name].fields.get("top_k", 1) if name == "smora" else step)
    while True:
        count = trainable(moeroute.wrap_model(fresh(base), method_of(name, rank)))
        best = min(best, (abs(count - budget), rank))
        if count > budget:
            return best[1]
        rank += step


def build(name: str, base: str | Path, rank: int, experts: Mapping[str, Path]) -> nn.Module:
    """The arm's model, ready to train.

    Args:
        name: Of the arm.
        base: The checkpoint.
        rank: Of plain LoRA, or what `rank_for` says.
        experts: The adapters that a mixing arm mixes, by domain.
    """
    if name == PLAIN:
        return plain_lora(base, rank)
    if ARMS[name].mixes:
        return moeroute.mix_adapters(fresh(base), experts, router=method_of(name, rank))
    return moeroute.wrap_model(fresh(base), method_of(name, rank), task_type="CAUSAL_LM")


def train_experts(
    base: str | Path, rank: int, domains: Domains, recipe: Recipe, folder: Path
) -> dict[str, Path]:
    """Train one plain LoRA a domain, alone, and save both; their folders by domain."""
    folders = {}
    for task, name in enumerate(domains.names):
        torch.manual_seed(recipe.seed)
        model = plain_lora(base, rank)
        fit(model, domains, recipe, only=task)
        folders[name] = folder / name
        model.save_pretrained(folders[name])
    return folders
