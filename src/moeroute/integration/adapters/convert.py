"""`moeroute convert`: adapters in the formats that others load."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM

from moeroute.integration.adapters.expert_layout import per_expert_lora
from moeroute.integration.adapters.files import write_folder
from moeroute.integration.adapters.merge import merge, plain_strategies
from moeroute.integration.adapters.merge_strategies import MERGE_IS_NOT_DEFINED
from moeroute.integration.adapters.merged import MergedLoRA
from moeroute.integration.adapters.peft_method import MoeRouteConfig

if TYPE_CHECKING:
    from collections.abc import Mapping

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
FORMATS = ("peft", "vllm")
FOLDER = re.compile(r"\w[\w.-]*")
"""A name that can be a folder's, in any place."""


def convert_adapter(
    adapter: str | Path, directory: str | Path, *, to: str = "peft", base: str | None = None
) -> list[Path]:
    """Write a saved adapter in a format that serves elsewhere: all of it, or nothing.

    A mixture over linears becomes one plain LoRA per expert, or per task where the method routes by
    task, each a folder that `PeftModel.from_pretrained` and everything else that reads PEFT's LoRA
    loads ("peft"). PEFT's
    LoRA on stacked experts becomes LoRA on the modules of each expert by itself, as the family's
    checkpoints name them on disk ("vllm", see `per_expert_lora`). The base's weights are not read,
    only its config.

    Args:
        adapter: Folder of the adapter.
        directory: Where to; must not exist, or be empty.
        to: "peft" or "vllm".
        base: Folder or hub id of the base model; None takes the one that the adapter names.

    Returns:
        The folders that were written: `expert_0`, ..., `task_0`, ... or the names of the adapters
        that are mixed, below `directory`; or `directory` itself.

    Raises:
        ValueError: No adapter there, a format or a combination that is not known, a mixture that
            has no plain experts, or a directory that is not empty. Nothing is written then.
        OSError: The place cannot be written, or the base cannot be found.
    """
    source, target = Path(adapter), Path(directory)
    if to not in FORMATS:
        raise ValueError(f"unknown format {to!r}; choose {' or '.join(FORMATS)}")
    for name in (CONFIG, WEIGHTS):
        if not (source / name).is_file():
            raise ValueError(f"{source} holds no {name}; name the folder of a saved adapter")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(f"{target} is not an empty folder; name another one, or clear it")
    config = PeftConfig.from_pretrained(str(source))
    loras = _converted(source, config, to, base or config.base_model_name_or_path)

    def write(folder: str) -> None:
        for name, lora in loras.items():
            lora.save(Path(folder) / name)

    write_folder(target, write)
    return [target / name for name in loras]


def _converted(
    source: Path, config: PeftConfig, to: str, base: str | None
) -> Mapping[str, MergedLoRA]:
    """What to write, by the name of its folder below the directory."""
    if not isinstance(config, MoeRouteConfig | LoraConfig):
        raise ValueError(
            f"{source} is a {config.peft_type} adapter; convert knows moeroute's and "
            "PEFT's LoRA on experts"
        )
    on_experts = isinstance(config, LoraConfig) and bool(config.target_parameters)
    if isinstance(config, LoraConfig) and not on_experts:
        raise ValueError(f"{source} is a plain LoRA already; there is nothing to convert")
    if on_experts != (to == "vllm"):
        raise ValueError(
            f"{source} is PEFT's LoRA on stacked experts in PEFT's own format; choose "
            'to="vllm" for LoRA on each expert by itself'
            if on_experts
            else f'{source} is a mixture; choose to="peft": its experts become plain LoRA of PEFT, '
            "which vLLM loads as they are"
        )
    if base is None:
        raise ValueError(f"{source} names no base model; say which one with base=")
    model_config = AutoConfig.from_pretrained(base)
    if isinstance(config, LoraConfig):
        tensors = load_file(source / WEIGHTS)
        return {"": per_expert_lora(config, tensors, model_config.model_type)}
    if config.build_method().site_kind != "linear":
        raise ValueError(MERGE_IS_NOT_DEFINED.format(strategy="expert", method=config.method))
    model = PeftModel.from_pretrained(_empty_model(model_config), str(source))
    strategies = plain_strategies(model)
    if not all(FOLDER.fullmatch(name) for name in strategies):  # names that a caller chose
        strategies = {f"expert_{index}": one for index, one in enumerate(strategies.values())}
    return {name: merge(model, strategy) for name, strategy in strategies.items()}


def _empty_model(config: Any) -> Any:
    """A base model whose memory is never written, so that none of it is taken."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return model.to_empty(device="cpu")
