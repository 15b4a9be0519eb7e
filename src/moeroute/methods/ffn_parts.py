"""What methods that add experts beside a feed-forward block are put together from.

Such a method trains experts from scratch. In a dense checkpoint it adds them beside the frozen
block, with an output of zero at first; in a new model its `router` and `losses` make a `MoELayer`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from torch import nn

from moeroute.layers.beside import BesideFeedForward, start_at_zero
from moeroute.layers.moe import MoELayer

if TYPE_CHECKING:
    from moeroute.types import AuxLoss, Site


class AddedFields(Protocol):
    """The fields of a method that adds experts."""

    @property
    def num_experts(self) -> int:
        """Experts per block."""
        ...

    @property
    def intermediate_size(self) -> int:
        """Width of one expert."""
        ...


class FirstSite(nn.Module):
    """Which of the sites comes first.

    Args:
        name: Its name.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name


def check_added_fields(method: AddedFields) -> None:
    """Raise ValueError naming the field that is below 1."""
    for name, value in (
        ("num_experts", method.num_experts),
        ("intermediate_size", method.intermediate_size),
    ):
        if value < 1:
            raise ValueError(f"{type(method).__name__}: {name}={value} is below 1; use 1 or more")


def beside(
    site: Site, router: nn.Module, experts: nn.Module, losses: tuple[AuxLoss, ...] = ()
) -> BesideFeedForward:
    """A routed layer of new experts beside the block of a site, adding zero at first."""
    check_width(site)
    start_at_zero(experts)
    return BesideFeedForward(
        MoELayer(
            router=router,
            experts=experts,
            losses=losses,
            site=site.name,
            layer_index=site.layer_index,
        )
    )


def check_width(site: Site) -> int:
    """The width of a block.

    Raises:
        ValueError: The block changes the width.
    """
    if site.in_features != site.out_features:
        raise ValueError(
            f"{site.name} takes {site.in_features} features and gives {site.out_features}; experts "
            "beside it need one width. Leave it out of target_modules"
        )
    return site.in_features
