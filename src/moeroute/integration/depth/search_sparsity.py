"""Searches how sparse each decoder layer should be, where tokens skip layers by importance.

Axes: L decoder layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from rich.progress import track
from torch import Tensor, nn

from moeroute.integration.adapters.wrap import unwrap_model, wrap_model
from moeroute.integration.depth.decoder_layers import layer_facts
from moeroute.integration.depth.distil import base_answers, divergence
from moeroute.layers.token_pruning import TokenPruningLayer
from moeroute.methods.ftp import FTP
from moeroute.routers.least_important import LeastImportantRouter
from moeroute.routers.token_pruning import FactorRouter
from moeroute.search.schedule import GeneticSettings, Schedule, search_schedule

if TYPE_CHECKING:
    from collections.abc import Iterator


@dataclass(frozen=True, kw_only=True, slots=True)
class SparsitySearch:
    """What the search found.

    Attributes:
        sparsity: (L,) for `moeroute.methods.FTP(sparsity=...)`.
        divergence: Nats per token from the base.
        even_divergence: The same where all layers between the bounds are as sparse as each other.
        evaluated: How many schedules were run.
    """

    sparsity: tuple[float, ...]
    divergence: float
    even_divergence: float
    evaluated: int


@torch.no_grad()
def search_sparsity(
    model: Any,
    batches: Sequence[Mapping[str, Tensor]],
    mean_sparsity: float,
    *,
    settings: GeneticSettings | None = None,
    seed: int = 0,
    show_progress: bool = True,
) -> SparsitySearch:
    """Search the sparsities that take a model least far from itself, by a genetic search.

    The fitness of a schedule is -KL(base || pruned), mean over real tokens. Every batch is run by
    the base once a generation. Deterministic by seed. To search and train in turns, as the paper
    does, search on the plain model, wrap it with what was found, train, and search on that: its own
    routers are then asked.

    Source: FTP: A Fine-grained Token-wise Pruner for Large Language Models via Token Routing, 2024,
    arXiv 2412.11494, of which the abstract alone was read; the search is our own reading.

    Args:
        model: A decoder of transformers, whose tokens then skip layers by a rule without
            parameters, or one wrapped with `FTP`. It is unchanged after the search.
        batches: Keywords of the model's forward, (B, S) tensors; at least one. `attention_mask`
            leaves padding out.
        mean_sparsity: Over all layers, those that run whole included.
        settings: How to search.
        seed: Of all that is drawn.
        show_progress: Whether to show a bar.

    Raises:
        ValueError: There is no batch; the mean cannot be met; the model is wrapped with another
            method, or `FTP` cannot prune it.

    Example:
        >>> found = search_sparsity(model, [{"input_ids": ids}], 0.3)
        >>> wrapped = moeroute.wrap_model(model, FTP(sparsity=found.sparsity))
    """
    if not batches:
        raise ValueError("there are no batches, so no schedule can be measured")
    settings = settings or GeneticSettings()
    layers = len(layer_facts(model))

    def each(generations: Iterable[int]) -> Iterable[int]:
        title = "searching sparsities"
        total = settings.generations
        return track(generations, title, total=total, disable=not show_progress)

    with _pruned(model) as (pruned, routers):

        def fitness(schedules: Sequence[Schedule]) -> list[float]:
            return _fitness(pruned, routers, batches, schedules)

        found = search_schedule(layers, mean_sparsity, fitness, settings, seed=seed, each=each)
    return SparsitySearch(
        sparsity=found.schedule,
        divergence=-found.fitness,
        even_divergence=-found.even_fitness,
        evaluated=len(found.evaluated),
    )


Routers = dict[int, FactorRouter | LeastImportantRouter]


def _fitness(
    model: Any,
    routers: Routers,
    batches: Sequence[Mapping[str, Tensor]],
    schedules: Sequence[Schedule],
) -> list[float]:
    """One number a schedule; the base runs a batch once for all."""
    sums = [0.0] * len(schedules)
    tokens = 0.0
    for batch in batches:
        moved = {
            "use_cache": False,
            **{name: rows.to(model.device) for name, rows in batch.items()},
        }
        with base_answers(model):
            base = model(**moved).logits
        mask = moved.get("attention_mask")
        count = float(base.shape[:2].numel() if mask is None else mask.sum())
        tokens += count
        for place, schedule in enumerate(schedules):
            for layer, router in routers.items():
                router.sparsity = schedule[layer]
            sums[place] += count * divergence(base, model(**moved).logits, mask).item()
    return [-value / max(tokens, 1.0) for value in sums]


@contextmanager
def _pruned(model: Any) -> Iterator[tuple[Any, Routers]]:
    """The model in eval mode with routers that leave tokens out, by layer; as it was after it."""
    training = [module for module in model.modules() if module.training]
    trainable = [weight for weight in model.parameters() if weight.requires_grad]
    routers = _routers(model)
    wrapped = not routers
    if wrapped:
        model = wrap_model(model, FTP(sparsity=0.0, router="static"))
        routers = _routers(model)
    before = {layer: router.sparsity for layer, router in routers.items()}
    model.eval()
    try:
        yield model, routers
    finally:
        for layer, sparsity in before.items():
            routers[layer].sparsity = sparsity
        if wrapped:
            unwrap_model(model)
        for weight in trainable:
            weight.requires_grad_(True)  # noqa: FBT003
        for module in training:
            module.training = True


def _routers(model: nn.Module) -> Routers:
    found: Routers = {}
    for module in model.modules():
        if isinstance(module, TokenPruningLayer) and isinstance(
            module.router, FactorRouter | LeastImportantRouter
        ):
            found[module.layer_index] = module.router
    return found
