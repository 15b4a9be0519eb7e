"""`force_widths`: which feed-forward block each token takes, fixed from outside."""

from __future__ import annotations

from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from moeroute.integration.depth.stages import active_modules
from moeroute.layers.width import WidthFeedForward
from moeroute.ops.widths import Width

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence


@contextmanager
def force_widths(
    model: nn.Module, route: Sequence[int] | Sequence[Sequence[int]] | Tensor
) -> Iterator[None]:
    """Fix the width of every routed block, for every call inside the block.

    Routers are not asked, in training too, where no loss of theirs is charged. A block inside
    another one takes its place; after it, and after an exception, all is as it was. What is forced
    stands at the model: as all of a model's routing it is of one thread at a time.

    Args:
        model: A model that `moeroute.wrap_model` has wrapped with `DuoLLM`.
        route: (L,) `Width` for all sequences, (B, L) for each its own, or (B, S, L) for each token;
            L routed blocks in the order of the layers. `generate` repeats a sequence's row for its
            beams.

    Raises:
        ValueError: No active adapter has widths, or the route is of another shape, or holds what is
            no width of these blocks.

    Example:
        >>> with moeroute.depth.force_widths(model, [Width.BIG, Width.SMALL]):
        ...     model(input_ids=text)
    """
    layers = width_layers(model)
    table = _table(route, layers)
    before = [layer.forced for layer in layers]
    try:
        for place, layer in enumerate(layers):
            layer.forced = table[..., place]
        yield
    finally:
        for layer, forced in zip(layers, before, strict=True):
            layer.forced = forced


def width_layers(model: nn.Module) -> list[WidthFeedForward]:
    """The routed blocks of the active adapter, in the order of the layers; at least one.

    Raises:
        ValueError: There are none.
    """
    layers = [each for each in active_modules(model) if isinstance(each, WidthFeedForward)]
    if not layers:
        raise ValueError(
            f"{type(model).__name__} has no active adapter with blocks of several widths; wrap it "
            "with moeroute.wrap_model(model, DuoLLM()), or activate one with set_adapter(name)"
        )
    return layers


def _table(
    route: Sequence[int] | Sequence[Sequence[int]] | Tensor, layers: list[WidthFeedForward]
) -> Tensor:
    """(..., L) int64."""
    table = torch.as_tensor(route)
    count, widths = len(layers), min(layer.router.num_experts for layer in layers)
    if not 1 <= table.ndim <= 3 or table.shape[-1] != count:
        raise ValueError(
            f"the route has shape {tuple(table.shape)} but the model has {count} routed blocks; "
            f"give ({count},), (sequences, {count}) or (sequences, tokens, {count})"
        )
    integers = not (table.is_floating_point() or table.dtype == torch.bool)
    if not integers or (table.numel() and not bool(((table >= 0) & (table < widths)).all())):
        known = ", ".join(f"{width.value} {width.name.lower()}" for width in list(Width)[:widths])
        raise ValueError(
            f"the route holds {sorted(set(table.flatten().tolist()))[:9]}; these blocks have the "
            f"widths {known}"
            + ("" if widths == len(Width) else "; DuoLLM(bypass=True) may bypass them as well")
        )
    return table.to(torch.int64)
