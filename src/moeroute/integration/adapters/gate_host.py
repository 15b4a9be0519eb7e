"""Adapters at a gate: HF's module stays, a hook on it answers with the active adapter's router."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from moeroute.integration.adapters.hosting import (
    MERGE_IS_UNDEFINED,
    check_one_active,
    first_active,
    take_in,
)
from moeroute.integration.experts_report import asks_for_moeroute, is_dispatched
from moeroute.integration.gates import HOST_NAME, gate_family
from moeroute.layers.routed_gate import RoutedGate
from moeroute.routing_pass import RoutingPass
from moeroute.types import RouterOutput


class GateHost(nn.Module, BaseTunerLayer):
    """A submodule of a gate that holds, by adapter name, the routers that answer for it.

    A parameter of adapter NAME is called `<gate>.route_host.moeroute_site.NAME.<parameter>`: one
    component bears the prefix and the adapter's name follows it, as PEFT and transformers expect.

    Args:
        experts: The module that the gate's answer is for; referred to, not owned.
        routing_pass: The wrapped model's pass.
    """

    adapter_layer_names = ("moeroute_site",)
    other_param_names = ()

    def __init__(self, experts: nn.Module | None, routing_pass: RoutingPass) -> None:
        super().__init__()
        self.moeroute_site = nn.ModuleDict()
        self.routing_pass = routing_pass
        self._experts = (experts,)  # a tuple keeps it from being a submodule
        self._disable_adapters = False
        self._active_adapter: str | list[str] = []
        self.merged_adapters: list[str] = []
        self.kwargs: dict[str, Any] = {}

    @property
    def gate_experts(self) -> nn.Module | None:
        """The module that the gate's answer is for."""
        return self._experts[0]

    def add(self, adapter_name: str, module: RoutedGate, like: Tensor) -> None:
        """Host `module` under an adapter's name, on the device and in the dtype of `like`."""

        def move(name: str) -> None:
            if not any(parameter.is_meta for parameter in module.parameters()):
                self.moeroute_site[name].to(like.device, dtype=like.dtype)

        module.train(self.training)
        take_in(self.moeroute_site, adapter_name, module, self.routing_pass, move)

    def set_adapter(
        self,
        adapter_names: str | list[str],
        inference_mode: bool = False,  # noqa: FBT001
    ) -> None:
        """Make one adapter active.

        Raises:
            ValueError: More than one of this gate's adapters is named.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        check_one_active(self.moeroute_site, names)
        super().set_adapter(names, inference_mode=inference_mode)

    def active_module(self) -> nn.Module | None:
        """What answers here now; None if the checkpoint's gate does."""
        if self.disable_adapters or self.routing_pass.resting:
            return None
        return first_active(self.moeroute_site, self.active_adapters)

    def forward(self, hidden_states: Tensor) -> RouterOutput | None:
        """Route the gate's tokens; None if the checkpoint's gate shall answer."""
        module = self.active_module()
        return None if module is None else module(hidden_states, self.gate_experts)

    def merge(
        self,
        safe_merge: bool = False,  # noqa: FBT001
        adapter_names: list[str] | None = None,
    ) -> None:
        """Refuse: a router is not part of any weight.

        Raises:
            ValueError: Always.
        """
        raise ValueError(MERGE_IS_UNDEFINED)

    def unmerge(self) -> None:
        """Do nothing: nothing was ever merged."""


def answer_for_gate(
    gate: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: tuple[Any, ...]
) -> tuple[Any, ...] | None:
    """Forward hook of a gate: answer as its class does, with the active adapter's routing.

    The hook finds its host through the gate that it is called with, so that a copied model asks its
    own. Logits, weights and ids keep the dtypes of the gate's own answer. An empty slot becomes
    expert 0 with weight 0, unless moeroute computes the experts, which skips the slot.
    """
    host: Any = gate.get_submodule(HOST_NAME)
    routing: RouterOutput | None = host(args[0] if args else kwargs["hidden_states"])
    if routing is None:
        return None
    logits, weights, ids, *rest = output
    family = gate_family(gate)
    first = routing.router_logits
    if family is not None and family.answers_probs:
        first = torch.softmax(first, dim=-1)
    selected = routing.selected_experts
    if not _skips_empty_slots(host.gate_experts):
        selected = torch.where(selected < routing.num_experts, selected, 0)
    return (
        first.to(logits.dtype),
        routing.routing_weights.to(weights.dtype),
        selected.to(ids.dtype),
        *rest,
    )


def gate_host(gate: nn.Module) -> GateHost | None:
    """The host at a gate; None if there is none."""
    host = gate._modules.get(HOST_NAME)
    return host if isinstance(host, GateHost) else None


def attach(gate: nn.Module, experts: nn.Module | None, routing_pass: RoutingPass) -> GateHost:
    """Give a gate a host and the hook, once.

    The hook goes before all others, so that what transformers captures is our answer.
    """
    host = gate_host(gate)
    if host is None:
        host = GateHost(experts, routing_pass).train(gate.training)
        gate.add_module(HOST_NAME, host)
        gate.register_forward_hook(answer_for_gate, prepend=True, with_kwargs=True)
    return host


def detach(gate: nn.Module) -> None:
    """Take the host and the hook off again."""
    for key in [key for key, hook in gate._forward_hooks.items() if hook is answer_for_gate]:
        del gate._forward_hooks[key]
        gate._forward_hooks_with_kwargs.pop(key, None)
    del gate._modules[HOST_NAME]


def hosted_gates(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """The gates of a model that have a host, as (full module name, gate)."""
    for name, module in list(model.named_modules()):
        if gate_host(module) is not None:
            yield name, module


def _skips_empty_slots(experts: nn.Module | None) -> bool:
    return experts is not None and is_dispatched(experts) and asks_for_moeroute(experts)
