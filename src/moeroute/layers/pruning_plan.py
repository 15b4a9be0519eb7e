"""How sparse each of a model's decoder layers is to be."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from moeroute.types import Site


class PruningPlan(nn.Module):
    """What the layers of one wrap share.

    Args:
        sparsities: Site name -> the share of tokens that skip the layer.
        last: Name of the last site.
    """

    def __init__(self, sparsities: Mapping[str, float], last: str) -> None:
        super().__init__()
        self.sparsities = dict(sparsities)
        self.last = last

    @classmethod
    def over(cls, sites: Sequence[Site], sparsity: float | tuple[float, ...]) -> PruningPlan:
        """The plan of a model's sites, in order.

        Args:
            sites: At least one.
            sparsity: One number for every site but the first and the last, which get 0, or a tuple
                of one for each decoder layer.

        Raises:
            ValueError: The tuple speaks of another number of layers, or has the first site leave
                tokens out.
        """
        first, last = sites[0].name, sites[-1].name
        if not isinstance(sparsity, tuple):
            return cls(
                {site.name: 0.0 if site.name in (first, last) else sparsity for site in sites}, last
            )
        for site in sites:
            if len(sparsity) != site.num_layers:
                raise ValueError(
                    f"sparsity has {len(sparsity)} numbers for a model of {site.num_layers} "
                    "decoder layers; give one a layer, or one for all"
                )
        found = {site.name: sparsity[site.layer_index] for site in sites}
        if found[first]:
            raise ValueError(
                f"sparsity={sparsity} has {first} leave out {found[first]:g} of its tokens, but no "
                "routed layer before it tells what tokens attend to; set its sparsity to 0"
            )
        return cls(found, last)
