"""What the methods that mix LoRA adapters which exist already have in common.

Their experts were trained elsewhere, one adapter each, with targets and ranks of their own;
`moeroute.mix_adapters` reads the adapters and fills in `sites` and `experts`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from moeroute.layers.ragged_bank import RaggedLoRABank
from moeroute.routers.present import PresentScore

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moeroute.routers.scores import Score
    from moeroute.types import Site


@dataclass(frozen=True, kw_only=True, slots=True)
class LoRAExpert:
    """One adapter, as the mixture needs to know it.

    Attributes:
        name: What the caller called it.
        ranks: Its rank at each of the method's sites, 0 where it has none.
        scalings: Its scaling there.
    """

    name: str
    ranks: tuple[int, ...]
    scalings: tuple[float, ...]


class MixesAdapters(Protocol):
    """The fields of a method that mixes adapters."""

    @property
    def sites(self) -> tuple[str, ...]:
        """Full names of the linears that any of the adapters adapts."""
        ...

    @property
    def experts(self) -> tuple[LoRAExpert, ...]:
        """The adapters."""
        ...


def load_experts(method: MixesAdapters) -> None:
    """Make the tuples that a config file holds as lists, and check that they fit each other.

    Raises:
        ValueError: Two adapters of one name, or as many ranks as there are no sites.
    """
    experts = tuple(_expert(value) for value in method.experts)
    object.__setattr__(method, "sites", tuple(method.sites))
    object.__setattr__(method, "experts", experts)
    names = [expert.name for expert in experts]
    if len(set(names)) < len(names):
        raise ValueError(f"{type(method).__name__}: two adapters of one name in {names}")
    for expert in experts:
        if not len(expert.ranks) == len(expert.scalings) == len(method.sites):
            raise ValueError(
                f"{type(method).__name__}: adapter {expert.name!r} has {len(expert.ranks)} ranks "
                f"and {len(expert.scalings)} scalings for {len(method.sites)} sites"
            )


def _expert(value: Any) -> LoRAExpert:
    if isinstance(value, LoRAExpert):
        return value
    return LoRAExpert(
        name=value["name"], ranks=tuple(value["ranks"]), scalings=tuple(value["scalings"])
    )


def check_sites(method: MixesAdapters, sites: Sequence[Site]) -> None:
    """Make sure that there is something to mix at every site.

    Raises:
        ValueError: There are no adapters, or a site that none of them adapts.
    """
    name = type(method).__name__
    if not method.experts:
        raise ValueError(
            f"{name} mixes adapters that exist: call moeroute.mix_adapters(model, "
            f'{{"math": path, "code": path}}, router={name}(...)) instead of wrap_model'
        )
    strange = [site.name for site in sites if site.name not in method.sites]
    if strange:
        raise ValueError(
            f"{name}: none of the adapters {[expert.name for expert in method.experts]} adapts "
            f"{strange[0]}; leave target_modules to moeroute.mix_adapters"
        )


def check_slots(method: MixesAdapters, slots: int) -> None:
    """Raise ValueError unless a token gets at least one adapter; more than there are does no harm.

    Args:
        method: Named in the error.
        slots: Its top_k.
    """
    if slots < 1:
        raise ValueError(
            f"{type(method).__name__}: top_k={slots} is below 1; a token needs an adapter"
        )


def expert_bank(
    method: MixesAdapters, site: Site, *, trainable: bool = False, anchored: bool = False
) -> RaggedLoRABank:
    """The adapters' weights at one site, still to be filled."""
    place = method.sites.index(site.name)
    return RaggedLoRABank(
        ranks=[expert.ranks[place] for expert in method.experts],
        scalings=[expert.scalings[place] for expert in method.experts],
        in_features=site.in_features,
        out_features=site.out_features,
        trainable=trainable,
        anchored=anchored,
    )


def present_score(score: Score, bank: RaggedLoRABank) -> Score:
    """The score, with the adapters left out that say nothing of this site."""
    present = [rank > 0 for rank in bank.ranks]
    return score if all(present) else PresentScore(score, present)
