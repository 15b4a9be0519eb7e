"""What methods at a checkpoint's gate are put together from, out of the site's own gate."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from torch import nn

from moeroute.losses.balance import BalanceLoss
from moeroute.ops.probs import (
    normalized_sigmoid_probs,
    normalized_sqrt_softplus_probs,
    sigmoid_probs,
    softmax_probs,
    sqrt_softplus_probs,
)
from moeroute.routers.composed import ComposedRouter
from moeroute.routers.expert_scale import ExpertScale
from moeroute.routers.group_top_k import GroupTopK
from moeroute.routers.select import TopK, TopKSoftmax
from moeroute.routers.selection_bias import SelectionBias
from moeroute.routers.top_k_logits import TopKLogits

if TYPE_CHECKING:
    from moeroute.routers.select import Probs, Select
    from moeroute.types import AuxLoss, Site

OwnSelect = TopK | TopKSoftmax | TopKLogits | GroupTopK


class SlotFields(Protocol):
    """The field of a method that may take over the checkpoint's number of slots."""

    @property
    def top_k(self) -> int | None:
        """Slots per token; None for the checkpoint's."""
        ...


def check_slots(method: SlotFields) -> None:
    """Raise ValueError if top_k is given and below 1."""
    if method.top_k is not None and method.top_k < 1:
        raise ValueError(
            f"{type(method).__name__}: top_k={method.top_k} is below 1; every token needs a slot. "
            "None takes the checkpoint's"
        )


def slots_of(method: SlotFields, site: Site) -> int:
    """How many slots a token gets at a site.

    Raises:
        ValueError: top_k exceeds the experts of the site.
    """
    own = 0 if site.gate is None else site.gate.top_k
    slots = own if method.top_k is None else method.top_k
    if slots > site.out_features:
        raise ValueError(
            f"top_k={slots} exceeds num_experts={site.out_features} at {site.name}; lower "
            f"{type(method).__name__}.top_k"
        )
    return slots


def own_router(site: Site) -> ComposedRouter:
    """The site's own gate as a router of our parts, its weights copied.

    Raises:
        ValueError: The site is no gate.
    """
    router = None if site.gate is None else site.gate.make_router()
    if not isinstance(router, ComposedRouter):
        raise ValueError(f"{site.name} is no gate of a checkpoint; choose a site of kind 'gate'")
    return router


def own_scaling(site: Site) -> float:
    """What the site's own gate multiplies its weights by."""
    return 1.0 if site.gate is None else site.gate.routed_scaling_factor


def fresh_select(method: SlotFields, site: Site) -> Select:
    """The selection of the site's own gate for another score: other logits want another bias.

    A bias for choosing stays in its place at 0 and never moves.
    """
    router = own_router(site)
    for part in router.modules():
        if isinstance(part, SelectionBias):
            nn.init.zeros_(part.e_score_correction_bias)
            part.update_rate = 0.0
    innermost(router.select).top_k = slots_of(method, site)
    return router.select


def own_probs(select: Select) -> tuple[Probs, bool]:
    """How a selection makes weights: (logits to probabilities, whether they are renormalised)."""
    inner = innermost(select)
    return (
        (softmax_probs, True) if isinstance(inner, TopKSoftmax) else (inner.probs, inner.normalize)
    )


def scaled_as(own: Select, select: Select) -> Select:
    """A selection in the place of a gate's own, with the scales of experts that it has."""
    if not isinstance(own, ExpertScale):
        return select
    own.select = select
    return own


def own_bias(select: Select) -> SelectionBias | None:
    """A selection's bias on probabilities, if it has one; from now on it stays as it is."""
    inner = innermost(select)
    if not isinstance(inner, (TopK, GroupTopK)) or inner.selection_bias is None:
        return None
    inner.selection_bias.update_rate = 0.0
    return inner.selection_bias


def balance_losses(weight: float, probs: Probs = softmax_probs) -> tuple[AuxLoss, ...]:
    """The Switch balance loss over a gate's probabilities, or nothing where its weight is 0."""
    if not weight:
        return ()
    if probs is sigmoid_probs:
        return (BalanceLoss(weight=weight, probs=normalized_sigmoid_probs),)
    if probs is sqrt_softplus_probs:
        return (BalanceLoss(weight=weight, probs=normalized_sqrt_softplus_probs),)
    return (BalanceLoss(weight=weight),)


def biased_select(select: Select, num_experts: int, update_rate: float) -> Select:
    """A selection with a bias that moves, which starts as the bias that it has, or at 0."""
    inner = innermost(select)
    if isinstance(inner, TopKSoftmax):  # equal to this in exact arithmetic
        return TopK(inner.top_k, selection_bias=SelectionBias(num_experts, update_rate=update_rate))
    if inner.selection_bias is None:
        inner.selection_bias = SelectionBias(num_experts)
    inner.selection_bias.update_rate = update_rate
    return select


def innermost(select: Select) -> OwnSelect:
    """The selection inside the scales of experts.

    Raises:
        ValueError: It is none that a checkpoint's gate is made of.
    """
    inner = select.select if isinstance(select, ExpertScale) else select
    if not isinstance(inner, OwnSelect):
        raise ValueError(f"{type(inner).__name__} is no selection of a checkpoint's gate")
    return inner
