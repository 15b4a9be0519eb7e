"""The oracle of Duo-LLM: of every route through the blocks, the one that suits a token best.

Axes: B sequences, S tokens, R routes, L routed blocks, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from rich.progress import track
from torch import Tensor
from torch.nn.functional import cross_entropy

from moeroute.integration.depth.force_widths import force_widths, width_layers
from moeroute.ops.widths import Width, all_routes, count_routes


@dataclass(frozen=True, kw_only=True, slots=True)
class OracleRoutes:
    """What the search found; tensors are on the CPU, losses in nats.

    A place is a token whose next one is predicted.

    Attributes:
        routes: (R, L) int64 `Width`, all that were run, the cheapest first.
        route_losses: (R,) float32, mean over places if every token takes this route.
        best: (B, S - 1) int64, the row of `routes` of least loss at each place; the cheapest of
            equal ones. 0 where there is nothing to predict.
        losses: (B, S - 1) float32, its loss; 0 where there is nothing to predict.
        small_losses: (B, S - 1) float32 of the route that is small everywhere.
        big_losses: (B, S - 1) float32 of the base.
        is_place: (B, S - 1) bool, False where padding begins or ends.
    """

    routes: Tensor
    route_losses: Tensor
    best: Tensor
    losses: Tensor
    small_losses: Tensor
    big_losses: Tensor
    is_place: Tensor

    @property
    def loss(self) -> float:
        """Of the oracle: mean over places."""
        return _mean(self.losses, self.is_place).item()

    @property
    def difficulty(self) -> Tensor:
        """(B, S - 1) float32: what a token gains by the oracle over small blocks alone."""
        return self.small_losses - self.losses

    @property
    def big_share(self) -> Tensor:
        """(L,) float32: how many of the places are best with each block big."""
        chosen = self.routes[self.best[self.is_place]]
        return (chosen == Width.BIG).float().mean(0)


@torch.no_grad()
def search_routes(
    model: Any,
    input_ids: Tensor,
    *,
    attention_mask: Tensor | None = None,
    num_big: int | None = None,
    most_routes: int = 4096,
    routes_at_once: int = 16,
    show_progress: bool = True,
) -> OracleRoutes:
    """Run every route, and choose for each token the one of least next-token loss.

    All 2^L routes, or 3^L where blocks can be bypassed; with exactly k big blocks C(L, k), or
    C(L, k) 2^(L-k). Deterministic.

    Source: Duo-LLM: A Framework for Studying Adaptive Computation in Large Language Models, 2024,
    arXiv 2410.10846, section 3. Our own reading: a run gives all tokens one route, so that a
    token's context has taken the same route as the token. The loss is a lower bound of that of any
    one route for all tokens; a router, whose tokens may go ahead by other routes than a token's
    own, may be below it if there are two layers or more.

    Args:
        model: A model that `moeroute.wrap_model` has wrapped with `DuoLLM`; it is put into eval
            mode for the search.
        input_ids: (B, S), at least two tokens.
        attention_mask: (B, S), 0 at padding, which is best put at the end.
        num_big: k; None for any number.
        most_routes: More routes than so many are refused.
        routes_at_once: Routes in one forward of `routes_at_once * B` sequences.
        show_progress: Whether to show a bar.

    Raises:
        ValueError: No active adapter has widths; too many routes; num_big is out of range; the text
            has nothing to predict.

    Example:
        >>> found = moeroute.depth.search_routes(model, text, num_big=4)
        >>> found.loss, found.difficulty, found.routes[found.best[0, 5]]
    """
    layers = width_layers(model)
    bypass = min(layer.router.num_experts for layer in layers) > Width.BYPASS
    count = count_routes(len(layers), num_big=num_big, bypass=bypass)
    if count > most_routes:
        raise ValueError(
            f"{count} routes through {len(layers)} blocks are more than most_routes={most_routes}; "
            "raise it, give num_big, or route fewer blocks (target_modules)"
        )
    if routes_at_once < 1:
        raise ValueError(f"routes_at_once={routes_at_once} is below 1")
    is_place = _places(input_ids, attention_mask)
    routes = all_routes(len(layers), num_big=num_big, bypass=bypass)
    search = _Search(model, input_ids, attention_mask, is_place)
    was_training = model.training
    model.eval()
    try:
        chunks = range(0, len(routes), routes_at_once)
        for begin in track(chunks, "trying routes", disable=not show_progress):
            search.add(routes[begin : begin + routes_at_once], begin)
        small, big = (search.run(torch.full((1, len(layers)), int(width)))[0] for width in _ENDS)
    finally:
        model.train(was_training)
    return OracleRoutes(
        routes=routes,
        route_losses=torch.cat(search.route_losses),
        best=search.best,
        losses=search.losses.masked_fill(~is_place, 0.0),
        small_losses=small,
        big_losses=big,
        is_place=is_place,
    )


_ENDS = (Width.SMALL, Width.BIG)


class _Search:
    """The best that was found so far."""

    def __init__(
        self, model: Any, input_ids: Tensor, attention_mask: Tensor | None, is_place: Tensor
    ) -> None:
        self.model = model
        self.device = next(model.parameters()).device
        self.input_ids = input_ids.to(self.device)
        self.attention_mask = None if attention_mask is None else attention_mask.to(self.device)
        self.is_place = is_place
        self.best = torch.zeros(is_place.shape, dtype=torch.int64)
        self.losses = torch.full(is_place.shape, torch.inf)
        self.route_losses: list[Tensor] = []

    def add(self, routes: Tensor, first: int) -> None:
        """Run (r, L) routes, of which `first` is the place of the first among all."""
        losses = self.run(routes)  # (r, B, S - 1)
        self.route_losses.append(torch.stack([_mean(each, self.is_place) for each in losses]))
        least = losses.amin(0)
        where = (losses == least).to(torch.int8).argmax(0) + first
        better = (least < self.losses) & self.is_place
        self.best = torch.where(better, where, self.best)
        self.losses = torch.where(better, least, self.losses)

    def run(self, routes: Tensor) -> Tensor:
        """(r, B, S - 1) float32 losses of (r, L) routes on the CPU; 0 where none is predicted."""
        batch, length = self.input_ids.shape
        ids = self.input_ids.repeat(len(routes), 1)  # route by route
        given = {"input_ids": ids}
        if self.attention_mask is not None:
            given["attention_mask"] = self.attention_mask.repeat(len(routes), 1)
        with force_widths(self.model, routes.repeat_interleave(batch, dim=0)):
            logits = self.model(**given, use_cache=False).logits[:, :-1].float()
        each = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
        losses = each.reshape(len(routes), batch, length - 1).cpu()
        return losses.masked_fill(~self.is_place, 0.0)


def _places(input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    """(B, S - 1) bool, where a token and its next one are real."""
    if input_ids.ndim != 2 or input_ids.shape[1] < 2:
        raise ValueError(
            f"input_ids have shape {tuple(input_ids.shape)}; give (B, S) of at least two tokens"
        )
    real = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    if real.shape != input_ids.shape:
        raise ValueError(
            f"attention_mask has shape {tuple(real.shape)}, input_ids {tuple(input_ids.shape)}"
        )
    places = (real[:, 1:] != 0).cpu() & (real[:, :-1] != 0).cpu()
    if not bool(places.any()):
        raise ValueError("the text has no token to predict; give at least two tokens")
    return places


def _mean(losses: Tensor, is_place: Tensor) -> Tensor:
    """() float32 over (B, S - 1) places."""
    return (losses.double() * is_place).sum().div(is_place.sum()).float()
