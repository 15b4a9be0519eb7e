"""Finds the decoder layers of a transformers model, and says which of them cannot change depth."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.cache_utils import DynamicCache

from moeroute.integration.depth.adopt import SUPPORTED
from moeroute.integration.depth.layer_answer import answers_in_tuple

HOST = "depth_host"
"""Name of the child that is put beside a decoder layer's own."""

CACHE_NAMES = ("past_key_values", "past_key_value", "layer_past")


@dataclass(frozen=True, kw_only=True, slots=True)
class LayerFacts:
    """What has to be known of a decoder layer to call it.

    Attributes:
        name: Full module name.
        class_name: For messages.
        position: Its place among the model's decoder layers.
        cache_name: The argument that takes the cache.
        cache_index: Its place in the cache.
        argument_names: Of its forward, in order, the hidden states first.
        in_tuple: Whether it answers with a tuple that begins with the hidden states.
    """

    name: str
    class_name: str
    position: int
    cache_name: str
    cache_index: int
    argument_names: tuple[str, ...]
    in_tuple: bool


def is_decoder_layer(model: nn.Module, name: str) -> bool:
    """True if a module stands in a list and its forward takes hidden states and a cache."""
    parent = name.rpartition(".")[0]
    in_list = isinstance(model.get_submodule(parent), nn.ModuleList)
    return in_list and cache_name(model.get_submodule(name)) is not None


def decoder_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every decoder layer of a model, by full name, in module order."""
    return {name: layer for name, layer in model.named_modules() if is_decoder_layer(model, name)}


def layer_facts(model: nn.Module) -> dict[str, LayerFacts]:
    """The facts of every decoder layer of a model, by full name, in order.

    Raises:
        ValueError: There are none, or the model is no decoder.
    """
    layers = decoder_layers(model)
    config = getattr(model, "config", None)
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{type(model).__name__} is an encoder-decoder model; depth routing decides on the "
            "layers of decoder-only models"
        )
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no decoder layers that moeroute can find: modules of a "
            f"list whose forward takes hidden states and one of {', '.join(CACHE_NAMES)}"
        )
    encoders = [name for name, layer in layers.items() if _sees_the_future(layer)]
    if encoders:
        raise ValueError(
            f"{type(model).__name__} is an encoder: {encoders[0]} attends to later tokens. Depth "
            "routing decides on the layers of decoder-only models"
        )
    return {
        name: LayerFacts(
            name=name,
            class_name=type(layer).__name__,
            position=position,
            cache_name=cache_name(layer) or CACHE_NAMES[0],
            cache_index=_cache_index(layer, position),
            argument_names=argument_names(layer),
            in_tuple=answers_in_tuple(layer),
        )
        for position, (name, layer) in enumerate(layers.items())
    }


def check_depth(model: nn.Module, facts: list[LayerFacts]) -> None:
    """Make sure that these layers can be skipped and repeated.

    Raises:
        ValueError: One keeps a state that a skipped token would have had to change (recurrent and
            linear attention, convolutions), or shares its keys with other layers.
    """
    slots = _slots(model)
    if slots is None:
        return
    wrong = [(fact, slots[fact.cache_index]) for fact in facts if _is_other(slots, fact)]
    if wrong:
        listed = ", ".join(f"{fact.name} ({type(slot).__name__})" for fact, slot in wrong)
        raise ValueError(
            f"{len(wrong)} layers of {type(model).__name__} keep a state that cannot be skipped or "
            f"repeated, or share their keys: {listed}. Only layers of full or sliding-window "
            "attention can; name those in target_modules"
        )


def _slots(model: nn.Module) -> list[Any] | None:
    """The slots that a cache of this model would have; None if they are all alike."""
    config = getattr(model, "config", None)
    if config is None:
        return None
    slots = DynamicCache(config=config).layers
    return slots or None


def _is_other(slots: list[Any], fact: LayerFacts) -> bool:
    return fact.cache_index < len(slots) and type(slots[fact.cache_index]) not in SUPPORTED


def cache_name(layer: nn.Module) -> str | None:
    """The argument that takes the cache; None if the forward takes no hidden states or no cache."""
    names = argument_names(layer)
    if not names or names[0] != "hidden_states":
        return None
    return next((name for name in CACHE_NAMES if name in names), None)


def argument_names(layer: nn.Module) -> tuple[str, ...]:
    """Of a module's forward, in order, without itself."""
    return tuple(inspect.signature(type(layer).forward).parameters)[1:]


def _sees_the_future(layer: nn.Module) -> bool:
    return any(getattr(module, "is_causal", None) is False for module in layer.modules())


def _cache_index(layer: nn.Module, position: int) -> int:
    found = (getattr(module, "layer_idx", None) for module in layer.modules())
    return next((index for index in found if isinstance(index, int)), position)
