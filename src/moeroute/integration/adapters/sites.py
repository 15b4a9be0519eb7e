"""Finds the places in a host model where a method can stand."""

from __future__ import annotations

import difflib
import re
import warnings
from typing import TYPE_CHECKING

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from moeroute.integration.depth.decoder_layers import is_decoder_layer
from moeroute.integration.depth.units import unit_names
from moeroute.integration.gate_families import GATES
from moeroute.integration.gates import gate_form, gate_sizes, unknown_gates
from moeroute.types import Site, SiteKind

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

NEAREST = 10
STACK_NDIM = 3

MLP_PARTS: tuple[dict[str, str], ...] = (
    {"gate": "gate_proj", "up": "up_proj", "down": "down_proj", "act": "act_fn"},
    {"gate": "w1", "up": "w3", "down": "w2", "act": "act_fn"},
    {"up": "fc1", "down": "fc2", "act": "activation_fn"},
    {"up": "fc1", "down": "fc2", "act": "act_fn"},
    {"up": "up_proj", "down": "down_proj", "act": "act_fn"},
    {"up": "c_fc", "down": "c_proj", "act": "act"},
    {"up": "dense_h_to_4h", "down": "dense_4h_to_h", "act": "act"},
)


def linear_widths(module: nn.Module) -> tuple[int, int] | None:
    """(in_features, out_features) of a linear, quantised or not; None for anything else."""
    if isinstance(module, Conv1D):
        return module.weight.shape[0], module.weight.shape[1]
    sizes = (getattr(module, "in_features", None), getattr(module, "out_features", None))
    if isinstance(sizes[0], int) and isinstance(sizes[1], int):
        return sizes[0], sizes[1]
    return None


def mlp_parts(module: nn.Module) -> Mapping[str, str] | None:
    """Role -> attribute name if the module is a feed-forward block of linears, else None."""
    for parts in MLP_PARTS:
        children = {role: getattr(module, name, None) for role, name in parts.items()}
        act = children.pop("act")
        linears = all(
            isinstance(child, nn.Module) and linear_widths(child) for child in children.values()
        )
        if linears and isinstance(act, nn.Module):
            return parts
    return None


def make_site(model: nn.Module, name: str, module: nn.Module, kind: SiteKind) -> Site | None:
    """Describe one module as a site of this kind; None if it is no such thing."""
    base = module.get_base_layer() if isinstance(module, BaseTunerLayer) else module
    parts = mlp_parts(base) if kind == "mlp" else {}
    if parts is None:
        return None
    if kind == "decoder_layer":
        return _decoder_site(model, name, base)
    widths = {
        role: sizes
        for role, attribute in parts.items()
        if role != "act" and (sizes := linear_widths(base.get_submodule(attribute)))
    }
    own, gate = _own_widths(base, kind, widths), None
    if own is None:
        return None
    if kind == "gate":
        gate = gate_form(base, model.get_submodule(name.rpartition(".")[0]))
    return Site(
        name=name,
        kind=kind,
        module=base,
        layer_index=_layer_index(name),
        num_layers=getattr(getattr(model, "config", None), "num_hidden_layers", None) or 0,
        in_features=own[0],
        out_features=own[1],
        parts=parts,
        widths=widths,
        gate=gate,
        hidden_size=_hidden_size(model),
    )


def _own_widths(
    module: nn.Module, kind: SiteKind, widths: Mapping[str, tuple[int, int]]
) -> tuple[int, int] | None:
    if kind == "linear":
        return linear_widths(module)
    if kind == "mlp":
        return widths["up"][0], widths["down"][1]
    if kind == "gate" and type(module).__name__ in GATES:
        return gate_sizes(module)[:2]
    return None


def _decoder_site(model: nn.Module, name: str, module: nn.Module) -> Site | None:
    if not is_decoder_layer(model, name):
        return None
    config = model.config.get_text_config(decoder=True)  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
    return Site(
        name=name,
        kind="decoder_layer",
        module=module,
        layer_index=_layer_index(name),
        num_layers=config.num_hidden_layers,
        in_features=config.hidden_size,
        out_features=config.hidden_size,
        parts={**unit_names(module)},
    )


def find_sites(model: nn.Module, kind: SiteKind) -> list[Site]:
    """Every place of this kind, in module order, outside adapters and the output embedding."""
    head = _output_embedding(model)
    hosts = [
        name + "." for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)
    ]
    sites = []
    for name, module in model.named_modules():
        if not name or module is head or name.startswith(tuple(hosts)):
            continue
        site = make_site(model, name, module, kind)
        if site is not None:
            sites.append(site)
    return sites


