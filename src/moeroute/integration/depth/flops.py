"""What skipped layers save, counted from the products that ran."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count


@dataclass(frozen=True, kw_only=True, slots=True)
class FlopsSaved:
    """Floating-point operations of the same forwards.

    Attributes:
        executed: By the model as it is, its routers included.
        base: By the model without adapters, every layer run once.
    """

    executed: int
    base: int

    @property
    def share(self) -> float:
        """Of the base's operations that were saved; below 0 where more were executed."""
        return 1.0 - self.executed / self.base


def flops_saved(model: nn.Module, batches: Sequence[Mapping[str, Any]]) -> FlopsSaved:
    """Run forwards with and without adapters, and count the operations that were executed.

    Counted are matrix products and attention, by torch's `FlopCounterMode`: what ran, not what a
    formula promises. Attention counts every pair of tokens, seen or masked.

    Args:
        model: A model that `moeroute.wrap_model` has wrapped, in eval mode.
        batches: The keyword arguments of one forward each; not `past_key_values`.

    Raises:
        ValueError: No batch is given, or the model has no adapters.
    """
    if not batches:
        raise ValueError("no batch is given; pass at least one, such as {'input_ids': ids}")
    if not isinstance(model, PeftModel):
        raise ValueError(
            f"{type(model).__name__} has no adapters, so nothing is saved; wrap it with "
            "moeroute.wrap_model, or count with moeroute.depth.executed_flops under force_depth"
        )
    executed = sum(executed_flops(model, batch) for batch in batches)
    with model.disable_adapter():
        base = sum(executed_flops(model, batch) for batch in batches)
    return FlopsSaved(executed=executed, base=base)


@torch.no_grad()
def executed_flops(model: nn.Module, batch: Mapping[str, Any]) -> int:
    """Floating-point operations of one forward, as `flops_saved` counts them.

    Args:
        model: Any model; what forces its depth holds.
        batch: The keyword arguments of its forward.
    """
    with FlopCounterMode(display=False, custom_mapping=_CPU) as counter:
        model(**batch)
    return counter.get_total_flops()


def _attention(
    query: Tensor, key: Tensor, value: Tensor, *_: Any, out_shape: Any = None, **__: Any
) -> int:
    return sdpa_flop_count(query, key, value)


_CPU = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention}
"""What torch's counter leaves out."""
