"""What recurrent routers hand from layer to layer."""

from __future__ import annotations

import torch
from torch import Tensor


class StateChain:
    """What recurrent routers hand from layer to layer, for one forward.

    A recomputation under activation checkpointing goes through the layers backwards, so what each
    layer was handed is kept until the next forward.
    """

    def __init__(self) -> None:
        self.latest: Tensor | None = None
        self._handed: dict[str, tuple[Tensor | None, bool]] = {}
        self._visited_twice: set[str] = set()

    def before(self, site: str, *, first_time: bool) -> Tensor | None:
        """The state that the layer before `site` handed on.

        Args:
            site: Name of the layer that asks.
            first_time: True in the forward, False in a recomputation.

        Raises:
            RuntimeError: In a recomputation, if the state has lost its graph or is not known.
        """
        if first_time:
            if site in self._handed:
                self._visited_twice.add(site)
            self._handed[site] = (self.latest, torch.is_grad_enabled())
            return self.latest
        state, had_graph = self._handed.get(site, (None, True))
        if state is None:
            return None
        if torch.is_grad_enabled() and not had_graph:
            raise RuntimeError(
                f"{site}: the state of the layer before has no gradient: reentrant activation "
                "checkpointing runs the layers without a graph, and the gradients of a recurrent "
                'router would be wrong. Use gradient_checkpointing_kwargs={"use_reentrant": False}'
            )
        if site in self._visited_twice:
            raise RuntimeError(
                f"{site} ran twice in one forward, so that a recomputation does not know which "
                "state it was handed; switch activation checkpointing off for a recurrent router"
            )
        return state
