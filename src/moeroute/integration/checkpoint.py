"""Loads checkpoints, adapters and texts for the command line; what fails says what to do."""

from __future__ import annotations

import json
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer

if TYPE_CHECKING:
    from collections.abc import Iterator

    from torch import Tensor

CONFIG = "config.json"
ADAPTER_CONFIG = "adapter_config.json"
TOKENS_A_BATCH = 4096
CHARACTERS_A_TOKEN = 32
LOADING_ERRORS = (OSError, ValueError, KeyError, ImportError, RuntimeError, SafetensorError)


def load_model(checkpoint: str, adapter: str | None = None) -> Any:
    """A causal language model in the dtype of its checkpoint, on the GPU if there is one.

    Args:
        checkpoint: A folder or hub id of a model, or of an adapter, whose base is then loaded.
        adapter: A folder or hub id of a PEFT adapter to put on the model.

    Returns:
        The model, or the PeftModel, in eval mode.

    Raises:
        ValueError: A folder is missing, holds neither model nor adapter, or cannot be loaded.
    """
    _check_folder(checkpoint, (CONFIG, ADAPTER_CONFIG))
    if adapter is not None:
        _check_folder(adapter, (ADAPTER_CONFIG,))
    with _as_one_line(f"cannot load a causal language model from {checkpoint}"):
        model: Any = AutoModelForCausalLM.from_pretrained(checkpoint, dtype="auto")
    if adapter is not None:
        with _as_one_line(f"cannot load the adapter {adapter} onto {checkpoint}"):
            model = PeftModel.from_pretrained(model, adapter)
    if torch.cuda.is_available() and not hasattr(model, "hf_device_map"):
        model = model.to("cuda")
    return model.eval()


def load_tokenizer(checkpoint: str) -> Any:
    """The tokenizer of a checkpoint, or of an adapter's base.

    Raises:
        ValueError: There is none.
    """
    places = [checkpoint]
    config = Path(checkpoint) / ADAPTER_CONFIG
    if config.is_file():
        places.append(json.loads(config.read_text()).get("base_model_name_or_path") or checkpoint)
    with _as_one_line(f"cannot load a tokenizer from {' or '.join(dict.fromkeys(places))}"):
        for place in places[:-1]:
            if (Path(place) / "tokenizer_config.json").is_file():
                return AutoTokenizer.from_pretrained(place)
        return AutoTokenizer.from_pretrained(places[-1])


def token_batches(
    model: Any, tokenizer: Any, text: Path, *, max_tokens: int, length: int
) -> list[Tensor]:
    """Cut a text into rows of tokens, some rows a batch.

    Args:
        model: Says how long a row may be and which ids it knows.
        tokenizer: Its tokenizer.
        text: A UTF-8 file.
        max_tokens: Tokens to read at most.
        length: Tokens a row; less where the model's context is shorter.

    Returns:
        (rows, tokens) int64 ids; the last batch is one shorter row where the text ends in one.

    Raises:
        ValueError: The text is empty or not UTF-8, or its tokens are unknown to the model.
    """
    try:
        with text.open(encoding="utf-8") as file:
            content = file.read(max_tokens * CHARACTERS_A_TOKEN)
    except UnicodeDecodeError as error:
        raise ValueError(f"{text} is not a UTF-8 text ({error}); convert it first") from error
    ids = torch.tensor(tokenizer(content, verbose=False)["input_ids"][:max_tokens])
    if not ids.numel():
        raise ValueError(f"{text} holds no tokens; give a text that is not empty")
    known = model.get_input_embeddings().weight.shape[0]
    if int(ids.max()) >= known:
        raise ValueError(
            f"the tokenizer made id {int(ids.max())}, but the model knows {known}: they do not "
            "belong together"
        )
    length = min(length, getattr(model.config, "max_position_embeddings", None) or length)
    rows = max(1, TOKENS_A_BATCH // length)
    whole = ids.numel() // length * length
    batches = list(ids[:whole].view(-1, length).split(rows)) if whole else []
    return [*batches, ids[whole:].view(1, -1)] if whole < ids.numel() else batches


def _check_folder(place: str, files: tuple[str, ...]) -> None:
    """A name that is no folder may be a hub id, unless it looks like a path."""
    folder = Path(place)
    if folder.is_dir():
        if not any((folder / name).is_file() for name in files):
            raise ValueError(f"{place} holds no {' or '.join(files)}; name a saved checkpoint")
    elif folder.exists():
        raise ValueError(f"{place} is a file; name the folder of a saved checkpoint")
    elif place.startswith((".", "/", "~")) or place.count("/") > 1:
        raise ValueError(f"{place}: no such folder")


@contextmanager
def _as_one_line(what: str) -> Iterator[None]:
    try:
        yield
    except LOADING_ERRORS as error:
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise ValueError(f"{what}: {reason}") from error
