"""The doctor's look at PEFT adapters, without importing PEFT."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import nn

from moeroute.integration.experts_report import experts_report, is_dispatched
from moeroute.integration.finding import Finding, several
from moeroute.integration.gates import HOST_NAME

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

BASE_LAYER = "base_layer"
FAST = "_activate_lora"  # what `fast_expert_lora` replaces on a wrapper of PEFT
STACK_NDIM = 3


def check_adapters(model: nn.Module) -> Iterator[Finding]:
    """Everything that is checked about the adapters of a model; nothing for a model without."""
    configs: Mapping[str, Any] = getattr(model, "peft_config", None) or {}
    if not configs:
        return
    hosts = {
        name.removeprefix("base_model.model.").removesuffix(f".{HOST_NAME}"): module
        for name, module in model.named_modules()
        if _is_host(module) or name.endswith(f".{HOST_NAME}")
    }
    active = _active_adapters(hosts)
    yield from _several_active(active)
    for name in active & configs.keys():
        yield from _nothing_to_train(model, name, configs[name])
    for name, config in configs.items():
        yield from _idle_targets(name, config, hosts)
    yield from _untouched_experts(model, hosts)
    yield from _rebuilt_experts(hosts)


def _is_host(module: nn.Module) -> bool:
    """True for PEFT's tuner layers."""
    return isinstance(getattr(module, BASE_LAYER, None), nn.Module) and hasattr(
        module, "active_adapters"
    )


def _active_adapters(hosts: Mapping[str, Any]) -> set[str]:
    return {name for host in hosts.values() for name in host.active_adapters}


def _several_active(active: set[str]) -> Iterator[Finding]:
    if len(active) > 1:
        yield Finding(
            module="",
            problem=f"{len(active)} adapters are active at once ({', '.join(sorted(active))}): "
            "their updates add up, and a mixture answers at its own modules only",
            mend="model.set_adapter(name) with one name",
        )


def _nothing_to_train(model: nn.Module, name: str, config: Any) -> Iterator[Finding]:
    mine = [(key, p) for key, p in model.named_parameters() if f".{name}." in f".{key}."]
    if not model.training or any(parameter.requires_grad for _, parameter in mine):
        return
    loaded = " (it was loaded for inference)" if getattr(config, "inference_mode", False) else ""
    yield Finding(
        module=mine[0][0].rpartition(".")[0] if mine else "",
        problem=f"adapter {name!r} is active in training mode, but none of its {len(mine)} "
        f"parameter tensors is trainable{loaded}",
        mend="load it with PeftModel.from_pretrained(..., is_trainable=True), or call "
        f"model.set_adapter({name!r})",
        severity="error",
    )


def _idle_targets(name: str, config: Any, hosts: Mapping[str, Any]) -> Iterator[Finding]:
    """Entries of target_modules or target_parameters at which no adapter stands."""
    targets = getattr(config, "target_modules", None)
    modules = set() if isinstance(targets, str) else set(targets or ())
    parameters = set(getattr(config, "target_parameters", None) or ())
    names = {key.replace(f".{BASE_LAYER}", "") for key in hosts}
    full = {
        f"{key.replace(f'.{BASE_LAYER}', '')}.{host.parameter_name}"
        for key, host in hosts.items()
        if hasattr(host, "parameter_name")
    }
    idle = sorted(
        [entry for entry in modules if not _any_ends_with(names, entry)]
        + [entry for entry in parameters if not _any_ends_with(full, entry)]
    )
    if idle:
        yield Finding(
            module="",
            problem=f"adapter {name!r} names targets at which nothing stands: {', '.join(idle)}",
            mend="correct target_modules and target_parameters; the names that exist are those of "
            "model.named_modules() and model.named_parameters()",
        )


def _any_ends_with(names: set[str], entry: str) -> bool:
    return any(name == entry or name.endswith(f".{entry}") for name in names)


def _untouched_experts(model: nn.Module, hosts: Mapping[str, Any]) -> Iterator[Finding]:
    """Every linear adapted, as with "all-linear", while stacked experts and gates are left out."""
    experts = [name.removeprefix("base_model.model.") for name in experts_report(model).dispatched]
    untouched = [name for name in experts if not any(_stands_at(host, name) for host in hosts)]
    if not untouched or not _adapts_every_linear(model, hosts):
        return
    yield Finding(
        module=untouched[0],
        problem=f"the adapter covers every linear, yet {several(untouched, 'stack')} of experts "
        "and their routers are untouched: their weights are parameters, not linears, so that "
        '"all-linear" passes them by',
        mend='name them: LoraConfig(target_parameters=["experts.gate_up_proj", '
        '"experts.down_proj"])',
    )


def _rebuilt_experts(hosts: Mapping[str, Any]) -> Iterator[Finding]:
    """PEFT's LoRA on stacked experts on PEFT's own path."""
    slow = [
        name
        for name, host in hosts.items()
        if hasattr(host, "parameter_name")
        and FAST not in vars(host)
        and host.get_param().ndim == STACK_NDIM
        and is_dispatched(host.get_base_layer())
    ]
    if slow:
        yield Finding(
            module=slow[0],
            problem=f"{several(slow, 'stack')} of experts with LoRA: PEFT rebuilds each of them "
            "whole at every forward, which costs time and memory",
            mend="moeroute.fast_expert_lora(model); the outputs and the files stay the same",
        )


def _stands_at(host: str, name: str) -> bool:
    return name == host or name.startswith(host + ".") or host.startswith(name + ".")


def _adapts_every_linear(model: nn.Module, hosts: Mapping[str, Any]) -> bool:
    head = getattr(model, "get_output_embeddings", lambda: None)()
    inside = tuple(f"{host}." for host in hosts)
    free = [
        name
        for full_name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module is not head
        and not (name := full_name.removeprefix("base_model.model.")).startswith(inside)
    ]
    linear_hosts = [
        host for host in hosts.values() if isinstance(getattr(host, BASE_LAYER, None), nn.Linear)
    ]
    return bool(linear_hosts) and not free
