"""What each layer less costs: the loss of a text against the layers executed."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from moeroute.integration.depth.decoder_layers import layer_facts
from moeroute.integration.depth.flops import executed_flops
from moeroute.integration.depth.force import force_depth
from moeroute.integration.depth.influence import block_influence


@dataclass(frozen=True, kw_only=True, slots=True)
class DepthPoint:
    """One point of the curve.

    Attributes:
        layers: Layers executed.
        skipped: The layers left out, in the order in which they went.
        loss: Mean nats per predicted token.
        seconds: Of all forwards.
        flops: Executed in the first batch's forward.
    """

    layers: int
    skipped: tuple[int, ...]
    loss: float
    seconds: float
    flops: int


def depth_curve(
    model: Any, batches: Sequence[Tensor], *, most_skipped: int | None = None
) -> list[DepthPoint]:
    """Leave out layer after layer, the one of least influence first (ShortGPT), and measure.

    Args:
        model: A language model of transformers, in eval mode.
        batches: (B, S) token ids each, at least two tokens long.
        most_skipped: Layers to leave out at most; half of them by default.

    Returns:
        The whole model first.

    Raises:
        ValueError: The model is no decoder, a layer keeps a state that cannot be skipped, no text
            is given, or more layers are to go than there are.
    """
    count = len(layer_facts(model))
    most = count // 2 if most_skipped is None else most_skipped
    if not 0 <= most <= count:
        raise ValueError(f"most_skipped={most}, but the model has {count} layers")
    influence = block_influence(model, [{"input_ids": ids.to(model.device)} for ids in batches])
    order = influence.argsort().tolist()
    points = []
    for number in range(most + 1):
        actions = [0 if layer in order[:number] else 1 for layer in range(count)]
        with force_depth(model, actions):
            start = time.perf_counter()
            loss = _loss(model, batches)
            seconds = time.perf_counter() - start
            flops = executed_flops(model, {"input_ids": batches[0].to(model.device)})
        points.append(
            DepthPoint(
                layers=count - number,
                skipped=tuple(order[:number]),
                loss=loss,
                seconds=seconds,
                flops=flops,
            )
        )
    return points


@torch.no_grad()
def _loss(model: Any, batches: Sequence[Tensor]) -> float:
    total, tokens = 0.0, 0
    for ids in batches:
        ids = ids.to(model.device)
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()
        total += cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum").item()
        tokens += ids[:, 1:].numel()
    if not tokens:
        raise ValueError("the text has no token to predict; give at least two tokens")
    return total / tokens
