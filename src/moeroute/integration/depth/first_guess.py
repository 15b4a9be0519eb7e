"""A start for the routers of `InformedRouting`: to foretell the tokens that are foretold best.

Axes: B batch, S sequence, T tokens = B * S, H hidden.
"""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy, smooth_l1_loss

from moeroute.depth_types import DepthRecord
from moeroute.integration.depth.stages import active_modules, train_only
from moeroute.layers.forecast_units import ForecastLayer
from moeroute.losses.masked import masked_mean, real_tokens_only
from moeroute.routers.token_capacity import highest
from moeroute.types import RouterInput

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from torch import nn

    from moeroute.layers.forecast_units import ForecastUnit
    from moeroute.types import RoutingRecord


def first_guess(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    share: float = 0.25,
    lr: float = 2e-3,
) -> list[float]:
    """Teach routers, by cross-entropy, to leave out the tokens whose forecast errs least.

    In each sequence the max(1, floor(share * n)) of its n real tokens with the lowest
    SmoothL1(LFF(u), F(u)) are labelled so; the others are to be executed. It stands between the two
    stages of `train_only`: forecasters have been trained, and the model runs unmodified. What
    learns afterwards is what learnt before.

    Source: the optional start of Informed Routing, arXiv 2510.13831; read from the official code.
    Our own reading: one AdamW step a batch.

    Args:
        model: A model that `moeroute.wrap_model` has wrapped with `InformedRouting`.
        batches: Keywords of one forward each.
        share: In (0, 1), of the tokens that a router is to leave out at first.
        lr: Of AdamW.

    Returns:
        The mean cross-entropy over units of each batch, before its step.

    Raises:
        ValueError: The share is out of range, or no active adapter has forecasters.

    Example:
        >>> moeroute.depth.first_guess(wrapped, [{"input_ids": text} for text in texts])
    """
    if not 0.0 < share < 1.0:
        raise ValueError(f"share={share} is outside (0, 1); the paper's code takes 0.25")
    units = _forecast_units(model)
    losses = []
    with _as_it_was(model, units):
        model.eval()
        for unit in units:
            unit.train()
            unit.router.eval()  # it draws nothing
        optimizer = torch.optim.AdamW((w for u in units for w in u.router.parameters()), lr=lr)
        for batch in batches:
            train_only(model, "forecasters")
            records = _seen(model, units, batch)
            train_only(model, "routers")
            optimizer.zero_grad()
            losses.append(_learn(units, records, share))
            optimizer.step()
        optimizer.zero_grad()
    return losses


@contextmanager
def _as_it_was(model: nn.Module, units: list[ForecastUnit]) -> Iterator[None]:
    """Put modes, and what learns, back after the block."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(weight, weight.requires_grad) for unit in units for weight in unit.parameters()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training
        for weight, learns in flags:
            weight.requires_grad_(learns)


@torch.no_grad()
def _seen(
    model: nn.Module, units: list[ForecastUnit], batch: Mapping[str, Any]
) -> dict[str, RoutingRecord]:
    """Unit -> what it was given, gave and was foretold to give."""
    found: dict[str, RoutingRecord] = {}

    def listen(record: RoutingRecord) -> None:
        found[record.site] = record

    with units[0].routing_pass.listening(listen):
        model(**batch)
    return found


@torch.enable_grad()
def _learn(units: list[ForecastUnit], records: Mapping[str, RoutingRecord], share: float) -> float:
    """Give every router its gradient; the mean loss."""
    losses = [_guess_loss(unit, records[unit.site], share) for unit in units]
    mean = torch.stack([loss.to(losses[0].device) for loss in losses]).mean()
    mean.backward()
    return mean.item()


def _guess_loss(unit: ForecastUnit, record: RoutingRecord, share: float) -> Tensor:
    trace = record.unit if isinstance(record, DepthRecord) else None
    if trace is None or trace.forecast is None:
        raise RuntimeError(f"{unit.site} was not computed for every token")
    shape, mask = (trace.tokens.shape[0], trace.tokens.shape[1]), record.token_mask
    error = smooth_l1_loss(trace.forecast.float(), trace.executed.float(), reduction="none")
    real = torch.ones(shape, dtype=torch.bool, device=error.device)
    real = real if mask is None else mask.reshape(shape)
    executes = ~highest(-error.mean(-1), real, share)  # (B, S)
    given = RouterInput(hidden_states=trace.tokens.flatten(0, 1), sequence_shape=shape)
    logits = real_tokens_only(unit.router(given).router_logits.flatten(0, 1), mask)
    each = cross_entropy(logits, executes.flatten().long(), reduction="none")
    return masked_mean(each, mask)


def _forecast_units(model: nn.Module) -> list[ForecastUnit]:
    """The units that the active adapter answers for, two a layer; an error if there are none."""
    layers = [module for module in active_modules(model) if isinstance(module, ForecastLayer)]
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no active adapter with forecasters; wrap it with "
            "moeroute.wrap_model(model, InformedRouting()), or activate one with set_adapter(name)"
        )
    return [unit for layer in layers for unit in (layer.attention, layer.feed_forward)]
