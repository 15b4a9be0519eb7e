"""What most mixtures over a linear are put together from, out of a method's fields and a site."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from moeroute.layers.lora_bank import LoRABank
from moeroute.layers.lora_mixture import LoRAMixture
from moeroute.losses.balance import BalanceLoss

if TYPE_CHECKING:
    from torch import nn

    from moeroute.types import AuxLoss, Site


class LoRAScaling(Protocol):
    """The fields that make a bank of LoRA experts."""

    @property
    def r(self) -> int:
        """Rank of one expert."""
        ...

    @property
    def lora_alpha(self) -> float:
        """The scaling is lora_alpha / r."""
        ...

    @property
    def lora_dropout(self) -> float:
        """Dropout on the experts' input."""
        ...

    @property
    def use_rslora(self) -> bool:
        """The scaling is lora_alpha / sqrt(r) instead."""
        ...


def lora_bank(method: LoRAScaling, widths: tuple[int, int], num_experts: int) -> LoRABank:
    """A bank of experts of one rank.

    Args:
        method: Its fields.
        widths: (in_features, out_features) of the linear.
        num_experts: E.
    """
    return LoRABank(
        num_experts=num_experts,
        r=method.r,
        in_features=widths[0],
        out_features=widths[1],
        lora_alpha=method.lora_alpha,
        lora_dropout=method.lora_dropout,
        use_rslora=method.use_rslora,
    )


def linear_mixture(
    site: Site, router: nn.Module, bank: nn.Module, losses: tuple[AuxLoss, ...] = ()
) -> LoRAMixture:
    """A router and a bank beside the linear of a site."""
    return LoRAMixture(
        router=router, bank=bank, losses=losses, site=site.name, layer_index=site.layer_index
    )


def balance_losses(weight: float) -> tuple[AuxLoss, ...]:
    """The Switch balance loss, or nothing where its weight is 0."""
    return (BalanceLoss(weight=weight),) if weight else ()
