"""Models whose decoder layers' units are executed or foretold, and the same computed densely."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from integration.depth.depth_models import tiny
from torch import Tensor, nn
from torch.nn.functional import linear, silu

import moeroute
from moeroute.layers.forecast_units import ForecastUnit
from moeroute.layers.routed import routing_passes
from moeroute.methods import InformedRouting


def wrapped(family: str = "llama", **fields: Any) -> Any:
    """A model in eval mode whose routers differ from token to token and whose forecasts show."""
    model = moeroute.wrap_model(tiny(family), InformedRouting(**fields)).eval()
    torch.manual_seed(5)
    with torch.no_grad():
        for unit in units(model):
            unit.router.up.bias.normal_()
            for parameter in unit.forecaster.parameters():
                parameter.normal_(std=0.3)
    return model


def units(model: nn.Module) -> list[ForecastUnit]:
    """Every unit, attention and feed-forward in turn."""
    return [module for module in model.modules() if isinstance(module, ForecastUnit)]


def bias(model: Any, execute: float) -> Any:
    """The model with all of its routers pushed to execute, or with a number below 0 to foretell."""
    with torch.no_grad():
        for unit in units(model):
            unit.router.up.bias.copy_(torch.tensor([-execute, execute]))
    return model


def records(model: nn.Module) -> list[Any]:
    """Of the last forward, a unit each."""
    return list(routing_passes(model)[0].records.values())


def executed(model: Any, ids: Tensor, mask: Tensor) -> Tensor:
    """(units, B, S) which tokens are executed."""
    with moeroute.track_routing(model), torch.no_grad():
        model(input_ids=ids, attention_mask=mask, use_cache=False)
        return torch.stack([record.depth.num_executions for record in records(model)])


def children(model: Any, base: Any = None) -> list[Any]:
    """The modules that the units of a wrapped model stand for; or those of another model."""
    base = model.get_base_model() if base is None else base
    return [base.get_submodule(unit.site) for unit in units(model)]


@contextmanager
def watching(modules: list[Any]) -> Iterator[dict[Any, tuple[Tensor, Tensor]]]:
    """Module -> what it was last given and what it answered."""
    seen: dict[Any, tuple[Tensor, Tensor]] = {}

    def after(module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        given = args[0] if args else kwargs["hidden_states"]
        seen[module] = (given, out[0] if isinstance(out, tuple) else out)

    hooks = [module.register_forward_hook(after, with_kwargs=True) for module in modules]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def dense(base: Any, model: Any) -> Iterator[None]:
    """Let a base model compute, for every token, both what its units give and what is foretold."""

    def after(unit: ForecastUnit) -> Any:
        def replace(module: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
            u = args[0] if args else kwargs["hidden_states"]
            gate, cast = unit.router, unit.forecaster
            hidden = linear(u.float(), gate.down.weight, gate.down.bias).relu()
            logits = linear(hidden, gate.up.weight, gate.up.bias)
            runs = (logits[..., 1] >= logits[..., 0])[..., None]
            small = silu(linear(u.float(), cast.down.weight, cast.down.bias))
            foretold = linear(small, cast.up.weight, cast.up.bias).to(u.dtype)
            if isinstance(output, tuple):
                return (torch.where(runs, output[0], foretold), *output[1:])
            return torch.where(runs, output, foretold)

        return replace

    hooks = [
        base.get_submodule(unit.site).register_forward_hook(after(unit), with_kwargs=True)
        for unit in units(model)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
