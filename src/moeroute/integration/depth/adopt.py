"""Puts a `VisitSlots` in a cache where a layer changes its depth."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    StaticLayer,
    StaticSlidingWindowLayer,
)

from moeroute.integration.depth.visit_slots import VisitSlots

if TYPE_CHECKING:
    from transformers.cache_utils import Cache

SUPPORTED = (DynamicLayer, DynamicSlidingWindowLayer, StaticLayer, StaticSlidingWindowLayer)


def visit_slots(cache: Cache, layer_idx: int) -> VisitSlots:
    """The `VisitSlots` of a layer in a cache, put there on the first call.

    Raises:
        ValueError: The cache is of a kind that cannot hold visits, or was filled without them.
    """
    if cache.layer_class_to_replicate is not None:
        while len(cache.layers) <= layer_idx:
            cache.layers.append(cache.layer_class_to_replicate())
    slot: Any = cache.layers[layer_idx]
    if isinstance(slot, VisitSlots):
        return slot
    if type(slot) not in SUPPORTED or cache.offloading:
        kind = "an offloaded cache" if cache.offloading else f"a cache of {type(slot).__name__}"
        raise ValueError(
            f"layer {layer_idx} has {kind}; depth routing knows dynamic, static and sliding-window "
            "caches. Use DynamicCache(config=model.config), or use_cache=False"
        )
    slots = VisitSlots(slot)
    if slot.is_initialized and slots.length():
        raise ValueError(
            f"the cache holds {slots.length()} tokens of layer {layer_idx} that ran without depth "
            "routing; a decision for the whole generation cannot join in. Begin with a fresh cache"
        )
    cache.layers[layer_idx] = slots
    return slots
