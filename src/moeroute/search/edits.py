"""The edits of a path through layers: skip some neighbours, repeat one layer."""

from __future__ import annotations

from typing import NamedTuple


class Edit(NamedTuple):
    """One edit, whatever path it is done to.

    Attributes:
        skipped: The layers that go.
        repeated: The layer that runs once more, or none.
    """

    skipped: tuple[int, ...] = ()
    repeated: tuple[int, ...] = ()


def edits_of(
    path: tuple[int, ...], skip_block: int, max_executions: int, longest: int | None = None
) -> dict[tuple[int, ...], Edit]:
    """Every path that is one edit away, and the edit; the order of layers stays.

    Args:
        path: Layer indices in the order of their execution.
        skip_block: Most neighbours that one edit skips.
        max_executions: Most times that a layer may stand in a path.
        longest: Most layers of an answer; None sets no limit.
    """
    found: dict[tuple[int, ...], Edit] = {}
    for size in range(1, skip_block + 1):
        for begin in range(len(path) - size + 1):
            end = begin + size
            found.setdefault(path[:begin] + path[end:], Edit(skipped=path[begin:end]))
    for place, layer in enumerate(path):
        if path.count(layer) < max_executions:
            longer = (*path[: place + 1], layer, *path[place + 1 :])
            found.setdefault(longer, Edit(repeated=(layer,)))
    return {new: edit for new, edit in found.items() if longest is None or len(new) <= longest}