def default_targets(model: nn.Module, kind: SiteKind) -> set[str]:
    """`target_modules` that match exactly the sites of a kind, by last name parts if possible.

    Raises:
        ValueError: The model has no such place.
    """
    names = [site.name for site in find_sites(model, kind)]
    unknown = unknown_gates(model) if kind == "gate" else {}
    if unknown:
        _tell_of_unknown_gates(model, unknown, raises=not names)
    if not names:
        raise ValueError(
            f"{type(model).__name__} has no {kind} site that moeroute knows; pass target_modules "
            f"by name. {_describe_kind(kind)}"
        )
    return shortest_targets(model, names)


def shortest_targets(model: nn.Module, names: Iterable[str]) -> set[str]:
    """`target_modules` that match exactly these modules, by last name parts if possible."""
    wanted = set(names)
    suffixes = {name.rpartition(".")[2] for name in wanted}
    matched = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in suffixes}
    return suffixes if matched == wanted else wanted


def _tell_of_unknown_gates(model: nn.Module, unknown: Mapping[str, str], *, raises: bool) -> None:
    """Say that a family's gates are not known; raise ValueError if there are no others."""
    place, reason = next(iter(unknown.items()))
    message = (
        f"{type(model).__name__} has {len(unknown)} gates at which no method can stand, first "
        f"{place}, a {reason}. Known gates: {', '.join(sorted(GATES))}"
    )
    if raises:
        raise ValueError(message)
    warnings.warn(f"{message}. They keep the checkpoint's routing", stacklevel=2)


def check_targets(
    model: nn.Module, kind: SiteKind, targets: str | Iterable[str], is_target: Callable[[str], bool]
) -> list[Site]:
    """The sites that were asked for.

    Raises:
        ValueError: Nothing matched, one entry of a list matched nothing, or a match is of another
            kind.
    """
    names = [name for name, _ in model.named_modules() if name and is_target(name)]
    entries = [targets] if isinstance(targets, str) else sorted(targets)
    if not names:
        raise ValueError(_no_match(model, kind, entries))
    if not isinstance(targets, str):
        reachable = [name for name, _ in model.named_modules()]
        idle = [entry for entry in entries if not _any_ends_with(reachable, entry)]
        if idle:
            raise ValueError(_no_match(model, kind, idle))
    sites = []
    for name in names:
        module = model.get_submodule(name)
        site = make_site(model, name, module, kind)
        if site is None:
            reason = unknown_gates(model).get(name) if kind == "gate" else None
            if reason is not None:
                raise ValueError(f"no method can stand at {name}, a {reason}")
            raise ValueError(
                f"{name} is a {type(module).__name__}, not a {kind} site; {_describe_kind(kind)}. "
                "Change target_modules or exclude_modules"
            )
        sites.append(site)
    return sites


def warn_of_untouched_experts(model: nn.Module) -> None:
    """Say that stacked experts stay as they are: they are no linears, and match no name."""
    stacks = [
        name
        for name, module in model.named_modules()
        if any(parameter.ndim == STACK_NDIM for parameter in module.parameters(recurse=False))
        and isinstance(getattr(module, "num_experts", None), int)
    ]
    if stacks:
        warnings.warn(
            f"{len(stacks)} stacks of experts get no adapter (first: {stacks[0]}): their weights "
            "are 3-D parameters, not linears. To adapt them use "
            "peft.LoraConfig(target_parameters=[...]); name target_modules to silence this",
            stacklevel=2,
        )


def _layer_index(name: str) -> int:
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return int(found.group(1)) if found else -1


def _hidden_size(model: nn.Module) -> int:
    config = getattr(model, "config", None)
    if isinstance(config, PreTrainedConfig):
        return getattr(config.get_text_config(decoder=True), "hidden_size", 0)
    return 0


def _output_embedding(model: nn.Module) -> nn.Module | None:
    getter = getattr(model, "get_output_embeddings", None)
    return getter() if getter is not None else None


def _any_ends_with(names: list[str], entry: str) -> bool:
    return any(name == entry or name.endswith("." + entry) for name in names)


def _no_match(model: nn.Module, kind: SiteKind, entries: list[str]) -> str:
    known = [site.name for site in find_sites(model, kind)]
    words = list(dict.fromkeys([*(name.rpartition(".")[2] for name in known), *known]))
    ranked = sorted(words, key=lambda word: -max(_likeness(entry, word) for entry in entries))
    nearest = ", ".join(ranked[:NEAREST]) or "none"
    return (
        f"target_modules={entries} match no module of {type(model).__name__}; nothing would be "
        f"adapted. Nearest {kind} sites: {nearest}"
    )


def _likeness(a: str, b: str) -> float:
    return difflib.SequenceMatcher(None, a, b).ratio()


def _describe_kind(kind: SiteKind) -> str:
    if kind == "mlp":
        known = "; ".join("/".join(parts.values()) for parts in MLP_PARTS)
        return f"a feed-forward block holds linears and an activation named as one of: {known}"
    if kind == "gate":
        return f"a gate is one of {', '.join(sorted(GATES))}"
    if kind == "decoder_layer":
        return "a decoder layer stands in a list and takes hidden_states and a cache"
    return "a linear has in_features and out_features"
