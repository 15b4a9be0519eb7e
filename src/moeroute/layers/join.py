"""One routing pass for the routed layers of a model that is built from moeroute's layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from moeroute.layers.routed import name_routed_layers, routed_layers
from moeroute.routing_pass import RoutingPass


def join_layers(model: nn.Module) -> RoutingPass:
    """Let the routed layers of a model share one pass, which the model's forward opens and closes.

    Needed where layers hand something on to each other (a recurrent router), or where routers and
    losses must know the padding or the token ids: the model's forward is looked at for `input_ids`,
    `inputs_embeds` and `attention_mask` by name. `wrap_model` does this for checkpoints. Twice does
    no harm.

    Args:
        model: The module that is called, with the layers inside.

    Returns:
        The pass.

    Raises:
        ValueError: The model holds no routed layer.

    Example:
        >>> join_layers(model)
        >>> loss = task_loss(model(input_ids=ids)) + moeroute.aux_losses(model).total
    """
    for hook in model._forward_pre_hooks.values():
        if isinstance(hook, _Open):
            return hook.routing_pass
    layers = list(routed_layers(model))
    if not layers:
        raise ValueError(
            f"{type(model).__name__} holds no routed layer; build it with moeroute layers first"
        )
    name_routed_layers(model)
    routing_pass = RoutingPass(rooted=True)
    for _, layer in layers:
        layer.routing_pass = routing_pass
    model.register_forward_pre_hook(_Open(routing_pass), with_kwargs=True)
    model.register_forward_hook(_Close(routing_pass), always_call=True)
    return routing_pass


class _Open:
    """Forward pre-hook of the model."""

    def __init__(self, routing_pass: RoutingPass) -> None:
        self.routing_pass = routing_pass

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = kwargs.get("input_ids", args[0] if args else None)
        tokens = ids if isinstance(ids, Tensor) else kwargs.get("inputs_embeds")
        mask = kwargs.get("attention_mask")
        self.routing_pass.begin(
            token_ids=ids if isinstance(ids, Tensor) and not ids.is_floating_point() else None,
            token_mask=mask.to(torch.bool) if isinstance(mask, Tensor) and mask.ndim == 2 else None,
            batch_shape=_batch_shape(tokens),
        )


def _batch_shape(tokens: Any) -> tuple[int, int] | None:
    shaped = isinstance(tokens, Tensor) and tokens.ndim > 1
    return (tokens.shape[0], tokens.shape[1]) if shaped else None


class _Close:
    """Forward hook of the model, also called after an exception."""

    def __init__(self, routing_pass: RoutingPass) -> None:
        self.routing_pass = routing_pass

    def __call__(self, *_: Any) -> None:
        self.routing_pass.end()
