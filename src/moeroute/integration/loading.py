"""Loads what the command line is given: a checkpoint, an adapter, a text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

if TYPE_CHECKING:
    from torch import Tensor, nn

ROWS = 4
LOADING_ERRORS = (OSError, ValueError, KeyError, ImportError)


def load_model(
    checkpoint: str, *, adapter: str | None = None, experts_implementation: str | None = None
) -> nn.Module:
    """Load a causal language model, in eval mode.

    Args:
        checkpoint: A hub id, or a folder that holds a model or an adapter.
        adapter: An adapter folder to put on top.
        experts_implementation: As in `from_pretrained`; None leaves it to transformers.

    Raises:
        ValueError: Something cannot be loaded; the message names it and the cause.
    """
    chosen: dict[str, Any] = {}
    if experts_implementation is not None:
        chosen["experts_implementation"] = experts_implementation
    try:
        model = AutoModelForCausalLM.from_pretrained(checkpoint, **chosen)
    except LOADING_ERRORS as error:
        raise ValueError(f"cannot load a model from {checkpoint}: {error}") from error
    return (model if adapter is None else _load_adapter(model, adapter)).eval()


def token_batches(checkpoint: str, text: Path, *, max_tokens: int, length: int) -> list[Tensor]:
    """Cut a text into batches of token ids: (B, length) each, and what is left as one last row.

    Args:
        checkpoint: Where the tokenizer lies; for an adapter without one, its base's.
        text: A UTF-8 text file.
        max_tokens: Tokens to read at most.
        length: Tokens a sequence.

    Raises:
        ValueError: No such file, no tokenizer, or no tokens in the file.
    """
    if not text.is_file():
        raise ValueError(f"{text} is no file; name a text file")
    try:
        tokenizer = AutoTokenizer.from_pretrained(_tokenizer_folder(checkpoint))
    except LOADING_ERRORS as error:
        raise ValueError(f"cannot load a tokenizer from {checkpoint}: {error}") from error
    ids = tokenizer(text.read_text(encoding="utf-8", errors="replace"), verbose=False)["input_ids"]
    ids = ids[:max_tokens]
    if not ids:
        raise ValueError(f"{text} holds no tokens")
    whole = len(ids) // length * length
    batches = list(torch.tensor(ids[:whole]).reshape(-1, length).split(ROWS)) if whole else []
    return [*batches, torch.tensor([ids[whole:]])] if ids[whole:] else batches


def _load_adapter(model: Any, adapter: str) -> nn.Module:
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(model, adapter)
    except LOADING_ERRORS as error:
        raise ValueError(f"cannot load an adapter from {adapter}: {error}") from error


def _tokenizer_folder(checkpoint: str) -> str:
    config = Path(checkpoint) / "adapter_config.json"
    if config.is_file() and not (config.parent / "tokenizer_config.json").is_file():
        return json.loads(config.read_text())["base_model_name_or_path"] or checkpoint
    return checkpoint
