"""Watches routing: in wrapped models, in models made of our layers, in any MoE checkpoint."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from moeroute.integration.experts_report import experts_report
from moeroute.integration.statistics import RoutingStats
from moeroute.layers.routed import name_routed_layers, routing_passes
from moeroute.types import RoutingRecord


@contextmanager
def track_routing(model: nn.Module) -> Iterator[RoutingStats]:
    """Count what a model routes inside the block, in training and in eval.

    Works on what `moeroute.wrap_model` returns, on models that hold moeroute layers, and on any
    transformers MoE checkpoint whose experts are called with ids and weights. Padding is left out
    (where an `attention_mask` of shape (B, S) is passed by name), recomputation under activation
    checkpointing is not counted again, and no number is fetched from the device before it is read.

    Args:
        model: The model to watch.

    Yields:
        The statistics: `.layers`, `.summary()`, `.to_dict()`, `.plot(path)`.

    Raises:
        ValueError: The model routes nothing that can be watched.

    Example:
        >>> with moeroute.track_routing(model) as stats:
        ...     model(**batch)
        >>> print(stats)
    """
    stats = RoutingStats()
    name_routed_layers(model)
    passes = routing_passes(model)
    report = experts_report(model)
    if not passes and not report.dispatched:
        raise ValueError(_nothing_to_watch(model, report.ignored))
    if report.ignored:
        _warn_of_ignored(report.ignored)
    with ExitStack() as stack:
        for routing_pass in passes:
            stack.enter_context(routing_pass.listening(_RecordCounter(stats)))
        if report.dispatched:
            counter = _CallCounter(stats)
            for root in _roots(model):
                handle = root.register_forward_pre_hook(counter.see_mask, with_kwargs=True)
                stack.callback(handle.remove)
            for name in report.dispatched:
                experts = model.get_submodule(name)
                handle = experts.register_forward_pre_hook(counter.hook(name), with_kwargs=True)
                stack.callback(handle.remove)
        yield stats


class _RecordCounter:
    """Counts the records of our own layers."""

    def __init__(self, stats: RoutingStats) -> None:
        self.stats = stats

    def __call__(self, record: RoutingRecord) -> None:
        if _in_backward():
            return
        routing = record.routing
        self.stats.add(
            record.site,
            record.layer_index if record.layer_index >= 0 else _layer_index(record.site),
            routing.num_experts,
            routing.selected_experts,
            routing.routing_weights,
            record.token_mask,
        )


class _CallCounter:
    """Counts the calls of a checkpoint's own experts modules."""

    def __init__(self, stats: RoutingStats) -> None:
        self.stats = stats
        self.token_mask: Tensor | None = None

    def see_mask(self, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Remember the padding mask of this call; a longer one (with a cache) is cut to its end."""
        mask = kwargs.get("attention_mask")
        tokens = kwargs.get("input_ids", args[0] if args else None)
        tokens = kwargs.get("inputs_embeds") if tokens is None else tokens
        self.token_mask = None
        if isinstance(mask, Tensor) and mask.ndim == 2 and isinstance(tokens, Tensor):
            self.token_mask = mask[:, -tokens.shape[1] :].to(torch.bool).reshape(-1)

    def hook(self, name: str) -> Any:
        """A forward pre-hook for the experts module of this name."""

        def count(experts: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if _in_backward():
                return
            values = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
            if len(values) < 3:
                return
            _, chosen, weights = values[:3]
            mask = self.token_mask
            if mask is not None and mask.numel() != chosen.shape[0]:
                mask = None
            size = int(getattr(experts, "num_experts", chosen.shape[-1]))
            self.stats.add(name, _layer_index(name), size, chosen, weights, mask)

        return count


def _in_backward() -> bool:
    """True inside a backward pass, where activation checkpointing runs layers a second time."""
    return torch._C._current_graph_task_id() != -1


def _roots(model: nn.Module) -> list[nn.Module]:
    """The model, and the base that a PeftModel calls under `generate`."""
    base = getattr(model, "get_base_model", None)
    return [model] if base is None else [model, base()]


def _layer_index(name: str) -> int:
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return int(found.group(1)) if found else -1


def _nothing_to_watch(model: nn.Module, ignored: tuple[tuple[str, str], ...]) -> str:
    looked_for = (
        f"{type(model).__name__} routes nothing that can be watched: it holds no moeroute layer "
        "and "
        "no experts module that is called with ids and weights"
    )
    if not ignored:
        return looked_for + "; wrap it with moeroute.wrap_model, or pass a MoE checkpoint"
    classes = ", ".join(sorted({class_name for _, class_name in ignored}))
    return f"{looked_for}. {classes} compute their experts in a way of their own"


def _warn_of_ignored(ignored: tuple[tuple[str, str], ...]) -> None:
    warnings.warn(
        f"{len(ignored)} expert modules cannot be watched (first: {ignored[0][0]}, a "
        f"{ignored[0][1]}): they compute their experts in a way of their own",
        stacklevel=4,
    )
