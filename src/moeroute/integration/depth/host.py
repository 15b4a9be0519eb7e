"""The small module beside a decoder layer that decides how often the layer runs.

The decoder layer stays where it is, with its own class and parameter names; its `forward` is
replaced on the instance by a `DepthForward`, which asks the `DepthHost` among the layer's children.
Nothing is kept in a closure, so a deep copy of the model asks its own hosts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from moeroute.depth_types import AnswersUnits
from moeroute.integration.adapters.hosting import (
    SITE_PREFIX,
    check_one_active,
    first_active,
    take_in,
)
from moeroute.integration.depth.decoder_layers import HOST
from moeroute.integration.depth.layer_call import LayerCall
from moeroute.integration.depth.units import attach_units, detach_units
from moeroute.integration.depth.visit_slots import VisitSlots
from moeroute.layers.depth import run_actions
from moeroute.layers.depth_record import depth_record

if TYPE_CHECKING:
    from moeroute.integration.depth.decoder_layers import LayerFacts
    from moeroute.routing_pass import RoutingPass


class DepthHost(nn.Module, BaseTunerLayer):
    """Holds, by adapter name, what a method built for a decoder layer; empty, it runs the layer.

    Args:
        facts: Of the layer.
        routing_pass: The model's pass, given to every depth layer added here.

    Attributes:
        forced: (B,) or (1,) actions that hold whatever the active adapter says, or None.
    """

    adapter_layer_names = (SITE_PREFIX,)
    other_param_names = ()

    def __init__(self, facts: LayerFacts, routing_pass: RoutingPass) -> None:
        super().__init__()
        self.facts = facts
        self.routing_pass = routing_pass
        self.moeroute_site = nn.ModuleDict()
        self.forced: tuple[int, ...] | None = None
        self._disable_adapters = False
        self._active_adapter: str | list[str] = []
        self.merged_adapters: list[str] = []
        self.kwargs: dict[str, Any] = {}

    def add(self, adapter_name: str, module: nn.Module, layer: nn.Module) -> None:
        """Host `module` under an adapter's name, on the device of the decoder layer.

        Raises:
            ValueError: It answers for the layer's units, and they cannot be found.
        """
        if isinstance(module, AnswersUnits):
            attach_units(layer, self.facts, self.answers_units)
        weight = next(layer.parameters(), None)

        def move(name: str) -> None:
            if weight is not None and weight.device.type != "meta":
                self.moeroute_site[name].to(weight.device)

        module.train(self.training)
        take_in(self.moeroute_site, adapter_name, module, self.routing_pass, move)

    def set_adapter(
        self,
        adapter_names: str | list[str],
        inference_mode: bool = False,  # noqa: FBT001
    ) -> None:
        """Make one adapter active.

        Raises:
            ValueError: More than one of this layer's adapters is named.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        check_one_active(self.moeroute_site, names)
        super().set_adapter(names, inference_mode=inference_mode)

    def active_module(self) -> nn.Module | None:
        """What answers here now; None if the base does."""
        if self.disable_adapters or self.routing_pass.resting:
            return None
        return first_active(self.moeroute_site, self.active_adapters)

    def answers_units(self) -> AnswersUnits | None:
        """What answers for the layer's units now; None if they run as they are."""
        module = None if self.forced is not None else self.active_module()
        return module if isinstance(module, AnswersUnits) else None

    def is_idle(self) -> bool:
        """True if the layer is to run as if there were no host."""
        return self.forced is None and self.active_module() is None

    def decide(self, hidden_states: Tensor, call: LayerCall) -> Tensor:
        """Run the decoder layer as often as was forced, or as the active adapter says."""
        module = self.active_module()
        if self.forced is not None:
            actions = _for_batch(self.forced, hidden_states.shape[0])
        elif module is not None:
            return module(hidden_states, call)
        else:
            actions = (1,) * hidden_states.shape[0]
        call.decide(actions, from_tokens=False)
        self._keep(hidden_states, actions)
        return run_actions(hidden_states, call, actions)

    def _keep(self, hidden_states: Tensor, actions: tuple[int, ...]) -> None:
        if self.routing_pass.wants(charged=False):
            record = depth_record(
                self.routing_pass,
                hidden_states,
                torch.tensor(actions, device=hidden_states.device),
                site=self.facts.name,
                layer_index=self.facts.position,
            )
            self.routing_pass.keep(record, charged=False)

    def merge(
        self,
        safe_merge: bool = False,  # noqa: FBT001
        adapter_names: list[str] | None = None,
    ) -> None:
        """Refuse: a decision has no weight matrix.

        Raises:
            ValueError: Always.
        """
        raise ValueError("merging is undefined for depth routers: they decide on every prompt")

    def unmerge(self) -> None:
        """Do nothing: nothing was ever merged."""


