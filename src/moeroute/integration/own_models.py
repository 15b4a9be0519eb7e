"""Models with routed layers of their own: what `wrap_model` does for checkpoints, for them."""

from __future__ import annotations

from typing import TypeVar

from torch import nn

from moeroute.integration.adapters.root_hooks import connect
from moeroute.layers.routed import name_routed_layers, routed_layers

Model = TypeVar("Model", bound=nn.Module)


def connect_layers(model: Model) -> Model:
    """Let the routed layers of a model of your own see what the model is called with.

    Afterwards routers know the token ids, the padding (`attention_mask`), `task_ids` and
    `sample_embeddings` of each call, which the model itself is not handed, and in training the
    auxiliary losses are in the `loss` that the model returns, weighted for gradient accumulation
    as `Trainer` does it. A model that returns no loss is charged by
    `moeroute.aux_losses(model).total`, and warned about if nobody asks.

    Without it every layer stands alone: no mask, no ids, and losses that only `aux_losses` finds.

    Args:
        model: A model that is called with `input_ids` or `inputs_embeds`, as those of transformers
            are, and that holds `MoELayer`s or other routed layers. Changed in place; call it once,
            where the model is made.

    Returns:
        The model.

    Raises:
        ValueError: The model holds no routed layer.

    Example:
        >>> for block in model.model.layers:
        ...     block.mlp = MoELayer.build(hidden_size=64, intermediate_size=96, num_experts=8,
        ...                                top_k=2)
        >>> loss = moeroute.connect_layers(model)(**batch).loss  # the balance losses are in it
    """
    layers = list(routed_layers(model))
    if not layers:
        raise ValueError(
            f"{type(model).__name__} holds no routed layer; put moeroute layers into it first, or "
            "use moeroute.wrap_model on a checkpoint"
        )
    routing_pass = connect(model)
    name_routed_layers(model)
    for _, layer in layers:
        layer.routing_pass = routing_pass
    return model
