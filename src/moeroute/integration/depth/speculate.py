"""Self-speculative decoding: the first layers of a model draft, its other layers verify.

A draft runs layers 0 to e - 1 and leaves through the output embedding. The verification takes the
states that the draft left with and runs layers e to L - 1 on all of them at once: no layer sees a
token twice, and there is one set of keys and values. What was not accepted is cut off the cache.

Source: LayerSkip: Enabling Early Exit Inference and Self-Speculative Decoding, Elhoushi et al.,
2024, arXiv 2404.16710, section 4.3. Our own reading: a verification gives no token beyond the
draft, for which the draft's first layers would have to run on its last token.
"""

from __future__ import annotations

import inspect
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
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


@dataclass(frozen=True, kw_only=True, slots=True)
class Speculation:
    """What `speculate` wrote.

    Attributes:
        sequences: (1, S + N) int64, the prompt and N new tokens.
        drafted: Tokens that the first layers proposed.
        accepted: Those of them that the whole model would have written.
        verifications: Runs of the later layers, that on the prompt included.
    """

    sequences: Tensor
    drafted: int
    accepted: int
    verifications: int


@torch.no_grad()
def speculate(
    model: nn.Module,
    input_ids: Tensor,
    *,
    exit_layer: int,
    max_new_tokens: int,
    draft_length: int = 4,
    eos_token_id: int | None = None,
) -> Speculation:
    """Write greedily what the whole model would write, drafted by its first layers.

    A model that `EarlyExit` has wrapped drafts through the transform of the exit. How fast this is
    depends on how many tokens are accepted, and so on how the model was trained.

    Args:
        model: A causal decoder of transformers, or one wrapped with `EarlyExit`; in eval mode.
        input_ids: (1, S) int64, without padding.
        exit_layer: e, the layers that draft: 1 <= e < L.
        max_new_tokens: N at most, at least 1.
        draft_length: Tokens of a draft, at least 1.
        eos_token_id: Ends the text; None: nothing does.

    Raises:
        ValueError: A number is out of range, the model trains, is no decoder, keeps a state that
            cannot be cut off, or decides on its depth by itself.

    Example:
        >>> speculate(model, prompt, exit_layer=8, max_new_tokens=100).sequences
    """
    if input_ids.ndim != 2 or input_ids.shape[0] != 1 or not input_ids.shape[1]:
        raise ValueError(
            f"input_ids have shape {tuple(input_ids.shape)}; sequences accept different numbers of "
            "tokens, so give one at a time: (1, S)"
        )
    if max_new_tokens < 1 or draft_length < 1:
        raise ValueError(
            f"max_new_tokens={max_new_tokens} and draft_length={draft_length} must be at least 1"
        )
    halves = Halves(model, exit_layer)
    _, states = halves.draft(input_ids)
    tokens = [int(halves.verify(input_ids, states)[0, -1].argmax())]
    drafted = accepted = 0
    verifications = 1
    while len(tokens) < max_new_tokens and tokens[-1] != eos_token_id:
        length = min(draft_length, max_new_tokens - len(tokens))
        proposed, states = _propose(halves, input_ids.new_tensor([[tokens[-1]]]), length)
        read = input_ids.new_tensor([[tokens[-1], *proposed[:-1]]])
        verified = halves.verify(read, states)[0].argmax(-1).tolist()
        matches = _common(proposed, verified)
        new = verified[: matches + 1]
        halves.crop(length - len(new))
        if eos_token_id in new:
            new = new[: new.index(eos_token_id) + 1]
        tokens += new
        drafted, accepted, verifications = drafted + length, accepted + matches, verifications + 1
    return Speculation(
        sequences=torch.cat([input_ids, input_ids.new_tensor([tokens])], 1),
        drafted=drafted,
        accepted=accepted,
        verifications=verifications,
    )


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


def _propose(halves: Halves, token: Tensor, length: int) -> tuple[list[int], Tensor]:
    """Drafted tokens after a (1, 1) token, and the (1, length, H) states they were read off."""
    found, states = [], []
    for _ in range(length):
        logits, state = halves.draft(token)
        token = logits.argmax(-1, keepdim=True)
        found.append(token)
        states.append(state)
    return torch.cat(found, 1)[0].tolist(), torch.cat(states, 1)


def _common(proposed: list[int], verified: list[int]) -> int:
    """How many tokens two texts begin with alike."""
    pairs = enumerate(zip(proposed, verified, strict=True))
    return next((place for place, (one, other) in pairs if one != other), len(proposed))


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
            "so that its layers cannot be cut in two; use moeroute.unwrap_model, disable_adapter(), "
            "or for early exits moeroute.depth.exit_at(model) without a threshold"
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
