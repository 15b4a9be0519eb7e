"""What the hosts of a method's modules have in common, as functions over them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from torch import nn

from moeroute.layers.routed import is_routed_layer

if TYPE_CHECKING:
    from moeroute.routing_pass import RoutingPass

SITE_PREFIX = "moeroute_site"


class Host(Protocol):
    """A PEFT layer that holds, by adapter name, what a method built."""

    moeroute_site: nn.ModuleDict
    routing_pass: RoutingPass
    training: bool

    @property
    def disable_adapters(self) -> bool:
        """Whether the base answers."""
        ...

    @property
    def active_adapters(self) -> list[str]:
        """The names of the active adapters."""
        ...


def add_module(host: Host, adapter_name: str, module: nn.Module) -> None:
    """Host `module` under an adapter's name; its routed layers get the host's pass."""
    for part in module.modules():
        if is_routed_layer(part):
            part.routing_pass = host.routing_pass
    module.train(host.training)
    host.moeroute_site[adapter_name] = module


def active_module(host: Host) -> nn.Module | None:
    """What answers here now; None if the base does."""
    if host.disable_adapters:
        return None
    for name in host.active_adapters:
        if name in host.moeroute_site:
            return host.moeroute_site[name]
    return None


def check_one_active(host: Host, adapter_names: str | list[str]) -> list[str]:
    """The names as a list; several at once are undefined for modules that answer for all.

    Raises:
        ValueError: More than one of this host's adapters is named.
    """
    names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
    here = [name for name in names if name in host.moeroute_site]
    if len(here) > 1:
        raise ValueError(
            f"adapters {here} cannot be active together: each answers for the whole module. "
            "Activate one with set_adapter(name)"
        )
    return names
