"""The loss of models whose routers draw their experts."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from moeroute.layers.routed import RoutedLayer, routed_layers, routing_passes
from moeroute.losses.masked import real_tokens_only
from moeroute.losses.policy_gradient import NeedsCopies, check_copies, rloo_surrogate
from moeroute.routers.subset import SubsetOutput

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from moeroute.types import RoutingRecord


def policy_gradient_loss(
    model: nn.Module, compute_loss: Callable[[], Tensor], copies: int = 2
) -> Tensor:
    """The mean loss of several forwards, with the routers' policy gradient (RLOO).

    Each forward draws all experts anew. The value is the mean loss; its gradient is the mean's for
    everything that the losses depend on, and for the routers that of

        1/(M-1) sum_m (L_m - mean(L)) log Q(J_m)

    where Q(J_m) is the probability of all that copy m drew, over layers and real tokens. The graphs
    of all copies are held until `backward`.

    Args:
        model: A wrapped model, or any model that holds layers whose routers draw, in training mode.
        compute_loss: Runs the model and gives its loss, a scalar; called `copies` times. The loss
            may be a share of an accumulated batch's: the estimate then is of the same share.
        copies: M, at least 2. More vary less and cost as much each as the first.

    Returns:
        A scalar in the dtype of the losses.

    Raises:
        ValueError: Too few copies, no router of the model draws, or compute_loss gives no scalar.
        RuntimeError: The model is in eval mode, a forward drew nothing, or reentrant activation
            checkpointing took the gradient of what was drawn.

    Example:
        >>> loss = moeroute.policy_gradient_loss(model, lambda: model(**batch).loss)
        >>> loss.backward()
    """
    check_copies(copies)
    layers = _drawing_layers(model)
    losses: list[Tensor] = []
    log_probs: list[Tensor] = []
    with _charged_elsewhere(layers), ExitStack() as stack:
        heard: list[RoutingRecord] = []
        for routing_pass in routing_passes(model):
            stack.enter_context(routing_pass.listening(heard.append))
        for _ in range(copies):
            heard.clear()
            losses.append(_scalar(compute_loss()))
            log_probs.append(_log_prob(heard))
    together = torch.stack(losses)
    mean = together.mean()
    surrogate = rloo_surrogate(
        together, torch.stack([value.to(mean.device) for value in log_probs])
    )
    return mean + (surrogate - surrogate.detach()).to(mean.dtype)


def draws(layer: RoutedLayer) -> bool:
    """True if a layer's router learns from `policy_gradient_loss` alone."""
    return any(isinstance(loss, NeedsCopies) for loss in layer.losses)


def _drawing_layers(model: nn.Module) -> list[RoutedLayer]:
    layers = [layer for _, layer in routed_layers(model) if draws(layer)]
    if not layers:
        raise ValueError(
            f"{type(model).__name__} holds no router that draws its experts, so that there is no "
            "policy gradient; wrap it with a method such as ReMix, or train on its own loss"
        )
    if not all(layer.training for layer in layers):
        raise RuntimeError(
            "the model is in eval mode, where routers choose without drawing; call model.train()"
        )
    return layers


@contextmanager
def _charged_elsewhere(layers: list[RoutedLayer]) -> Iterator[None]:
    """Take off the losses that stand for this one; the layers' other losses stay."""
    before = [layer.losses for layer in layers]
    for layer in layers:
        layer.losses = tuple(loss for loss in layer.losses if not isinstance(loss, NeedsCopies))
    try:
        yield
    finally:
        for layer, losses in zip(layers, before, strict=True):
            layer.losses = losses


def _scalar(loss: Tensor) -> Tensor:
    if loss.ndim != 0:
        raise ValueError(
            f"compute_loss gave a tensor of shape {tuple(loss.shape)}; give the scalar loss of one "
            "forward"
        )
    return loss


def _log_prob(records: list[RoutingRecord]) -> Tensor:
    """Of all that one copy drew, over layers and real tokens."""
    total: Tensor | None = None
    for record in records:
        if isinstance(record.routing, SubsetOutput):
            _check_graph(record, record.routing)
            here = real_tokens_only(record.routing.log_prob, _mask_of_draws(record)).sum()
            total = here if total is None else total + here.to(total.device)
    if total is None:
        raise RuntimeError(
            "compute_loss drew no experts: it must run the model, with its adapter active, in this "
            "process"
        )
    return total


def _mask_of_draws(record: RoutingRecord) -> Tensor | None:
    """Which draws count: those of real tokens, or of samples that have one."""
    mask, routing = record.token_mask, record.routing
    if mask is None or not isinstance(routing, SubsetOutput):
        return None
    if routing.log_prob.shape == mask.shape or record.sequence_shape is None:
        return mask
    return mask.reshape(record.sequence_shape).to(torch.bool).any(1)


def _check_graph(record: RoutingRecord, routing: SubsetOutput) -> None:
    router = record.router
    if not torch.is_grad_enabled() or routing.log_prob.requires_grad or router is None:
        return
    if any(parameter.requires_grad for parameter in router.parameters()):
        raise RuntimeError(
            f"what the router at {record.site or 'this layer'} drew has no gradient: reentrant "
            "activation checkpointing runs the layers without a graph. Use "
            'gradient_checkpointing_kwargs={"use_reentrant": False}'
        )
