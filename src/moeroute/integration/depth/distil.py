"""How far a wrapped model is from its base, as a loss.

Axes: B sequences, S tokens, V vocabulary.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from moeroute.layers.routed import routing_passes
from moeroute.losses.masked import masked_mean

if TYPE_CHECKING:
    from collections.abc import Iterator


def distillation_loss(model: nn.Module, *, temperature: float = 2.0, **batch: Any) -> Tensor:
    """The divergence of a wrapped model's words from those of its base.

        L = T^2 * mean over real tokens of KL(softmax(base / T) || softmax(model / T))

    Two forwards: the base first, in eval mode and without gradients, then the model as it is. The
    auxiliary losses are not in it, and stay to be read: add `moeroute.aux_losses(model).total`.

    Args:
        model: What `moeroute.wrap_model` returned.
        temperature: T, above 0.
        **batch: Of the model's forward: input_ids and, where there is padding, attention_mask;
            labels end what a router counts as prompt, but are not learnt here.

    Returns:
        A scalar in float32, 0 or more.

    Raises:
        ValueError: The model is not wrapped, or the temperature is not above 0.
    """
    if not temperature > 0.0:
        raise ValueError(f"temperature={temperature} must be above 0")
    batch = {"use_cache": False, **batch}
    with base_answers(model), torch.no_grad():
        base = model(**{name: value for name, value in batch.items() if name != "labels"}).logits
    return divergence(base, model(**batch).logits, batch.get("attention_mask"), temperature)


def divergence(
    base: Tensor, other: Tensor, mask: Tensor | None = None, temperature: float = 1.0
) -> Tensor:
    """T^2 times the mean over real tokens of KL(softmax(base / T) || softmax(other / T)).

    Args:
        base: (B, S, V) logits of what is to be kept.
        other: (B, S, V) logits of what takes its place.
        mask: (B, S), 0 for padding.
        temperature: T.
    """
    known = (base.float() / temperature).log_softmax(-1)
    said = (other.float() / temperature).log_softmax(-1).to(known.device)
    each = (known.exp() * (known - said)).sum(-1).flatten()  # (B * S,)
    real = None if mask is None else mask.flatten().bool().to(each.device)
    return temperature**2 * masked_mean(each, real)


@contextmanager
def base_answers(model: nn.Module) -> Iterator[None]:
    """Let the base of a wrapped model answer, in eval mode, for every call inside the block.

    Raises:
        ValueError: The model is not wrapped.
    """
    passes = routing_passes(model)
    if not passes:
        raise ValueError(
            f"{type(model).__name__} holds no routed layer, so it has no base to compare with; "
            "wrap it with moeroute.wrap_model first"
        )
    with ExitStack() as stack:
        for routing_pass in passes:
            stack.callback(setattr, routing_pass, "resting", routing_pass.resting)
            routing_pass.resting = True
        for module in model.modules():
            if module.training:
                stack.callback(setattr, module, "training", True)
                module.training = False
        yield
