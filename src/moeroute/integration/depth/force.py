"""`force_depth`: how often each decoder layer runs, fixed from outside."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from moeroute.integration.adapters.root_hooks import OpenPass, connect, disconnect
from moeroute.integration.depth.decoder_layers import check_depth, decoder_layers, layer_facts
from moeroute.integration.depth.host import attach, detach, host_of

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence


@contextmanager
def force_depth(
    model: nn.Module, actions: Sequence[int] | Sequence[Sequence[int]] | Tensor
) -> Iterator[None]:
    """Fix how often each decoder layer runs, for every call inside the block.

    0 skips a layer, 1 runs it, 2 runs it twice and so on: `h`, `B(h)`, `B(B(h))`. Works on any
    decoder of transformers and on wrapped models, whose depth routers are not asked then. What a
    cache was begun with holds to its end; a block inside another one takes its place.

    Args:
        model: A transformers model, or one that `moeroute.wrap_model` has wrapped. It is unchanged
            after the block.
        actions: (L,) for all sequences, or (B, L); L decoder layers. `generate` repeats a
            sequence's row for its beams.

    Raises:
        ValueError: The model is no decoder, a layer that is skipped or repeated keeps a state (as
            linear attention does), or the actions are of another shape or below 0.

    Example:
        >>> with moeroute.force_depth(model, [1, 1, 0, 2]):
        ...     model.generate(input_ids, max_new_tokens=20)
    """
    facts = layer_facts(model)
    table = _table(actions, len(facts))  # (L, B)
    check_depth(model, [fact for fact in facts.values() if set(table[fact.position]) != {1}])
    root = root_of(model)
    layers = decoder_layers(model)
    with ExitStack() as stack:
        if not any(isinstance(hook, OpenPass) for hook in root._forward_pre_hooks.values()):
            stack.callback(disconnect, root)
        routing_pass = connect(root)
        for name, fact in facts.items():
            layer = layers[name]
            if host_of(layer) is None:
                stack.callback(_detach_if_idle, layer)
            host = attach(layer, fact, routing_pass)
            stack.callback(setattr, host, "forced", host.forced)
            host.forced = table[fact.position]
        yield


def _table(actions: Sequence[int] | Sequence[Sequence[int]] | Tensor, layers: int) -> list[tuple]:
    """(L, B or 1) plain numbers."""
    table = torch.as_tensor(actions)
    if table.ndim == 1:
        table = table[None]
    if table.ndim != 2 or table.shape[1] != layers or not table.shape[0]:
        raise ValueError(
            f"actions have shape {tuple(torch.as_tensor(actions).shape)} but the model has "
            f"{layers} decoder layers; give ({layers},) or (sequences, {layers})"
        )
    if table.is_floating_point() or table.dtype == torch.bool or int(table.min()) < 0:
        raise ValueError(
            "actions are numbers of executions: integers, 0 to skip a layer, 1 to run it, 2 to "
            "run it twice"
        )
    return [tuple(column) for column in table.t().tolist()]


def root_of(model: nn.Module) -> nn.Module:
    """The model inside what PEFT puts around it."""
    inner: Callable[[], nn.Module] | None = getattr(model, "get_base_model", None)
    return inner() if inner is not None else model


def _detach_if_idle(layer: nn.Module) -> None:
    host = host_of(layer)
    if host is not None and not host.moeroute_site:
        detach(layer)
