"""What a decoder layer answers with, read off the source of its forward.

Most layers return the hidden states. Some return a tuple of them and attention weights, which a
skipped layer does not have. Others hand a state on to the next layer beside the hidden states; to
skip such a layer would break the chain.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

HARMLESS = ("attn", "attention", "weights", "None")


PAIR = 2


def answers_in_tuple(layer: nn.Module) -> bool:
    """True if the layer answers with a tuple of the hidden states and attention weights.

    Raises:
        ValueError: It answers with something else besides, or its source cannot be read.
    """
    values = _returned(layer)
    tuples = [value for value in values if isinstance(value, ast.Tuple)]
    if not tuples and not _by_name(values):
        return False
    others = [ast.unparse(item) for value in tuples for item in value.elts[1:]]
    states = [other for other in others if not any(word in other for word in HARMLESS)]
    if states:
        raise ValueError(
            f"{type(layer).__name__} hands {states[0]} on to the next layer beside the hidden "
            "states; a layer that is skipped would break that chain, so this model cannot change "
            "its depth"
        )
    return True


def answer_length(module: nn.Module) -> int:
    """How many things a module answers with: 1 is a tensor by itself, more are in a tuple.

    Raises:
        ValueError: Its source cannot be read.
    """
    values = _returned(module)
    lengths = [len(value.elts) for value in values if isinstance(value, ast.Tuple)]
    return max(lengths, default=PAIR if _by_name(values) else 1)


def _by_name(values: list[ast.expr | None]) -> bool:
    """True if a tuple is put together first and returned by its name."""
    return any(value and ast.unparse(value) == "outputs" for value in values)


def _returned(layer: nn.Module) -> list[ast.expr | None]:
    """What stands behind every `return` of a module's forward."""
    name = type(layer).__name__
    try:
        source = textwrap.dedent(inspect.getsource(inspect.unwrap(type(layer).forward)))
    except (OSError, TypeError) as error:
        raise ValueError(
            f"the source of {name}.forward cannot be read, so it is unknown what a skipped layer "
            "has to answer with; depth routing needs a class from a file"
        ) from error
    return [node.value for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Return)]
