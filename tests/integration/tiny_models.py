"""Tiny random models of every MoE family that transformers runs through its experts registry.

Families are found by reading transformers' modelling files, so that one that a new release brings
is either built here or fails `test_families.py` until somebody says why not.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

VOCAB = 64
NUM_EXPERTS = 4
SEQUENCE = 7

SMALL: Mapping[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "num_local_experts": NUM_EXPERTS,
    "num_experts": NUM_EXPERTS,
    "n_routed_experts": NUM_EXPERTS,
    "moe_num_experts": NUM_EXPERTS,
    "num_experts_per_tok": 2,
    "top_k_experts": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "n_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "shared_expert_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 24,
    "shared_intermediate_size": 24,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 0,
    "num_dense_layers": 0,
    "decoder_sparse_step": 1,
    "mlp_layer_types": ["sparse", "sparse"],
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 64,
    "index_topk": 4,
    "index_head_dim": 8,
    "index_n_heads": 2,
    "mamba_n_heads": 8,
    "mamba_d_state": 8,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "ssm_state_size": 8,
    "n_groups": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "swa_head_dim": 8,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 4,
    "o_lora_rank": 16,
    "o_groups": 2,
    "rel_extent": 16,
}
"""Sizes by config field, taken by every family that has the field."""


@dataclass(frozen=True)
class Recipe:
    """What a family needs beyond `SMALL`.

    Attributes:
        model: Class to build; "" for the family's ForCausalLM (or the like).
        config: Config fields.
    """

    model: str = ""
    config: Mapping[str, Any] = field(default_factory=dict)


RECIPES: Mapping[str, Recipe] = {
    "deepseek_v4": Recipe(
        config={"mlp_layer_types": ["hash_moe", "moe"], "num_key_value_heads": 1}
    ),
    "ernie4_5_moe": Recipe(config={"moe_layer_start_index": 0}),
    "ernie4_5_vl_moe": Recipe(
        config={
            "moe_intermediate_size": [24, 16],
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": [1, 1, 2],
            },
        }
    ),
    "flint": Recipe(config={"mlp_only_layers": []}),
    "gemma4": Recipe(
        config={
            "enable_moe_block": True,
            "vocab_size_per_layer_input": 64,
            "hidden_size_per_layer_input": 8,
        }
    ),
    "glm4v_moe": Recipe(
        config={
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10000.0,
                "partial_rotary_factor": 1.0,
                "mrope_section": [1, 1, 2],
            }
        }
    ),
    "glm5_next": Recipe(config={"index_topk": 4, "index_kpool": 2, "qk_rope_head_dim": 0}),
    "lfm2_moe": Recipe(config={"layer_types": ["conv", "full_attention"]}),
    "mimo_v2_flash": Recipe(config={"num_key_value_heads": 2}),
    "muse_spark": Recipe(config={"moe_hidden_size": 32}),
    "zaya": Recipe(config={"num_experts_per_tok": 1, "router_hidden_size": 16}),
}

CLASS_ENDINGS = ("ForCausalLM", "ForTokenClassification", "TextModel")


@cache
def _modelling_files() -> Mapping[str, str]:
    """Family folder -> text of its modelling files."""
    root = Path(transformers.__file__).parent / "models"
    texts: dict[str, str] = {}
    for path in sorted(root.glob("*/modeling_*.py")):
        texts[path.parent.name] = texts.get(path.parent.name, "") + path.read_text()
    return texts


def modelling_text(family: str) -> str:
    """The family's modelling files as one text."""
    return _modelling_files()[family]


@cache
def registry_families() -> tuple[str, ...]:
    """Every family whose modelling file decorates an experts class."""
    decorator = re.compile(r"^@use_experts_implementation", re.MULTILINE)
    return tuple(name for name, text in _modelling_files().items() if decorator.search(text))


@cache
def outside_families() -> Mapping[str, tuple[str, ...]]:
    """Every other family with a class that is named like experts -> those classes."""
    named = re.compile(r"^class (\w*(?:Experts|MoE|Moe|SparseMLP))\(", re.MULTILINE)
    found = {name: tuple(named.findall(text)) for name, text in _modelling_files().items()}
    known = registry_families()
    return {name: names for name, names in found.items() if names and name not in known}


def model_classes(family: str) -> list[type[nn.Module]]:
    """The family's classes that turn token ids into states or logits, best first."""
    module = importlib.import_module(f"transformers.models.{family}.modeling_{family}")
    wanted = RECIPES.get(family, Recipe()).model
    if wanted:
        return [getattr(module, wanted)]
    own = [
        c for c in vars(module).values() if inspect.isclass(c) and c.__module__ == module.__name__
    ]
    return [c for ending in CLASS_ENDINGS for c in own if c.__name__.endswith(ending)]


def tiny_config(family: str, model_class: type) -> Any:
    """A config of a few thousand parameters."""
    config_class = model_class.config_class
    recipe = RECIPES.get(family, Recipe())
    known = {
        name for base in config_class.__mro__ for name in vars(base).get("__annotations__", {})
    }
    known |= set(inspect.signature(config_class.__init__).parameters)
    small = {k: v for k, v in SMALL.items() if k in known}
    return config_class(**(small | dict(recipe.config)))


def build(family: str, *, implementation: str = "eager", seed: int = 0) -> nn.Module:
    """A model in eval mode whose experts and routers are drawn wide, so that errors show.

    Raises:
        LookupError: The family has no class that takes token ids alone.
    """
    classes = model_classes(family)
    if not classes:
        raise LookupError(f"{family} has no class ending in one of {CLASS_ENDINGS}")
    torch.manual_seed(seed)
    with quiet_transformers():
        config = tiny_config(family, classes[0])
        config._experts_implementation = implementation
        model = classes[0](config).eval()
    widen(model)
    return model


def widen(model: nn.Module, std: float = 0.3) -> None:
    """Redraw experts, routers and the head with a standard deviation that makes errors visible."""
    for name, module in model.named_modules():
        last = name.rpartition(".")[2]
        if is_experts(module) or last in ("gate", "router", "lm_head"):
            for parameter in module.parameters():
                if parameter.ndim > 1:
                    nn.init.normal_(parameter, std=std)
                else:
                    nn.init.uniform_(parameter, 0.5, 1.5)


def is_experts(module: nn.Module) -> bool:
    return hasattr(type(module), "_apply_gate") and hasattr(module, "is_transposed")


def experts_of(model: nn.Module) -> Iterator[nn.Module]:
    return (module for module in model.modules() if is_experts(module))


def token_ids(batch: int = 2, sequence: int = SEQUENCE) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, VOCAB, (batch, sequence), generator=generator)


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep configuration remarks about tiny sizes out of the test output."""
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
