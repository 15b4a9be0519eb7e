"""Checks of what an adapter file holds against the model that it is loaded on."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from peft.utils import CONFIG_NAME

from moeroute.integration.adapters.hosting import SITE_PREFIX

if TYPE_CHECKING:
    from peft import PeftModel
    from torch import Tensor, nn

SHOWN = 5


def save_adapter(model: PeftModel, directory: str | Path) -> None:
    """Save a wrapped model's adapters so that a crash leaves the old files or the new ones.

    Writes what `model.save_pretrained` writes into a new folder beside `directory`, then renames
    file by file, the config last: a folder without a config is not taken for an adapter.

    Args:
        model: What `moeroute.wrap_model` returned.
        directory: Where to; made if it is missing.

    Raises:
        OSError: The place cannot be written; nothing in `directory` has changed.
        ValueError: `directory` is a file.
    """
    target = Path(directory)
    if target.is_file():
        raise ValueError(f"{target} is a file; name a directory to save the adapter in")
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=target.name + ".", dir=target.parent) as aside:
        model.save_pretrained(aside)
        written = [path for path in Path(aside).rglob("*") if path.is_file()]
        for path in sorted(written, key=lambda path: path.name == CONFIG_NAME):
            final = target / path.relative_to(aside)
            final.parent.mkdir(parents=True, exist_ok=True)
            os.replace(path, final)


def check_adapter_keys(model: nn.Module, adapter_name: str, state_dict: dict[str, Tensor]) -> None:
    """Compare an adapter's tensors with what the model expects of it.

    Args:
        model: The model with the adapter in place.
        adapter_name: The adapter's name.
        state_dict: The file's tensors under the model's names.

    Raises:
        ValueError: A tensor is missing, unknown, or of another shape; nothing has been loaded yet.
    """
    marker = f".{SITE_PREFIX}.{adapter_name}."
    expected = {key: value.shape for key, value in model.state_dict().items() if marker in key}
    found = {key: value.shape for key, value in state_dict.items() if f".{SITE_PREFIX}." in key}
    missing = sorted(expected.keys() - found.keys())
    unknown = sorted(found.keys() - expected.keys())
    if missing or unknown:
        raise ValueError(
            f"the adapter file does not fit adapter {adapter_name!r} of this model: {len(missing)} "
            "tensors missing "
            f"{missing[:SHOWN]}, {len(unknown)} unknown {unknown[:SHOWN]}. It is damaged, or was "
            "made for another "
            "model or config"
        )
    other = [key for key, shape in expected.items() if found[key] != shape]
    if other:
        key = other[0]
        raise ValueError(
            f"{len(other)} tensors of the adapter file have another shape than this model needs, "
            f"first {key}: "
            f"file {tuple(found[key])}, model {tuple(expected[key])}. Load it on a base of the "
            "shape it was trained on"
        )
