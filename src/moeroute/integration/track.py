"""`track_routing`: watch the routing of an MoE checkpoint or of a model with moeroute's layers."""

from __future__ import annotations

import warnings
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moeroute.depth_types import DepthRecord
from moeroute.integration.depth.decoder_layers import HOST
from moeroute.integration.depth.host import depth_hosts
from moeroute.integration.gates import hosts_by_experts
from moeroute.integration.routing_sources import bind_arguments, find_sources, plain_name
from moeroute.integration.statistics import RoutingStats
from moeroute.layers.routed import routed_layers, routing_passes

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from moeroute.integration.coupling import CouplingGauge
    from moeroute.integration.routing_sources import Routed, Source, Sources
    from moeroute.types import RoutingRecord

NOT_IN_BACKWARD = -1


@contextmanager
def track_routing(
    model: nn.Module, *, coactivation: bool = True, coupling: bool = False
) -> Iterator[RoutingStats]:
    """Watch which experts the tokens go to, in training and in evaluation, inside the block.

    Works on transformers' MoE checkpoints as they are, on models that `moeroute.wrap_model` has
    wrapped, and on models built from moeroute's layers. Counts are added up on the device; nothing
    waits for it until the statistics are read, during the block or after it. Padding is left out
    where the model is called with an `attention_mask`; what activation checkpointing computes again
    is not counted twice. Compiled modules run uncompiled inside the block.

    Args:
        model: The model. It is unchanged after the block.
        coactivation: Whether to count which experts are chosen together, an (E, E) table a layer.
        coupling: Whether to measure how specialised router and experts are (`LayerStats.gauge`),
            anew each time that the statistics are read: E^2 products with the experts' first
            matrices a layer.

    Yields:
        The statistics, empty until the model is called.

    Raises:
        ValueError: The model has no routed layer.

    Example:
        >>> with moeroute.track_routing(model) as stats:
        ...     model(input_ids=input_ids)
        >>> print(stats.summary())
    """
    sources = find_sources(model)
    gates = hosts_by_experts(model)
    hosts = _names_by_router(model, gates)
    depths = {host.facts.name: host.routing_pass for _, host in depth_hosts(model)}
    hosted = set(hosts.values()) | {plain_name(name) for name in depths}
    if not hosted and not sources.readable:
        raise ValueError(_nothing_to_track(model, sources))
    if sources.unreadable:
        warnings.warn(_unreadable(sources), stacklevel=3)
    wanted = {*hosted, *(source.name for source in sources.readable)}
    ordered = [name for name in map(plain_name, _module_names(model)) if name in wanted]
    names = list(dict.fromkeys([*ordered, *sorted(wanted)]))
    stats = RoutingStats(_class_name(model), names, coactivation=coactivation)
    if coupling:
        stats.gauges = partial(_gauges, model)
    with ExitStack() as stack:
        masks = _Masks()
        for module in _callables_with_mask(model):
            stack.callback(module.register_forward_pre_hook(masks.push, with_kwargs=True).remove)
            stack.callback(module.register_forward_hook(masks.pop, always_call=True).remove)
        for source in sources.readable:
            stack.callback(_watch(source, stats, masks, gates.get(id(source.module))))
        for routing_pass in dict.fromkeys([*routing_passes(model), *depths.values()]):
            stack.enter_context(routing_pass.listening(_listener(stats, masks, hosts)))
        if _is_compiled(model):
            stack.enter_context(torch.compiler.set_stance("force_eager"))
        yield stats


def _gauges(model: nn.Module) -> dict[str, CouplingGauge]:
    from moeroute.integration.coupling import coupling_gauges

    return {plain_name(name): gauge for name, gauge in coupling_gauges(model).items()}


