"""moeroute as a PEFT method: the config, the tuner, and their registration."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftConfig, PeftType
from peft.tuners.tuners_utils import BaseTuner, check_target_module_exists
from peft.utils.peft_types import register_peft_method
from torch import nn

from moeroute.integration.adapters.feed_forward_check import check_feed_forward
from moeroute.integration.adapters.files import check_adapter_keys
from moeroute.integration.adapters.first_pass import backbone_of, connect_first_pass, head_of
from moeroute.integration.adapters.gate_host import GateHost, attach, detach, hosted_gates
from moeroute.integration.adapters.hosting import MERGE_IS_UNDEFINED, SITE_PREFIX
from moeroute.integration.adapters.root_hooks import connect, disconnect
from moeroute.integration.adapters.site_host import SiteHost
from moeroute.integration.adapters.sites import (
    check_targets,
    default_targets,
    find_sites,
    warn_of_untouched_experts,
)
from moeroute.integration.depth import host as depth_host
from moeroute.integration.depth.attention_watch import check_watched
from moeroute.integration.depth.decoder_layers import check_depth, layer_facts
from moeroute.integration.depth.exits import check_exits, connect_exits
from moeroute.layers.routed_gate import RoutedGate
from moeroute.methods.registry import build_method, method_fields, method_name
from moeroute.types import Method
from moeroute.version import __version__

METHOD_NAME = "moeroute"


def extend_peft_type(name: str) -> PeftType:
    """Add a member to PEFT's enum of methods, which has no entry points, and check that it took.

    Raises:
        RuntimeError: This Python's enum does not work as expected; the adapter could not be saved.
    """
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = name
    member._value_ = name
    type.__setattr__(PeftType, name, member)
    PeftType._member_map_[name] = member
    PeftType._value2member_map_[name] = member
    PeftType._member_names_.append(name)
    if PeftType(name) is not member or PeftType[name] is not member or name not in list(PeftType):
        raise RuntimeError(
            f"could not add {name} to peft.PeftType on this version of Python; please report this"
        )
    return member


MOEROUTE = extend_peft_type(METHOD_NAME.upper())

HOSTS = (SiteHost, GateHost, depth_host.DepthHost)


@dataclass
class MoeRouteConfig(PeftConfig):
    """The config of a moeroute adapter, as `adapter_config.json` holds it.

    Args:
        method: A registered name, or a method itself (then method_fields is read off it).
        method_fields: The method's hyperparameters by name.
        target_modules: As in PEFT: a regular expression, a list of name endings, or "all-linear"
            for methods on linears. None takes every place of the method's kind.
        exclude_modules: As in PEFT, names to leave out.
        layers_to_transform: As in PEFT, layer indices to keep to.
        layers_pattern: As in PEFT, the name of the layer list.
        modules_to_save: As in PEFT, further modules to train and save whole.
        moeroute_version: The version that made the adapter.

    Raises:
        ValueError: Unknown method or field (the nearest are named), or a field out of range.
    """

    method: Any = "mixlora"
    method_fields: dict[str, Any] = field(default_factory=dict)
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    modules_to_save: list[str] | None = None
    moeroute_version: str = __version__

    def __post_init__(self) -> None:
        """Normalise the method to a name and plain fields, and check them."""
        super().__post_init__()
        self.peft_type = MOEROUTE
        if not isinstance(self.method, str):
            self.method_fields = method_fields(self.method)
            self.method = method_name(self.method)
        self.method_fields = method_fields(self.build_method())
        for name in ("target_modules", "exclude_modules"):
            value = getattr(self, name)
            if isinstance(value, list):
                setattr(self, name, set(value))

    def build_method(self) -> Method:
        """The method that this config names."""
        return build_method(self.method, self.method_fields)


class MoeRouteModel(BaseTuner):
    """The tuner: a `SiteHost` in the place of every target, hooks on the model's root.

    A gate stays where it is: it gets a `GateHost` as a submodule, and a hook that asks it. A
    decoder layer stays too, and gets a `DepthHost` beside it.

    Everything that can be wrong with the targets is found before the model is touched.
    """

    prefix = SITE_PREFIX
    tuner_layer_cls = HOSTS  # pyright: ignore[reportAssignmentType]
    target_module_mapping: dict[str, list[str]] = {}

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the model as a module, so that the hooks on its root run."""
        return self.model(*args, **kwargs)

    def inject_adapter(
        self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any
    ) -> None:
        """Add an adapter to the model."""
        super().inject_adapter(model, adapter_name, *args, **kwargs)
        connect_first_pass(model, connect(model))
        connect_exits(model, connect(model))

    def merge_and_unload(self, *args: Any, **kwargs: Any) -> nn.Module:
        """Refuse: a mixture has no single weight matrix.

        Raises:
            ValueError: Always; it says what to do instead.
        """
        raise ValueError(MERGE_IS_UNDEFINED)

    def unload(self) -> nn.Module:
        """The base model back, adapters and hooks dropped."""
        for _, gate in hosted_gates(self.model):
            detach(gate)
        model = super().unload()
        for layer, _ in depth_host.depth_hosts(model):
            depth_host.detach(layer)
        disconnect(model)
        return model

    def _prepare_adapter_config(self, peft_config: PeftConfig, model_config: dict) -> PeftConfig:
        config = _own_config(peft_config)
        kind = config.build_method().site_kind
        if kind == "linear" and config.target_modules in (None, "all-linear"):
            warn_of_untouched_experts(self.model)
        if config.target_modules is None and kind == "decoder_layer":
            config.target_modules = set(layer_facts(self.model))  # type: ignore[assignment]
        elif config.target_modules is None:
            config.target_modules = default_targets(self.model, kind)  # type: ignore[assignment]
        elif config.target_modules == "all-linear" and kind == "linear":
            config.target_modules = {site.name for site in find_sites(self.model, kind)}  # type: ignore[assignment]
        return config

    def _prepare_model(self, peft_config: PeftConfig, model: nn.Module) -> None:
        config = _own_config(peft_config)
        method = config.build_method()
        sites = check_targets(
            model,
            method.site_kind,
            config.target_modules or (),
            lambda name: (
                bool(check_target_module_exists(config, name)) and not _inside_host(model, name)
            ),
        )
        if method.site_kind == "mlp":
            check_feed_forward(sites)
        if method.site_kind == "decoder_layer":
            self._facts = layer_facts(model)
            check_depth(model, [self._facts[site.name] for site in sites])
        shared = method.build_shared(sites)
        if head_of(shared) is not None:
            backbone_of(model)
        self._planned = {site.name: method.build(site, shared) for site in sites}
        check_exits(model, self._planned.values())
        check_watched(model, self._planned)

    def _create_and_replace(
        self,
        peft_config: PeftConfig,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        module = self._planned.pop(current_key, None)
        if module is None:
            raise ValueError(
                f"the adapter's file names {current_key}, which target_modules do not match"
            )
        if isinstance(module, RoutedGate):
            host = attach(target, getattr(parent, "experts", None), connect(self.model))
            host.add(adapter_name, module, like=next(target.parameters()))
            return
        if _own_config(peft_config).build_method().site_kind == "decoder_layer":
            depth = depth_host.attach(target, self._facts[current_key], connect(self.model))
            depth.add(adapter_name, module, target)
            return
        if isinstance(target, SiteHost):
            target.add(adapter_name, module)
            return
        host = SiteHost(target, connect(self.model))
        host.add(adapter_name, module)
        self._replace_module(parent, target_name, host, target)

    def _replace_module(
        self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module
    ) -> None:
        new_module.train(child.training)
        setattr(parent, child_name, new_module)

    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> AbstractContextManager[None]:
        for name in ("adapter_names", "alora_offsets"):
            if kwargs.get(name) is not None:
                raise ValueError(
                    f"{name} is not supported by moeroute adapters; activate one with "
                    "set_adapter(name)"
                )
        return nullcontext()

    @classmethod
    def _remove_adapter_name_from_key(cls, key: str, adapter_name: str) -> str:
        return key.replace(f".{SITE_PREFIX}.{adapter_name}.", f".{SITE_PREFIX}.")

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls,
        model: nn.Module,
        config: PeftConfig,
        adapter_name: str,
        state_dict: dict[str, torch.Tensor],
    ) -> dict[str, torch.Tensor]:
        remapped = super()._remap_adapter_state_dict_for_load(
            model, config, adapter_name, state_dict
        )
        check_adapter_keys(model, adapter_name, remapped)
        return remapped


def _own_config(config: PeftConfig) -> MoeRouteConfig:
    if not isinstance(config, MoeRouteConfig):
        raise ValueError(f"expected a MoeRouteConfig, got {type(config).__name__}")
    return config


def _inside_host(model: nn.Module, name: str) -> bool:
    parents = name.split(".")
    return any(
        isinstance(model.get_submodule(".".join(parents[:depth])), HOSTS)
        for depth in range(1, len(parents))
    )


register_peft_method(
    name=METHOD_NAME, config_cls=MoeRouteConfig, model_cls=MoeRouteModel, prefix=SITE_PREFIX
)
