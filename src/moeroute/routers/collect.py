"""Finds the routers that stand in a model."""

from __future__ import annotations

from torch import nn

from moeroute.routing_pass import RoutingPass


def is_router_host(module: nn.Module) -> bool:
    """True if the module asks a router of its own and keeps its records in a routing pass."""
    has_pass = isinstance(module.__dict__.get("routing_pass"), RoutingPass)
    return has_pass and any(name == "router" for name, _ in module.named_children())


def routers_in(model: nn.Module) -> dict[str, nn.Module]:
    """Every router of a model, by the full module name of the layer that hosts it.

    Args:
        model: A wrapped model, or any model that holds routed layers.

    Returns:
        Layer name -> router; empty if there are none.
    """
    return {
        name: module.get_submodule("router")
        for name, module in model.named_modules()
        if is_router_host(module)
    }