class DepthForward:
    """Stands in `layer.forward` on the instance.

    Args:
        layer: The decoder layer.
        previous: The forward that stood on the instance before; None for the class's own.
    """

    def __init__(self, layer: nn.Module, previous: Any) -> None:
        self.layer = layer
        self.previous = previous

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Answer as the layer would, in its own container."""
        host = self.layer.depth_host
        if not isinstance(host, DepthHost):
            raise TypeError(f"{HOST} of {type(self.layer).__name__} is a {type(host).__name__}")
        arguments = {**dict(zip(host.facts.argument_names, args, strict=False)), **kwargs}
        if host.is_idle() and not _holds_visits(arguments, host.facts):
            return self.run(*args, **kwargs)
        hidden_states = arguments.pop("hidden_states")
        call = LayerCall(self.run, host.facts, arguments, hidden_states.shape[1], self.layer)
        out = host.decide(hidden_states, call)
        if not host.facts.in_tuple:
            return out
        return (out, *(call.answer[1:] if call.answer is not None else (None,)))

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The layer itself."""
        if self.previous is not None:
            return self.previous(*args, **kwargs)
        return type(self.layer).forward(self.layer, *args, **kwargs)


def attach(layer: nn.Module, facts: LayerFacts, routing_pass: RoutingPass) -> DepthHost:
    """Put a host beside a decoder layer, once, and return it."""
    host = host_of(layer)
    if host is not None:
        return host
    host = DepthHost(facts, routing_pass)
    host.train(layer.training)
    layer.add_module(HOST, host)
    layer.forward = DepthForward(layer, layer.__dict__.get("forward"))
    return host


def detach(layer: nn.Module) -> None:
    """Take the host and the replaced forwards off a decoder layer."""
    detach_units(layer)
    ours = layer.__dict__.get("forward")
    if isinstance(ours, DepthForward):
        del layer.__dict__["forward"]
        if ours.previous is not None:
            layer.forward = ours.previous
    if host_of(layer) is not None:
        delattr(layer, HOST)


def host_of(layer: nn.Module) -> DepthHost | None:
    """The host beside a decoder layer, if it has one."""
    host = layer._modules.get(HOST)
    return host if isinstance(host, DepthHost) else None


def depth_hosts(model: nn.Module) -> list[tuple[nn.Module, DepthHost]]:
    """Every decoder layer with a host, and the host, in module order."""
    return [(layer, host) for layer in model.modules() if (host := host_of(layer)) is not None]


def _for_batch(forced: tuple[int, ...], batch: int) -> tuple[int, ...]:
    """One action a sequence: `generate` repeats each for its beams, in order."""
    if batch % len(forced):
        raise ValueError(
            f"the forced actions speak of {len(forced)} sequences but the batch has {batch}"
        )
    return tuple(action for action in forced for _ in range(batch // len(forced)))


def _holds_visits(arguments: dict[str, Any], facts: LayerFacts) -> bool:
    """True if depth routing has filled the cache of a call."""
    cache = arguments.get(facts.cache_name)
    if cache is None or len(cache.layers) <= facts.cache_index:
        return False
    return isinstance(cache.layers[facts.cache_index], VisitSlots)
