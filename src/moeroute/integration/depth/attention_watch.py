"""Shows what a layer's attention works on, by the interface that attention goes through.

An attention of transformers asks its config for the name of an implementation and calls the
function of that name. While it is watched, its config is a copy that names `watched_attention`,
which shows query and key to the watcher and then calls what the config proper names, with the same
arguments: the answer is the same, bit for bit.
"""

from __future__ import annotations

import copy
import inspect
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn
from transformers import AttentionInterface

from moeroute.depth_types import AttentionSeen, WatchesAttention

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    Watcher = Callable[[AttentionSeen], None]

NAME = "moeroute_watched"
INTERFACE, DEFAULT, IMPLEMENTATION = (
    "ALL_ATTENTION_FUNCTIONS",
    "eager_attention_forward",
    "_attn_implementation",
)
WATCHING = "moeroute_watching"


@dataclass(frozen=True, slots=True)
class _Watching:
    """What the copy of a config holds beside the config.

    Attributes:
        config: The config proper.
        watcher: Is shown each call.
    """

    config: Any
    watcher: Watcher


@contextmanager
def watch_attention(layer: nn.Module, name: str, watcher: Watcher) -> Iterator[None]:
    """Show `watcher` every call of a decoder layer's attention inside the block.

    Raises:
        ValueError: The layer's attention cannot be watched.
    """
    attention: Any = attention_of(layer, name)
    config = attention.config
    view = copy.copy(config)
    view.__dict__[f"{IMPLEMENTATION}_internal"] = NAME
    view.__dict__[WATCHING] = _Watching(config, watcher)
    attention.config = view
    try:
        yield
    finally:
        attention.config = config


def watched_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any
) -> Any:
    """Show the watcher what goes in, and answer as the config proper says.

    Raises:
        ValueError: The mask is of a kind that cannot be read.
    """
    watching: _Watching = module.config.__dict__[WATCHING]
    module.config = watching.config
    if attention_mask is not None and not isinstance(attention_mask, Tensor):
        raise ValueError(
            f"attention_mask is a {type(attention_mask).__name__}, which cannot be read token by "
            'token; load the model with attn_implementation="sdpa" or "eager"'
        )
    scaling = kwargs.get("scaling")
    seen = AttentionSeen(
        query=query.detach(),
        key=key.detach(),
        mask=attention_mask,
        scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
        softcap=kwargs.get("softcap"),
    )
    watching.watcher(seen)
    names = _names_of(type(module))
    implementation = getattr(watching.config, IMPLEMENTATION)
    run = names[INTERFACE].get_interface(implementation, names.get(DEFAULT))
    return run(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register(NAME, watched_attention)


def attention_of(layer: nn.Module, name: str) -> nn.Module:
    """The attention of a decoder layer.

    Raises:
        ValueError: There is not exactly one that goes through the interface and leaves the choice
            to it.
    """
    found = [module for module in layer.modules() if _asks_interface(type(module))]
    if len(found) == 1 and not _asks_otherwise(type(found[0])):
        return found[0]
    wrong = "several attentions" if found else "no attention that asks transformers' interface"
    if len(found) == 1:
        wrong = f"a {type(found[0]).__name__} that asks for its implementation by name"
    raise ValueError(
        f"{name} ({type(layer).__name__}) has {wrong}, so that what its tokens attend to cannot be "
        f"watched; use a model whose layers have one attention that calls {INTERFACE}, as Llama's "
        "do, or MixtureOfDepths, which does not look at attention"
    )


def check_watched(root: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Make sure that what is to be watched can be.

    Args:
        root: The model.
        modules: What a method built, by the name of its decoder layer.

    Raises:
        ValueError: One of them watches an attention that cannot be watched.
    """
    for name, module in modules.items():
        if isinstance(module, WatchesAttention) and module.watches_attention:
            attention_of(root.get_submodule(name), name)


@cache
def _asks_interface(kind: type) -> bool:
    code = getattr(_forward_of(kind), "__code__", None)
    return code is not None and INTERFACE in code.co_names


@cache
def _asks_otherwise(kind: type) -> bool:
    """True if a forward looks at the implementation's name for more than to call it."""
    return inspect.getsource(_forward_of(kind)).count(IMPLEMENTATION) != 1


def _names_of(kind: type) -> dict[str, Any]:
    """The names that a forward sees."""
    return _forward_of(kind).__globals__


def _forward_of(kind: type) -> Any:
    return inspect.unwrap(kind.forward)
