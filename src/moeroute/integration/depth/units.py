"""The two units of a decoder layer, found in it and offered to whatever answers for them.

Each unit's `forward` is replaced on the instance by a `UnitForward`, as the layer's own is by a
`DepthForward`; it passes through unless the active adapter answers for units. It stays for as long
as the adapter does, so that a layer which activation checkpointing computes again meets it too, and
nothing is swapped while a model runs.

Axes: B batch, S sequence, H hidden.
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from moeroute.integration.depth.decoder_layers import HOST, argument_names, cache_name
from moeroute.integration.depth.layer_answer import answer_length
from moeroute.integration.depth.layer_call import LayerCall
from moeroute.integration.depth.token_run import run_tokens

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from moeroute.depth_types import AnswersUnits, UnitName
    from moeroute.integration.depth.decoder_layers import LayerFacts

    Answerer = Callable[[], AnswersUnits | None]

NEEDED = (
    "moeroute looks for one child whose forward takes hidden states and a cache (the attention), "
    "and one other child with matrices that takes hidden states alone and answers with them (the "
    "feed-forward)"
)


class UnitForward:
    """Stands in `unit.forward` on the instance.

    Args:
        unit: Which of the two it is.
        module: The unit.
        facts: Of its decoder layer.
        answerer: Says who answers for the layer's units now, None if they are to run.
    """

    def __init__(
        self, unit: UnitName, module: nn.Module, facts: LayerFacts, answerer: Answerer
    ) -> None:
        self.unit: UnitName = unit
        self.module = module
        self.answerer = answerer
        self.previous: Any = module.__dict__.get("forward")
        self.names = argument_names(module)
        self.length = answer_length(module)
        self.facts = replace(
            facts,
            class_name=type(module).__name__,
            cache_name=cache_name(module) or facts.cache_name,
            argument_names=self.names,
            in_tuple=self.length > 1,
        )

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Answer as the unit would, in its own container."""
        answerer = self.answerer()
        if answerer is None:
            return self.run(*args, **kwargs)
        arguments = {**dict(zip(self.names, args, strict=False)), **kwargs}
        tokens = arguments.pop(self.names[0])
        if self.unit == "feed_forward":
            if arguments:
                raise TypeError(
                    f"{self.facts.name} calls its {self.facts.class_name} with {sorted(arguments)} "
                    "beside the tokens, so that it cannot be run on some of them"
                )
            return answerer.answer_unit(self.unit, tokens, self._by_itself(tokens))
        call = LayerCall(self.run, self.facts, arguments, tokens.shape[1])
        executed_all = True

        def run(kept: Tensor | None) -> Tensor:
            nonlocal executed_all
            executed_all = kept is None or bool(kept.all())
            if kept is None or executed_all:
                return call.run(tokens, call.arguments, call.slots, 0)
            return run_tokens(call, tokens, kept, 0, "all")

        out = answerer.answer_unit(self.unit, tokens, run)
        if self.length == 1:
            return out
        if executed_all and call.answer is not None:
            return (out, *call.answer[1:])
        return (out, *[None] * (self.length - 1))

    def _by_itself(self, tokens: Tensor) -> Callable[[Tensor | None], Tensor]:
        """Runs a unit in which tokens do not see each other: the wanted ones in one row."""

        def run(kept: Tensor | None) -> Tensor:
            if kept is None or bool(kept.all()):
                return self.run(tokens)
            wanted = tokens[kept]  # (N, H)
            if not wanted.shape[0]:
                return tokens
            return tokens.index_put((kept,), self.run(wanted[None])[0].to(tokens.dtype))

        return run

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """The unit itself."""
        if self.previous is not None:
            return self.previous(*args, **kwargs)
        return type(self.module).forward(self.module, *args, **kwargs)


def unit_names(layer: nn.Module) -> Mapping[UnitName, str]:
    """Unit -> name of the child that it is; empty where they cannot be told apart."""
    attentions = [name for name, child in layer.named_children() if cache_name(child) is not None]
    others = [
        name
        for name, child in layer.named_children()
        if name not in (*attentions, HOST) and any(weight.ndim > 1 for weight in child.parameters())
    ]
    if len(attentions) != 1 or len(others) != 1:
        return {}
    attention, feed_forward = layer.get_submodule(attentions[0]), layer.get_submodule(others[0])
    adds_itself = "residual" in argument_names(attention)
    if adds_itself or not _can_be_read(attention) or not _takes_and_gives_tokens(feed_forward):
        return {}
    return {"attention": attentions[0], "feed_forward": others[0]}


def attach_units(layer: nn.Module, facts: LayerFacts, answerer: Answerer) -> None:
    """Put a `UnitForward` on both units of a decoder layer, once.

    Raises:
        ValueError: The units cannot be found.
    """
    names = unit_names(layer)
    if not names:
        raise ValueError(f"{facts.name} ({facts.class_name}) has no units to answer for; {NEEDED}")
    for unit, name in names.items():
        module = layer.get_submodule(name)
        if not isinstance(module.__dict__.get("forward"), UnitForward):
            module.forward = UnitForward(unit, module, facts, answerer)


def detach_units(layer: nn.Module) -> None:
    """Take the replaced forwards off the units of a decoder layer."""
    for module in layer.children():
        ours = module.__dict__.get("forward")
        if isinstance(ours, UnitForward):
            del module.__dict__["forward"]
            if ours.previous is not None:
                module.forward = ours.previous


def _takes_and_gives_tokens(module: nn.Module) -> bool:
    """True if a forward asks for one argument and answers with one tensor."""
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    needed = [
        parameter
        for parameter in parameters
        if parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
    ]
    alone = bool(parameters) and len(needed) <= 1
    return alone and _can_be_read(module) and answer_length(module) == 1


def _can_be_read(module: nn.Module) -> bool:
    """True if it is known what a forward answers with."""
    try:
        return answer_length(module) > 0
    except ValueError:
        return False
