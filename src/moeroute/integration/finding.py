"""One thing that is wrong with a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Sequence

Severity = Literal["error", "warning", "info"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing that is wrong, or that somebody may have overlooked.

    Attributes:
        module: Full module name, the first of them where there are several; "" for the whole model.
        problem: What is wrong, in one sentence.
        mend: What to do about it.
        severity: "error": it fails or trains the wrong thing; "warning": it has no effect or costs
            quality or memory; "info": worth knowing.
    """

    module: str
    problem: str
    mend: str
    severity: Severity = "warning"

    def __str__(self) -> str:
        """The finding on two lines."""
        place = self.module or "model"
        return f"{self.severity}: {place}: {self.problem}\n  -> {self.mend}"


def several(found: Sequence[object], noun: str) -> str:
    """The number of what was found with its noun, such as "1 module" or "2 modules"."""
    return f"{len(found)} {noun}{'' if len(found) == 1 else 's'}"
