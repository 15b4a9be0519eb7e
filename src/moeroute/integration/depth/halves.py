"""A decoder cut in two: its first layers, and its later ones, each with a cache of its own."""

from __future__ import annotations

import inspect
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from moeroute.integration.depth.decoder_layers import check_depth, decoder_layers, layer_facts
from moeroute.integration.depth.force import root_of
from moeroute.integration.depth.host import host_of
from moeroute.layers.early_exit import EarlyExitLayer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from moeroute.integration.depth.decoder_layers import LayerFacts


class Halves:
    """A decoder cut in two: first layers that draft, and later ones that go on from there.

    Each half has a cache of its own layers; in the places of the other half's stands one of its
    own slots, so that the model reads lengths and masks off it.

    Args:
        model: See `speculate`.
        exit_layer: Layers of the first half.

    Raises:
        ValueError: See `speculate`.
    """

    def __init__(self, model: nn.Module, exit_layer: int) -> None:
        self.root = root_of(model)
        self.facts = list(layer_facts(self.root).values())
        self.layers = list(decoder_layers(self.root).values())
        if not 1 <= exit_layer < len(self.layers):
            raise ValueError(
                f"exit_layer={exit_layer} is outside 1..{len(self.layers) - 1}; some layers draft "
                "and some verify"
            )
        check_depth(self.root, self.facts)
        _check_layers(self.root, self.layers)
        self.exit_layer = exit_layer
        slots = _new_slots(self.root, self.facts)
        own = [slots[fact.cache_index] for fact in self.facts]
        self.first = Cache(layers=_beside(slots, own[:exit_layer]))
        self.rest = Cache(layers=_beside(slots, own[exit_layer:]))
        self.few = "logits_to_keep" in inspect.signature(self.root.forward).parameters

    def draft(self, token_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Run the first half on (1, S) tokens: (1, V) last logits, (1, S, H) states they left with.

        The states are those before the exit's transform.
        """
        left: list[Tensor] = []
        transform = _transform(self.layers[self.exit_layer])

        def leave(states: Tensor) -> Tensor:
            left.append(states)
            return states if transform is None else transform(states)

        answers = {place: _same for place in range(self.exit_layer + 1, len(self.layers))}
        answers[self.exit_layer] = leave
        kept = {"logits_to_keep": 1} if self.few else {}
        logits = self._run(token_ids, self.first, self.first_length(), answers, kept)
        return logits[:, -1], left[0]

    def verify(self, token_ids: Tensor, states: Tensor) -> Tensor:
        """Run the second half on (1, S, H) states of (1, S) tokens: (1, S, V) logits."""
        answers: dict[int, Callable[[Tensor], Tensor]]
        answers = {place: _same for place in range(1, self.exit_layer)}
        answers[0] = lambda _: states
        return self._run(token_ids, self.rest, self.lengths()[-1], answers, {})

    def crop(self, tokens: int) -> None:
        """Cut the last tokens off both caches; 0 lets sliding windows forget what they recorded."""
        for slot in self.slots():
            slot.crop(-tokens)

    def first_length(self) -> int:
        """Tokens that the first half has seen."""
        return self.lengths()[0]

    def lengths(self) -> list[int]:
        """Tokens in the cache of every layer."""
        return [int(slot.get_seq_length()) for slot in self.slots()]

    def slots(self) -> list[Any]:
        """Every layer's place in the cache that is its own."""
        places = [fact.cache_index for fact in self.facts]
        cut = self.exit_layer
        first = [self.first.layers[place] for place in places[:cut]]
        return [*first, *(self.rest.layers[place] for place in places[cut:])]

    def _run(
        self,
        token_ids: Tensor,
        cache: Cache,
        begin: int,
        answers: Mapping[int, Callable[[Tensor], Tensor]],
        options: dict[str, Any],
    ) -> Tensor:
        positions = torch.arange(begin, begin + token_ids.shape[1], device=token_ids.device)
        stands = {
            self.layers[place]: _Stand(self.facts[place], answer)
            for place, answer in answers.items()
        }
        with _standing(stands):
            return self.root(
                input_ids=token_ids,
                position_ids=positions[None],
                past_key_values=cache,
                use_cache=True,
                **options,
            ).logits


class _Stand:
    """Stands in `layer.forward` for a layer of the half that is not run."""

    def __init__(self, facts: LayerFacts, answer: Callable[[Tensor], Tensor]) -> None:
        self.facts, self.answer = facts, answer

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        out = self.answer(args[0] if args else kwargs["hidden_states"])
        return (out, None) if self.facts.in_tuple else out


@contextmanager
def _standing(stands: Mapping[nn.Module, _Stand]) -> Iterator[None]:
    """Put the stands in their layers' places inside the block."""
    with ExitStack() as stack:
        for layer, stand in stands.items():
            if "forward" in layer.__dict__:
                stack.callback(setattr, layer, "forward", layer.__dict__["forward"])
            else:
                stack.callback(delattr, layer, "forward")
            layer.forward = stand
        yield


def _same(states: Tensor) -> Tensor:
    return states


def _transform(layer: nn.Module) -> nn.Module | None:
    site = _active(layer)
    return site.transform if isinstance(site, EarlyExitLayer) else None


def _active(layer: nn.Module) -> nn.Module | None:
    host = host_of(layer)
    return None if host is None else host.active_module()


def _check_layers(root: nn.Module, layers: list[nn.Module]) -> None:
    """Make sure that nothing but its place decides whether a layer runs."""
    if root.training:
        raise ValueError(f"{type(root).__name__} is in training mode; call model.eval()")
    for site in map(_active, layers):
        if site is None or (isinstance(site, EarlyExitLayer) and site.router.threshold is None):
            continue
        raise ValueError(
            f"{type(site).__name__} decides token by token or by the prompt how deep the model is, "
            "so that its layers cannot be cut in two; use moeroute.unwrap_model or "
            "disable_adapter(), and for early exits moeroute.depth.exit_at(model) without a "
            "threshold"
        )


def _new_slots(root: nn.Module, facts: list[LayerFacts]) -> list[Any]:
    """An empty slot a layer, of the kind that it needs; sliding ones can be cut back."""
    slots: list[Any] = DynamicCache(config=root.config).layers  # pyright: ignore[reportArgumentType]
    count = max(fact.cache_index for fact in facts) + 1
    slots = slots or [DynamicLayer() for _ in range(count)]
    for slot in slots:
        if isinstance(slot, DynamicSlidingWindowLayer):
            slot.activate_past_recording()
    return slots


def _beside(slots: list[Any], own: list[Any]) -> list[Any]:
    """Slots of a half: its own, and for the others one of its own, of the same kind if it can."""
    known = {id(slot) for slot in own}
    return [
        slot
        if id(slot) in known
        else next((other for other in own if type(other) is type(slot)), own[0])
        for slot in slots
    ]
