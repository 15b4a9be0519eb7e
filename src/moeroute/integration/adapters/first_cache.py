"""The key-value cache of a first pass, kept inside that of the second.

Both passes of a token attend to earlier tokens of their own pass. Between two calls the first
pass's layers ride at the end of the caller's cache, so that whoever copies, crops, resets or
reorders that cache (for beams) does so to both; while the model runs they are taken out.
"""

from __future__ import annotations

import copy
from typing import Any

from transformers import Cache

MARK = "moeroute_first_pass"


def take_first(cache: Any) -> Cache:
    """Take the first pass's layers out of a cache.

    Args:
        cache: What the caller continues; from now on it holds the second pass's layers alone.

    Returns:
        A cache of the same kind for the first pass.

    Raises:
        ValueError: The cache holds tokens that no first pass saw, or is none of transformers'.
    """
    if type(cache).__name__ == "EncoderDecoderCache" or not isinstance(cache, Cache):
        raise ValueError(
            f"a first pass cannot keep its states in a {type(cache).__name__}; call with "
            "use_cache=False"
        )
    riding = [layer for layer in cache.layers if getattr(layer, MARK, False)]
    cache.layers = [layer for layer in cache.layers if not getattr(layer, MARK, False)]
    if _length(riding) != _length(cache.layers) or (not riding and any(map(_fills, cache.layers))):
        raise ValueError(
            "the key-value cache holds tokens that no first pass saw: some were added with this "
            "adapter off, in training, or by another model. Start with a fresh cache"
        )
    first = copy.copy(cache)
    first.layers = riding or [copy.deepcopy(layer) for layer in cache.layers]
    return first


def put_first(cache: Cache, first: Cache) -> None:
    """Let the first pass's layers ride on the cache that the call returns."""
    for layer in first.layers:
        setattr(layer, MARK, True)
    cache.layers = [*cache.layers, *first.layers]


def _fills(layer: Any) -> bool:
    """Whether a layer of a cache holds tokens; linear attention holds states instead."""
    states = getattr(layer, "has_previous_state", {})
    initialized = getattr(layer, "is_initialized", False)
    return any(states.values()) or (initialized and int(layer.get_seq_length()) > 0)


def _length(layers: list[Any]) -> int:
    """Tokens in the first layer that counts them on the host (a static one does on the device)."""
    counts = (layer.get_seq_length() for layer in layers if hasattr(layer, "get_seq_length"))
    return next((count for count in counts if isinstance(count, int)), 0)
