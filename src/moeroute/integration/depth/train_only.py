"""Says which part of `InformedRouting` learns: that is its stage of training."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal, get_args

from moeroute.integration.depth.host import depth_hosts
from moeroute.layers.forecast_units import ForecastLayer

if TYPE_CHECKING:
    from torch import nn

    from moeroute.layers.forecast_units import ForecastUnit

Part = Literal["forecasters", "routers", "all"]


def train_only(model: nn.Module, part: Part) -> None:
    """Let one part of the active adapter's units learn, and freeze the other.

    The paper trains in two stages:

    1. "forecasters": every unit is executed as in the base model, and forecasters learn what the
       units answer. No labels are needed: without them the forecasters' loss is the output's loss.
    2. "routers", after a `first_guess` or without: each token's unit is executed or foretold as the
       routers draw; they learn from the model's own loss on labels, the target of sparsity and the
       change that was foretold. Call `moeroute.post_step(model)` after each optimizer step, so that
       the temperature falls.

    "all" is how a model is after wrapping: both learn, by all of these losses (our own). Make the
    optimizer of a stage after calling this.

    Args:
        model: A model that `moeroute.wrap_model` has wrapped with `InformedRouting`.
        part: What learns.

    Raises:
        ValueError: The part is unknown, or no active adapter answers for units of layers.

    Example:
        >>> moeroute.depth.train_only(wrapped, "forecasters")
        >>> optimizer = torch.optim.AdamW(p for p in wrapped.parameters() if p.requires_grad)
    """
    if part not in get_args(Part):
        raise ValueError(f"part={part!r} is none of {', '.join(get_args(Part))}")
    for unit in forecast_units(model):
        unit.forecaster.requires_grad_(part != "routers")
        unit.router.requires_grad_(part != "forecasters")


def forecast_units(model: nn.Module) -> list[ForecastUnit]:
    """The units that the active adapter answers for, two a layer, at least one layer's.

    Raises:
        ValueError: There are none.
    """
    active = [host.active_module() for _, host in depth_hosts(model)]
    layers = [module for module in active if isinstance(module, ForecastLayer)]
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no active adapter with forecasters; wrap it with "
            "moeroute.wrap_model(model, InformedRouting()), or activate one with set_adapter(name)"
        )
    return [unit for layer in layers for unit in (layer.attention, layer.feed_forward)]
