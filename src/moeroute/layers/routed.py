"""What all layers that host a router have in common, as functions over them.

A routed layer is any `nn.Module` with the attributes of `RoutedLayer`. Nothing is inherited: the
layers call `route`, and the functions below find them in a model.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, TypeGuard

import torch
from torch import Tensor, nn

from moeroute.depth_types import DepthRecord
from moeroute.layers.post_step import in_backward, stateful_parts
from moeroute.losses.total import LossReport, total_loss
from moeroute.outputs import DistilOutput
from moeroute.routers.collect import is_router_host
from moeroute.routing_pass import RoutingPass
from moeroute.types import AuxLoss, RouterOutput, RoutingRecord

if TYPE_CHECKING:
    from collections.abc import Iterator


class RoutedLayer(Protocol):
    """The attributes that make a module a routed layer."""

    router: nn.Module
    losses: tuple[AuxLoss, ...]
    routing_pass: RoutingPass
    site: str
    layer_index: int
    training: bool


def route(layer: RoutedLayer, hidden_states: Tensor, experts: nn.Module | None) -> RouterOutput:
    """Ask a layer's router, and keep the record if the layer's pass wants one.

    Args:
        layer: The layer that asks.
        hidden_states: (..., H).
        experts: What the record names as the layer's experts.

    Returns:
        The routing of the T flattened tokens.

    Raises:
        RuntimeError: A recurrent router is called outside its model's forward, or under reentrant
            activation checkpointing.
    """
    routing_pass = layer.routing_pass
    router_input = routing_pass.router_input(hidden_states, layer.site)
    routing = layer.router(router_input)
    if routing.state is not None:
        _hand_on(layer, routing.state)
    charged = layer.training and bool(layer.losses)
    shown = layer.training and routing_pass.is_open and not in_backward()
    watching = stateful_parts(layer.router) if shown else []
    if watching or routing_pass.wants(charged=charged):
        record = RoutingRecord(
            site=layer.site or type(layer).__name__,
            layer_index=layer.layer_index,
            routing=routing,
            token_mask=router_input.token_mask,
            sequence_shape=router_input.sequence_shape,
            task_ids=router_input.task_ids,
            router=layer.router,
            experts=experts,
            losses=layer.losses,
        )
        for part in watching:
            part.observe(record)
        if routing_pass.wants(charged=charged):
            routing_pass.keep(record, charged=charged)
    return routing


def _hand_on(layer: RoutedLayer, state: Tensor) -> None:
    routing_pass = layer.routing_pass
    closed = routing_pass.rooted and not routing_pass.is_open
    if closed and not in_backward() and not torch.compiler.is_compiling():
        raise RuntimeError(
            f"{layer.site or type(layer).__name__} routes by the state of the layers before it, "
            "but was called outside the forward of the model that was wrapped; call that model"
        )
    routing_pass.hand_on(layer.site, state)


def is_routed_layer(module: nn.Module) -> TypeGuard[RoutedLayer]:
    """True if the module hosts a router and a routing pass."""
    return is_router_host(module)


def routed_layers(model: nn.Module) -> Iterator[tuple[str, RoutedLayer]]:
    """The routed layers of a model, as (full module name, layer), in module order."""
    for name, module in model.named_modules():
        if is_routed_layer(module):
            yield name, module


def name_routed_layers(model: nn.Module) -> None:
    """Give every routed layer without a site name the name that it has in `model`."""
    for name, layer in routed_layers(model):
        layer.site = layer.site or name


def routing_passes(model: nn.Module) -> tuple[RoutingPass, ...]:
    """The distinct routing passes that a model's routed layers write to."""
    return tuple(
        {id(layer.routing_pass): layer.routing_pass for _, layer in routed_layers(model)}.values()
    )


def aux_losses(model: nn.Module) -> LossReport:
    """The auxiliary losses of the last training forward.

    Reading them tells the model that they are being used; where `labels` were passed to a wrapped
    model they are in `output.loss` already and must not be added again.

    Args:
        model: A wrapped model, or any model that holds routed layers.

    Returns:
        The weighted total, and each loss by name.

    Raises:
        ValueError: The model holds no routed layer.
    """
    passes = routing_passes(model)
    if not passes:
        raise ValueError(
            f"{type(model).__name__} holds no routed layer, so it has no auxiliary losses; build "
            "it with moeroute layers, or wrap it with moeroute.wrap_model"
        )
    return total_loss([record for routing_pass in passes for record in routing_pass.read()])


def losses_lost_their_graph(records: tuple[RoutingRecord, ...]) -> bool:
    """True if a trainable router's logits carry no gradient: reentrant activation checkpointing.

    So it is where a block or a forecaster is taught whose answers carry none.
    """
    if not torch.is_grad_enabled():
        return False
    return any(
        record.losses and (_taught_without_graph(record) or _routed_without_graph(record))
        for record in records
    )


def _routed_without_graph(record: RoutingRecord) -> bool:
    router = record.router
    if router is None or record.routing.router_logits.requires_grad:
        return False
    return any(parameter.requires_grad for parameter in router.parameters())


def _taught_without_graph(record: RoutingRecord) -> bool:
    if isinstance(record.routing, DistilOutput):
        return not record.routing.taught.requires_grad
    unit = record.unit if isinstance(record, DepthRecord) else None
    return unit is not None and unit.forecast is not None and not unit.forecast.requires_grad
