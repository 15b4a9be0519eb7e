"""One model out of LoRA adapters that exist: `mix_adapters`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moeroute.integration.adapters.read_lora import LoRAAdapter, SiteLoRA, read_lora
from moeroute.integration.adapters.site_host import SiteHost
from moeroute.integration.adapters.sites import make_site
from moeroute.integration.adapters.wrap import wrap_model
from moeroute.layers.ragged_bank import RaggedLoRABank
from moeroute.methods.existing import LoRAExpert
from moeroute.methods.registry import get_method, list_methods, method_field_names, method_name
from moeroute.routers.prototypes import PrototypeScore

if TYPE_CHECKING:
    from collections.abc import Iterable

    from peft import PeftModel

    from moeroute.types import Method

OWN_FIELDS = {"sites", "experts"}


def mix_adapters(
    model: nn.Module,
    adapters: Mapping[str, str | Path],
    router: Method | str,
    *,
    subtract: Iterable[str | Path] = (),
    same_base: bool = False,
    adapter_name: str = "default",
    **peft_fields: Any,
) -> PeftModel:
    """Make one adapter out of several LoRA adapters: their weights, and a router over them.

    The adapters' files are read, never written; ranks, scalings and targets may differ. The result
    is an adapter like any other: it saves, loads and generates by PEFT's own calls and needs the
    original files no more.

    Args:
        model: The base model of the adapters.
        adapters: Name -> folder or hub id of a PEFT LoRA adapter.
        router: A method that mixes adapters, such as `Arrow(top_k=1)`, or its name.
        subtract: Adapters of general knowledge: the mean of their A and the mean of their B are
            taken from every expert's (GenKnowSub, as PEFT's Arrow does it; equal ranks).
        same_base: Take adapters whose configs name different bases: they are the same weights.
        adapter_name: The new adapter's name.
        **peft_fields: Fields of `MoeRouteConfig` such as task_type.

    Returns:
        The PeftModel.

    Raises:
        ValueError: No adapters; one that is no LoRA, or of another base or of other widths; a
            method that trains experts of its own. The model is unchanged then.
    """
    method = get_method(router)() if isinstance(router, str) else router
    _check_method(method)
    if not adapters:
        raise ValueError("mix_adapters got no adapters; name at least one: {'math': path}")
    loaded = [read_lora(name, path) for name, path in adapters.items()]
    _check_bases(loaded, same_base=same_base)
    _check_fit(model, loaded)
    loaded = _subtracted(loaded, [read_lora(str(path), path) for path in subtract])
    wanted = {site for adapter in loaded for site in adapter.sites}
    sites = tuple(name for name, _ in model.named_modules() if name in wanted)
    experts = tuple(_expert(adapter, sites) for adapter in loaded)
    method = replace(method, sites=sites, experts=experts)  # pyright: ignore[reportArgumentType]
    wrapped = wrap_model(
        model, method, adapter_name=adapter_name, target_modules=list(sites), **peft_fields
    )
    _fill(wrapped.get_base_model(), loaded, adapter_name)
    return wrapped


def _check_method(method: Method) -> None:
    if not set(method_field_names(method_name(method))) >= OWN_FIELDS:
        able = [name for name in list_methods() if set(method_field_names(name)) >= OWN_FIELDS]
        raise ValueError(
            f"{type(method).__name__} trains experts of its own and cannot mix adapters that "
            f"exist; use one of {', '.join(able)}, or wrap_model"
        )


def _check_bases(adapters: list[LoRAAdapter], *, same_base: bool) -> None:
    bases = {adapter.base: adapter.name for adapter in adapters if adapter.base}
    if len(bases) > 1 and not same_base:
        listed = ", ".join(f"{name!r} for {base}" for base, name in bases.items())
        raise ValueError(
            f"the adapters were trained on different bases: {listed}. Mixing them makes no sense "
            "unless these are the same weights; then pass same_base=True"
        )


def _check_fit(model: nn.Module, adapters: list[LoRAAdapter]) -> None:
    modules = dict(model.named_modules())
    for adapter in adapters:
        for name, lora in adapter.sites.items():
            module = modules.get(name)
            if module is None:
                raise ValueError(
                    f"adapter {adapter.name!r} adapts {name}, which {type(model).__name__} does "
                    "not have; it was trained on another base"
                )
            site = make_site(model, name, module, "linear")
            if site is None:
                raise ValueError(
                    f"adapter {adapter.name!r} adapts {name}, a {type(module).__name__}; only LoRA "
                    "on linears can be mixed"
                )
            widths = lora.lora_a.shape[1], lora.lora_b.shape[0]
            if widths != (site.in_features, site.out_features):
                raise ValueError(
                    f"adapter {adapter.name!r} expects {name} to be {widths[0]} -> {widths[1]} but "
                    f"it is {site.in_features} -> {site.out_features}; it was trained on another "
                    "base"
                )


def _expert(adapter: LoRAAdapter, sites: tuple[str, ...]) -> LoRAExpert:
    found = [adapter.sites.get(site) for site in sites]
    return LoRAExpert(
        name=adapter.name,
        ranks=tuple(lora.lora_a.shape[0] if lora else 0 for lora in found),
        scalings=tuple(lora.scaling if lora else 1.0 for lora in found),
    )


def _subtracted(adapters: list[LoRAAdapter], general: list[LoRAAdapter]) -> list[LoRAAdapter]:
    """The adapters without the mean of the general ones, wherever those say something."""
    if not general:
        return adapters
    changed = []
    for adapter in adapters:
        sites = dict(adapter.sites)
        for name, lora in sites.items():
            known = [other.sites[name] for other in general if name in other.sites]
            if any(other.lora_a.shape != lora.lora_a.shape for other in known):
                raise ValueError(
                    f"adapter {adapter.name!r} and those to subtract have different ranks at "
                    f"{name}; their matrices can be subtracted at one rank only"
                )
            if known:
                sites[name] = SiteLoRA(
                    lora.lora_a - _mean([other.lora_a for other in known]),
                    lora.lora_b - _mean([other.lora_b for other in known]),
                    lora.scaling,
                )
        changed.append(LoRAAdapter(adapter.name, adapter.base, sites))
    return changed


def _mean(tensors: list[Tensor]) -> Tensor:
    return torch.stack(tensors).mean(0)


def _fill(root: nn.Module, adapters: list[LoRAAdapter], adapter_name: str) -> None:
    """Copy the adapters' weights into the banks, and let the routers see them."""
    for name, host in root.named_modules():
        if not isinstance(host, SiteHost) or adapter_name not in host.moeroute_site:
            continue
        mixture = host.moeroute_site[adapter_name]
        bank = mixture.get_submodule("bank")
        assert isinstance(bank, RaggedLoRABank)
        for index, adapter in enumerate(adapters):
            if name in adapter.sites:
                lora = adapter.sites[name]
                bank.set_expert(index, lora.lora_a, lora.lora_b)
        slices = [bank.expert(index) for index in range(bank.num_experts)]
        for part in mixture.modules():
            if isinstance(part, PrototypeScore):
                part.set_experts(
                    [bank.lora_a[own] for own in slices], [bank.lora_b[:, own] for own in slices]
                )
