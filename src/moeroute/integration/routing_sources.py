"""Where the routing of a transformers checkpoint can be read off, without importing transformers.

Four kinds of places, tried in this order:

1. experts modules with the uniform call `experts(hidden_states, top_k_index, top_k_weights)`: every
   family that uses transformers' experts registry, and some that do not;
2. routers of families that call their experts in another way, by class name;
3. a list `experts` beside a linear `gate` or `router` in a block that knows its `top_k`: model code
   that comes with a checkpoint;
4. experts that none of these reads; they can only be named.

Axes: T tokens, K slots per token, E experts.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from moeroute.integration.experts_report import experts_report, is_dispatched

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

STACK_NDIM = 3
UNIFORM_IDS = "top_k_index"
TOP_K_NAMES = ("top_k", "num_experts_per_tok")


class Routed(NamedTuple):
    """What one call of a layer routed: E, (T, K) ids (E or more: empty slot), (T, K) weights."""

    num_experts: int
    ids: Tensor
    weights: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """One place to read from.

    Attributes:
        name: Full name of the layer, that of the experts or of the block around a router.
        module: The module to hook.
        reads_input: Whether `read` takes the arguments (bound by name) or the output.
        read: From the module and one of these to what was routed; None if it cannot be read.
    """

    name: str
    module: nn.Module
    reads_input: bool
    read: Callable[[nn.Module, Any], Routed | None]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sources:
    """What was found in a model.

    Attributes:
        readable: In module order.
        unreadable: (module name, class name) of experts that no source covers.
    """

    readable: tuple[Source, ...]
    unreadable: tuple[tuple[str, str], ...]


def find_sources(model: nn.Module) -> Sources:
    """Every place in a model where routing can be read.

    Args:
        model: Any model; a dense one gives none.
    """
    readable = tuple(_readable(model))
    covered = {_block_name(source.name) for source in readable} | {s.name for s in readable}
    unreadable = tuple(
        (name, class_name)
        for name, class_name in experts_report(model).ignored
        if name not in covered and _block_name(name) not in covered
    )
    return Sources(readable=readable, unreadable=unreadable)


def plain_name(name: str) -> str:
    """A module's name without what torch.compile and PEFT put around it."""
    name = name.replace("_orig_mod.", "").removeprefix("base_model.model.")
    name = name.split(".moeroute_site.")[0]
    return ".".join(part for part in name.split(".") if part not in ("base_layer", "depth_host"))


def _readable(model: nn.Module) -> Iterator[Source]:
    for name, module in model.named_modules():
        reader = ROUTER_READERS.get(type(module).__name__)
        if _has_uniform_call(module):
            yield Source(
                name=plain_name(name), module=module, reads_input=True, read=_read_uniform_call
            )
        elif reader is not None:
            yield _router_source(_block_name(name), module, reader)
        else:
            gate = _linear_gate(module)
            if gate is not None:
                yield _router_source(name, gate[0], _top_k_reader(gate[1]))


def _router_source(name: str, module: nn.Module, read: Any) -> Source:
    return Source(name=plain_name(name), module=module, reads_input=False, read=read)


def _block_name(name: str) -> str:
    return name.rpartition(".")[0]


def _has_uniform_call(module: nn.Module) -> bool:
    if is_dispatched(module):
        return True
    own = type(module).forward
    return UNIFORM_IDS in inspect.signature(own).parameters and _num_experts(module) is not None


def bind_arguments(
    module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments of a call by the names that the class's `forward` gives them, in order."""
    names = list(inspect.signature(type(module).forward).parameters)[1:]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _read_uniform_call(module: nn.Module, arguments: Any) -> Routed | None:
    values = list(arguments.values())
    num_experts = _num_experts(module)
    if num_experts is None or len(values) < STACK_NDIM:
        return None
    _, ids, weights = values[:3]
    if not isinstance(ids, Tensor) or not isinstance(weights, Tensor):
        return None
    if ids.is_floating_point() or ids.ndim != 2 or ids.shape != weights.shape:
        return None
    return Routed(num_experts, ids, weights)


def _num_experts(module: nn.Module) -> int | None:
    count = getattr(module, "num_experts", None)
    if isinstance(count, int):
        return count
    stacks = (p.shape[0] for p in module.parameters(recurse=False) if p.ndim == STACK_NDIM)
    return next(stacks, None)


def _linear_gate(block: nn.Module) -> tuple[nn.Module, int] | None:
    experts = getattr(block, "experts", None)
    gate = getattr(block, "gate", getattr(block, "router", None))
    top_k = next((k for n in TOP_K_NAMES if isinstance(k := getattr(block, n, None), int)), None)
    if not isinstance(experts, nn.ModuleList) or top_k is None:
        return None
    if isinstance(gate, nn.Module) and getattr(gate, "out_features", None) == len(experts):
        return gate, top_k
    return None


def _top_k_reader(top_k: int) -> Callable[[nn.Module, Any], Routed | None]:
    def read(_: nn.Module, output: Any) -> Routed | None:
        if not isinstance(output, Tensor):
            return None
        logits = output.reshape(-1, output.shape[-1]).float()
        weights, ids = logits.softmax(-1).topk(top_k, dim=-1)
        return Routed(logits.shape[-1], ids, weights)

    return read


def _read_scores(router: Any, output: Any) -> Routed | None:
    scores, _ = output  # (T, E), 0 where not selected
    weights, ids = scores.float().topk(router.top_k, dim=-1)
    return Routed(scores.shape[-1], ids, weights)


def _read_softmax_of_top_k(router: Any, output: Any) -> Routed | None:
    logits = output[-1]
    top, ids = logits.float().topk(router.top_k, dim=-1)
    return Routed(logits.shape[-1], ids, top.softmax(-1))


def _read_top_1_mask(_: nn.Module, output: Any) -> Routed | None:
    mask, weights, _ = output  # (B, S, E) one-hot, all 0 beyond capacity; (B, S, 1)
    size = mask.shape[-1]
    ids = torch.where(mask.any(-1), mask.argmax(-1), size)
    return Routed(size, ids.reshape(-1, 1), weights.reshape(-1, 1))


ROUTER_READERS: Mapping[str, Callable[[Any, Any], Routed | None]] = MappingProxyType(
    {
        "JetMoeTopKGating": _read_softmax_of_top_k,
        "Llama4Router": _read_scores,
        "SwitchTransformersTop1Router": _read_top_1_mask,
    }
)
