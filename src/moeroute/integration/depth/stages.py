"""Says which part of a method learns: that is its stage of training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, runtime_checkable

from moeroute.integration.adapters.site_host import SiteHost
from moeroute.integration.depth.host import depth_hosts

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import nn


@runtime_checkable
class Staged(Protocol):
    """A module of which parts learn one after the other."""

    @property
    def stages(self) -> Mapping[str, tuple[nn.Module, ...]]:
        """Name of a part -> the modules that it is made of; together they are all that learns."""
        ...


def train_only(model: nn.Module, part: str) -> None:
    """Let one part of the active adapter learn, and freeze its others.

    The parts of `InformedRouting` are "forecasters" and "routers", those of `DuoLLM` "small", the
    small blocks, and "routers"; the papers train them in this order. Layers do what their stage
    asks for: see the method. "all" is how a model is after wrapping. Make the optimizer of a stage
    after calling this.

    Args:
        model: A model that `moeroute.wrap_model` has wrapped.
        part: What learns.

    Raises:
        ValueError: The part is unknown, or the active adapter learns in no stages.

    Example:
        >>> moeroute.depth.train_only(wrapped, "small")
        >>> optimizer = torch.optim.AdamW(p for p in wrapped.parameters() if p.requires_grad)
    """
    staged = [part for module in active_modules(model) for part in _staged_parts(module)]
    known = list(dict.fromkeys(name for module in staged for name in module.stages))
    if not staged:
        raise ValueError(
            f"{type(model).__name__} has no active adapter that learns in stages; wrap it with "
            "InformedRouting or DuoLLM by moeroute.wrap_model, or activate one with "
            "set_adapter(name)"
        )
    if part not in (*known, "all"):
        raise ValueError(f"part={part!r} is none of {', '.join(known)} and all")
    for module in staged:
        for name, parts in module.stages.items():
            for each in parts:
                each.requires_grad_(part in (name, "all"))


def active_modules(model: nn.Module) -> list[nn.Module]:
    """What answers at the sites of the active adapter, in module order."""
    at_sites = [host for host in model.modules() if isinstance(host, SiteHost)]
    hosts = [*at_sites, *(host for _, host in depth_hosts(model))]
    found = [host.active_module() for host in hosts]
    return [module for module in found if module is not None]


def _staged_parts(module: nn.Module) -> list[Staged]:
    return [part for part in module.modules() if isinstance(part, Staged)]
