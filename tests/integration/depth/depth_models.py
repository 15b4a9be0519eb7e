"""Tiny decoders of several families, and a way to feed them piece by piece."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, DynamicCache, StaticCache
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

VOCAB, LAYERS, WINDOW = 61, 3, 4

SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SLIDING = ["sliding_attention", "full_attention", "sliding_attention"]
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "gemma2": {"sliding_window": WINDOW, "layer_types": SLIDING, "query_pre_attn_scalar": 8},
    "gemma3_text": {"sliding_window": WINDOW, "layer_types": SLIDING, "query_pre_attn_scalar": 8},
    "mistral": {"sliding_window": WINDOW},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    "gpt_neox": {"num_key_value_heads": 4},
    "gpt2": {},
    "gptj": {"rotary_dim": 4},
}
GPT2: dict[str, Any] = {"n_embd": 32, "n_layer": LAYERS, "n_head": 4, "n_positions": 64}


def tiny(family: str = "llama", attention: str = "sdpa", **changes: Any) -> Any:
    """A random model in eval mode whose weights are wide, so that errors show."""
    torch.manual_seed(0)
    sizes = SIZES | FAMILIES[family] | changes
    if family in ("gpt2", "gptj"):
        ids = {name: sizes[name] for name in sizes if name.endswith("_token_id")}
        sizes = GPT2 | ids | {"vocab_size": VOCAB} | FAMILIES[family] | changes
    if family in ("gemma2", "gptj"):  # transformers has no other for these
        attention = "eager"
    config: Any = CONFIG_MAPPING[family](**sizes)
    model = AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3 if "embed" not in name else 1.0)
    return model


def ragged(side: str, lengths: Sequence[int] = (7, 4, 9)) -> tuple[Tensor, Tensor]:
    """(B, S) ids and mask of prompts of these lengths, padded on one side."""
    torch.manual_seed(1)
    size = max(lengths)
    ids = torch.randint(3, VOCAB, (len(lengths), size))
    place = torch.arange(size)
    rows = [place >= size - n if side == "left" else place < n for n in lengths]
    mask = torch.stack(rows).long()
    return ids * mask, mask


def positions(mask: Tensor) -> Tensor:
    """(B, S) position of every token in its own sequence."""
    return (mask.cumsum(1) - 1).clamp(min=0)


def feed(model: Any, ids: Tensor, mask: Tensor, cuts: Sequence[int], cache: Any) -> Tensor:
    """(B, S, V) logits of a text that goes in piece by piece, through a cache."""
    found, begin = [], 0
    for end in (*cuts, ids.shape[1]):
        out = model(
            input_ids=ids[:, begin:end],
            attention_mask=mask[:, :end],
            position_ids=positions(mask)[:, begin:end],
            past_key_values=cache,
            use_cache=True,
        )
        found.append(out.logits)
        begin = end
    return torch.cat(found, 1)


def whole(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """(B, S, V) logits of the same text in one call without a cache."""
    return model(
        input_ids=ids, attention_mask=mask, position_ids=positions(mask), use_cache=False
    ).logits


def new_cache(model: Any, kind: str) -> Any:
    """An empty cache."""
    if kind == "static":
        return StaticCache(config=model.config, max_cache_len=24)
    return DynamicCache(config=model.config) if kind == "dynamic" else DynamicCache()


def grown(ids: Tensor, mask: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """The same prompts with more tokens behind them, as generation appends them."""
    torch.manual_seed(2)
    more = torch.randint(3, VOCAB, (ids.shape[0], tokens))
    return torch.cat([ids, more], 1), torch.cat([mask, torch.ones_like(more)], 1)


def close(found: Tensor, expected: Tensor, mask: Tensor) -> None:
    """Equal on real tokens, to float32's last digits at the size of these logits."""
    real = mask.bool()
    scale = expected[real].abs().max().item()
    torch.testing.assert_close(found[real], expected[real], rtol=1e-4, atol=3e-6 * max(scale, 1.0))
