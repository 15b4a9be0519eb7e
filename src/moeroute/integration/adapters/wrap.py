"""The front door: wrap a checkpoint, and unwrap it."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from moeroute.integration.adapters.expert_lora import (
    fast_expert_lora,
    is_fast_expert_lora,
    restore_expert_lora,
)
from moeroute.integration.adapters.gate_host import detach, hosted_gates
from moeroute.integration.adapters.inputs import accept_routing_inputs
from moeroute.integration.adapters.peft_method import HOSTS, MoeRouteConfig
from moeroute.integration.adapters.root_hooks import disconnect
from moeroute.integration.adapters.site_host import SiteHost
from moeroute.integration.depth import host as depth_host
from moeroute.methods.registry import build_method, method_field_names

if TYPE_CHECKING:
    from moeroute.types import Method


def wrap_model(
    model: nn.Module,
    method: Method | LoraConfig | str,
    *,
    adapter_name: str = "default",
    **peft_fields: Any,
) -> PeftModel:
    """Add a method's trainable parts to a frozen checkpoint, as a PEFT adapter.

    `wrap_model(model, MixLoRA(r=8), target_modules=...)` equals
    `peft.get_peft_model(model, MoeRouteConfig(method=MixLoRA(r=8), target_modules=...))`.

    With `peft.LoraConfig(target_parameters=[...])`, plain LoRA on the experts of a MoE checkpoint,
    it equals `peft.get_peft_model(model, config)` and then `fast_expert_lora(model)`; a
    `lora_dropout` in the config goes to the latter, and PEFT's config says 0.

    Args:
        model: A transformers model, or a model that moeroute has wrapped (the adapter is added to
            it).
        method: A method, or the name of one; with a name its fields may be given beside PEFT's; or
            PEFT's config of a LoRA on experts.
        adapter_name: The adapter's name.
        **peft_fields: Fields of `MoeRouteConfig`, such as target_modules and task_type.

    Returns:
        The PeftModel. Its `save_pretrained`, `disable_adapter` and so on are PEFT's.

    Raises:
        ValueError: Unknown method or field, no target matched, the model carries a foreign adapter,
            or the adapter's name is taken. The model is unchanged then.
    """
    if isinstance(method, LoraConfig):
        return _wrap_experts(model, method, adapter_name, peft_fields)
    if isinstance(method, str):
        known = method_field_names(method)
        values = {name: peft_fields.pop(name) for name in list(peft_fields) if name in known}
        method = build_method(method, values)
    config = _make_config(method, peft_fields)
    if isinstance(model, PeftModel):
        return _add_to_wrapped(model, config, adapter_name)
    _check_no_adapter(model)
    return accept_routing_inputs(get_peft_model(model, config, adapter_name=adapter_name))


def unwrap_model(model: nn.Module) -> nn.Module:
    """The base model back: its own modules in their places, adapters and hooks dropped.

    The base's parameters stay frozen, as with PEFT's `unload`; call `requires_grad_(True)` to train
    them.

    Args:
        model: What `wrap_model` returned, or a model on which transformers loaded an adapter.

    Raises:
        ValueError: The model is not wrapped.
    """
    if is_fast_expert_lora(model) and isinstance(model, PeftModel):
        restore_expert_lora(model)
        return model.unload()
    if not any(isinstance(module, HOSTS) for module in model.modules()):
        raise ValueError(f"{type(model).__name__} is not wrapped by moeroute; nothing to undo")
    if isinstance(model, PeftModel):
        return model.unload()
    for _, gate in hosted_gates(model):
        detach(gate)
    for name, module in list(model.named_modules()):
        if isinstance(module, SiteHost):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.base_layer)
    for layer, _ in depth_host.depth_hosts(model):
        depth_host.detach(layer)
    disconnect(model)
    if hasattr(model, "peft_config"):
        del model.peft_config
    model.__dict__.pop("_hf_peft_config_loaded", None)
    return model


def _wrap_experts(
    model: nn.Module, config: LoraConfig, adapter_name: str, peft_fields: dict[str, Any]
) -> PeftModel:
    """PEFT's LoRA on experts, computed fast."""
    if peft_fields:
        raise ValueError(
            f"unknown field {next(iter(peft_fields))!r}: a LoraConfig holds all of PEFT's fields; "
            "put it there"
        )
    if not config.target_parameters:
        raise ValueError(
            "this LoraConfig names no target_parameters; plain LoRA on linears is PEFT's own: "
            "peft.get_peft_model(model, config). For experts give "
            'target_parameters=["experts.gate_up_proj", "experts.down_proj"]'
        )
    dropout = config.lora_dropout
    if dropout and (config.target_modules is None or len(config.target_modules)):
        raise ValueError(
            f"lora_dropout={dropout} on linears and experts at once: PEFT can save no dropout in a "
            "config with target_parameters. Set target_modules=[], or lora_dropout=0 and give "
            "moeroute.fast_expert_lora(model, lora_dropout=...) the experts' own"
        )
    config = replace(config, lora_dropout=0.0) if dropout else config
    if not isinstance(model, PeftModel):
        _check_no_adapter(model)
        trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
        wrapped = get_peft_model(model, config, adapter_name=adapter_name)
        try:
            fast_expert_lora(wrapped, lora_dropout=dropout)
        except (TypeError, ValueError):
            wrapped.unload()
            for parameter in trainable:
                parameter.requires_grad_(True)  # noqa: FBT003
            raise
        return wrapped
    if not is_fast_expert_lora(model) or dropout:
        raise ValueError(
            "the model carries PEFT adapters already; add this one with model.add_adapter(name, "
            "config), then call moeroute.fast_expert_lora(model) if it was not called before"
        )
    if adapter_name in model.peft_config:
        raise ValueError(
            f"the model has an adapter {adapter_name!r}; pass another adapter_name to add one"
        )
    model.add_adapter(adapter_name, config)
    return model


def _check_no_adapter(model: nn.Module) -> None:
    foreign = [name for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
    if foreign:
        raise ValueError(
            f"{type(model).__name__} carries an adapter already, at {foreign[0]}; unwrap it first "
            "(moeroute.unwrap_model, or unload() of the PeftModel that made it)"
        )


def _make_config(method: Method, peft_fields: dict[str, Any]) -> MoeRouteConfig:
    known = MoeRouteConfig.__dataclass_fields__.keys()
    unknown = [name for name in peft_fields if name not in known]
    if unknown:
        raise ValueError(
            f"unknown field {unknown[0]!r}: neither of {type(method).__name__} nor of "
            f"MoeRouteConfig ({', '.join(sorted(known))}). Fields of the method belong into "
            f"{type(method).__name__}(...)"
        )
    return MoeRouteConfig(method=method, **peft_fields)


def _add_to_wrapped(model: PeftModel, config: MoeRouteConfig, adapter_name: str) -> PeftModel:
    if not all(isinstance(found, MoeRouteConfig) for found in model.peft_config.values()):
        kinds = sorted({str(found.peft_type) for found in model.peft_config.values()})
        raise ValueError(
            f"the model is wrapped by PEFT with {kinds}; moeroute adapters cannot share it. Unload "
            "it first"
        )
    if adapter_name in model.peft_config:
        raise ValueError(
            f"the model is wrapped already and has an adapter {adapter_name!r}; pass another "
            "adapter_name to add one, or moeroute.unwrap_model(model) to start over"
        )
    model.add_adapter(adapter_name, config)
    return model
