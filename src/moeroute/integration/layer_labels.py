"""Short labels for modules with long names."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence


def layer_labels(names: Sequence[str]) -> tuple[str, list[str]]:
    """What differs between dotted names, and the pattern that they share.

    Args:
        names: Such as "model.layers.0.mlp.experts", "model.layers.1.mlp.experts".

    Returns:
        The pattern ("model.layers.*.mlp.experts") and a label a name ("0", "1"). A name that stands
        alone keeps its last two parts as a label, and the pattern says "layer".
    """
    split = [name.split(".") for name in names]
    if len(set(names)) < 2:
        return "layer", [".".join(parts[-2:]) or "-" for parts in split]
    shortest = min(map(len, split))
    head = _shared(split, range(shortest))
    tail = _shared(split, range(-1, head - shortest - 1, -1))
    prefix = ".".join(split[0][:head])
    suffix = ".".join(split[0][len(split[0]) - tail :])
    labels = [".".join(parts[head : len(parts) - tail]) or "-" for parts in split]
    return ".".join(filter(None, (prefix, "*", suffix))), labels


def _shared(split: Sequence[Sequence[str]], places: range) -> int:
    """How many of these places hold the same part in every name, up to the first that does not."""
    count = 0
    for place in places:
        if len({parts[place] for parts in split}) > 1:
            break
        count += 1
    return count
