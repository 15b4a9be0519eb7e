"""A plain PEFT LoRA in memory: what a mixture was merged into."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from peft import LoraConfig, get_peft_model
from peft.utils import SAFETENSORS_WEIGHTS_NAME, set_peft_model_state_dict
from safetensors.torch import save_file

from moeroute.integration.adapters.files import write_folder

if TYPE_CHECKING:
    from collections.abc import Mapping

    from peft import PeftModel
    from torch import Tensor, nn

    from moeroute.integration.adapters.logit_error import LogitError
    from moeroute.layers.constant_lora import ConstantLoRA

PREFIX = "base_model.model."


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class MergedLoRA:
    """A plain LoRA, as PEFT keeps it in a file.

    Attributes:
        strategy: How the mixture was merged.
        config: PEFT's config.
        tensors: PEFT's names in the adapter file -> values.
        error: How far it is from the mixture on the text that was given; None without text.
    """

    strategy: str
    config: LoraConfig
    tensors: Mapping[str, Tensor]
    error: LogitError | None

    def save(self, directory: str | Path) -> None:
        """Write an adapter folder for `PeftModel.from_pretrained`: whole, or not at all.

        Raises:
            OSError: The place cannot be written; nothing in `directory` has changed.
            ValueError: `directory` is a file.
        """
        write_folder(directory, self._write)

    def put_on(self, base: nn.Module) -> PeftModel:
        """A trainable PeftModel on a base model, which is changed in place.

        Args:
            base: A model of the kind that the mixture stands on, without adapters: another copy, or
                `moeroute.unwrap_model(model)`.

        Raises:
            ValueError: The base does not have the modules or shapes.
        """
        config = copy.deepcopy(self.config)
        config.base_model_name_or_path = None  # PEFT writes the base's own name there
        model = get_peft_model(base, config)
        try:
            result = set_peft_model_state_dict(model, dict(self.tensors))
        except RuntimeError as error:
            model.unload()
            raise ValueError(f"the merged LoRA does not fit this base: {error}") from error
        unfilled = [name for name in result.missing_keys if ".lora_" in name]
        for faults, words in (
            (result.unexpected_keys, "the base has no place for"),
            (unfilled, "the merged LoRA has no values for"),
        ):
            if faults:
                model.unload()
                raise ValueError(
                    f"{words} {len(faults)} tensors, first {faults[0]}; give a base of the kind "
                    "that the mixture stands on"
                )
        return model

    def _write(self, folder: str) -> None:
        config = copy.deepcopy(self.config)
        config.inference_mode = True
        tensors = {name: value.detach().cpu().contiguous() for name, value in self.tensors.items()}
        save_file(tensors, str(Path(folder) / SAFETENSORS_WEIGHTS_NAME), metadata={"format": "pt"})
        config.save_pretrained(folder)


def lora_tensors(loras: Mapping[str, ConstantLoRA]) -> dict[str, Tensor]:
    """PEFT's names in a file -> the factors of LoRA by module name."""
    tensors: dict[str, Tensor] = {}
    for name, lora in loras.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = lora.lora_a
        tensors[f"{PREFIX}{name}.lora_B.weight"] = lora.lora_b
    return tensors


def rank_fields(loras: Mapping[str, ConstantLoRA]) -> dict[str, object]:
    """The fields of a LoraConfig that say rank and scaling, which may differ by module.

    PEFT scales by alpha / rank: alpha is chosen so that this is each LoRA's own scaling.
    """
    ranks = {name: lora.r for name, lora in loras.items()}
    alphas = {name: lora.scaling * lora.r for name, lora in loras.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0]
    alpha = Counter(alphas.values()).most_common(1)[0][0]
    return {
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": {name: value for name, value in ranks.items() if value != rank},
        "alpha_pattern": {name: value for name, value in alphas.items() if value != alpha},
    }