class _Masks:
    """The padding masks of the calls that are running now, the innermost last."""

    def __init__(self) -> None:
        self.stack: list[Tensor | None] = []

    def push(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Forward pre-hook: take the call's own mask, else the one of the call around it."""
        arguments = bind_arguments(module, args, kwargs)
        around = self.stack[-1] if self.stack else None
        mask = arguments.get("attention_mask", around)
        if isinstance(mask, Tensor) and mask.ndim == 2:
            self.stack.append(_of_these_tokens(mask, arguments))
        else:
            self.stack.append(None if mask is None else around)

    def pop(self, *_: Any) -> None:
        """Forward hook, also called after an exception."""
        self.stack.pop()

    def of(self, tokens: int) -> Tensor | None:
        """The (T,) mask if it speaks of this many tokens, else None."""
        mask = self.stack[-1] if self.stack else None
        return mask.reshape(-1) if mask is not None and mask.numel() == tokens else None


def _of_these_tokens(mask: Tensor, arguments: dict[str, Any]) -> Tensor:
    """A mask that also covers cached tokens is cut to the tokens of this call."""
    for name in ("input_ids", "inputs_embeds"):
        tokens = arguments.get(name)
        if isinstance(tokens, Tensor) and tokens.ndim > 1:
            mask = mask[:, -tokens.shape[1] :]
    return mask.to(torch.bool)


def _watch(
    source: Source, stats: RoutingStats, masks: _Masks, gate: Any = None
) -> Callable[[], None]:
    """Hook one place; the result takes the hook off again.

    While a method answers for the gate before it, its record tells, which knows empty slots.
    """

    def keep(routed: Routed | None) -> None:
        if routed is None or _recomputing():
            return
        if gate is not None and gate.active_module() is not None:
            return
        mask = masks.of(routed.ids.shape[0])
        stats.add(source.name, routed.num_experts, routed.ids, routed.weights, mask)

    def before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        keep(source.read(module, bind_arguments(module, args, kwargs)))

    def after(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        keep(source.read(module, output))

    if source.reads_input:
        return source.module.register_forward_pre_hook(before, with_kwargs=True).remove
    return source.module.register_forward_hook(after).remove


def _names_by_router(model: nn.Module, gates: dict[int, nn.Module]) -> dict[int, str]:
    """Layer names by the identity of their routers; the class stands for a layer that is root.

    A router at a checkpoint's gate has the name of the experts, as without it; one of a decoder
    layer that of the layer, or of its unit.
    """
    names: dict[int, str] = {}
    for name, layer in routed_layers(model):
        place = layer.site if f".{HOST}." in name else name
        names[id(layer.router)] = plain_name(place) or type(layer).__name__
    for name, module in model.named_modules():
        if id(module) in gates:
            for _, layer in routed_layers(gates[id(module)]):
                names[id(layer.router)] = plain_name(name)
    return names


def _listener(
    stats: RoutingStats, masks: _Masks, hosts: dict[int, str]
) -> Callable[[RoutingRecord], None]:
    def listen(record: RoutingRecord) -> None:
        if _recomputing():
            return
        routing = record.routing
        mask = record.token_mask
        if mask is None:
            mask = masks.of(routing.selected_experts.shape[0])
        stats.add(
            hosts.get(id(record.router)) or plain_name(record.site),
            routing.num_experts,
            routing.selected_experts,
            routing.routing_weights,
            mask,
            layer_share=record.layer_share if isinstance(record, DepthRecord) else None,
            expert_names=record.expert_names,
        )

    return listen


def _recomputing() -> bool:
    """True inside a backward pass: activation checkpointing computes a forward again there."""
    return torch._C._current_graph_task_id() != NOT_IN_BACKWARD


def _callables_with_mask(model: nn.Module) -> list[nn.Module]:
    """The model itself and every transformers model inside it: a call may enter at any of them."""
    inner = [m for m in model.modules() if isinstance(getattr(m, "main_input_name", None), str)]
    return [model, *(module for module in inner if module is not model)]


def _module_names(model: nn.Module) -> Iterator[str]:
    for name, _ in model.named_modules():
        yield name
        if name.endswith((".gate", ".router")):
            yield name.rpartition(".")[0]


def _is_compiled(model: nn.Module) -> bool:
    return any(
        type(module).__name__ == "OptimizedModule" or module._compiled_call_impl is not None
        for module in model.modules()
    )


def _class_name(model: nn.Module) -> str:
    """The class of the model inside what torch.compile and PEFT put around it."""
    model = getattr(model, "_orig_mod", model)
    inner = getattr(model, "get_base_model", None)
    return type(inner() if inner is not None else model).__name__


def _nothing_to_track(model: nn.Module, sources: Sources) -> str:
    message = (
        f"{_class_name(model)} has no routed layer that can be tracked. Looked for: moeroute's "
        "layers (a wrapped model, MoELayer); transformers experts modules called with "
        "(hidden_states, top_k_index, top_k_weights); the routers of known families; an `experts` "
        "list beside a linear `gate`"
    )
    if sources.unreadable:
        return f"{message}. {_unreadable(sources)}"
    return f"{message}. Pass an MoE checkpoint, or wrap this model with moeroute.wrap_model first"


def _unreadable(sources: Sources) -> str:
    classes = sorted({class_name for _, class_name in sources.unreadable})
    return (
        f"{len(sources.unreadable)} experts modules cannot be tracked ({', '.join(classes)}; "
        f"first: {sources.unreadable[0][0]}): this family does not call its experts with ids and "
        "weights, and its router is not known to moeroute"
    )
