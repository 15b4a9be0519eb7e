"""What every host of adapters does, as functions: take a method's module in, say which answers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from moeroute.layers.routed import is_routed_layer
from moeroute.routing_pass import RoutingPass

SITE_PREFIX = "moeroute_site"

MERGE_IS_UNDEFINED = (
    "merging is undefined for a mixture whose weights depend on the token: no single matrix equals "
    "it. Keep the adapter (save_pretrained, PeftModel.from_pretrained), take a plain LoRA near it "
    "by moeroute.merge(model), or drop it with moeroute.unwrap_model(model) to get the base back"
)


def take_in(
    adapters: nn.ModuleDict,
    adapter_name: str,
    module: nn.Module,
    routing_pass: RoutingPass,
    move: Callable[[str], None],
) -> None:
    """Put a method's module under an adapter's name, on the pass and the device of its host.

    Args:
        adapters: The host's modules by adapter name.
        adapter_name: The adapter's name.
        module: What a method built.
        routing_pass: The wrapped model's pass.
        move: Moves an adapter, by its name, to the host's device and dtype.
    """
    for part in module.modules():
        if is_routed_layer(part):
            part.routing_pass = routing_pass
    adapters[adapter_name] = module
    exact = [
        (owner, key, value)
        for owner in module.modules()
        for key, value in owner.named_buffers(recurse=False)
    ]
    move(adapter_name)
    for owner, key, value in exact:  # PEFT widens parameters again after this cast, not buffers
        setattr(owner, key, value.to(owner.get_buffer(key).device))


def check_one_active(adapters: nn.ModuleDict, names: Sequence[str]) -> None:
    """Raise ValueError if more than one of a host's adapters is named."""
    here = [name for name in names if name in adapters]
    if len(here) > 1:
        raise ValueError(
            f"adapters {here} cannot be active together: each answers for the whole module. "
            "Activate one with set_adapter(name)"
        )


def first_active(adapters: nn.ModuleDict, active: Sequence[str]) -> nn.Module | None:
    """The module of the first active adapter that stands here; None if there is none."""
    for name in active:
        if name in adapters:
            return adapters[name]
    return None
