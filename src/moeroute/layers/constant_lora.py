"""What a bank of LoRA experts is when every token weighs them alike: one plain LoRA."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional

from moeroute.layers.averaged_bank import AveragedLoRABank
from moeroute.layers.lora_bank import LoRABank
from moeroute.layers.ragged_bank import RaggedLoRABank
from moeroute.layers.shared_down_bank import SharedDownLoRABank
from moeroute.ops.gates import add_delta

if TYPE_CHECKING:
    from collections.abc import Sequence

ConstantBank = LoRABank | RaggedLoRABank | SharedDownLoRABank | AveragedLoRABank
"""The banks that are a plain LoRA for routing weights that do not change."""


class ConstantLoRA(nn.Module):
    """One plain LoRA over a linear, without a router.

        y = base(x) + scaling * B A x

    Called as a mixture over a linear is; trains nothing, it is there to be looked at and saved.

    Args:
        lora_a: (r, in_features); r may be 0.
        lora_b: (out_features, r).
        scaling: Multiplies the low-rank product.
    """

    lora_a: Tensor
    lora_b: Tensor

    def __init__(self, lora_a: Tensor, lora_b: Tensor, scaling: float) -> None:
        super().__init__()
        self.register_buffer("lora_a", lora_a)
        self.register_buffer("lora_b", lora_b)
        self.scaling = scaling

    @property
    def r(self) -> int:
        """Rank; 0 for a LoRA that does nothing."""
        return self.lora_a.shape[0]

    def forward(self, hidden_states: Tensor, base: nn.Module) -> Tensor:
        """Answer in place of `base(hidden_states)`; hidden_states is (..., in_features)."""
        middle = functional.linear(hidden_states.to(self.lora_a.dtype), self.lora_a)
        delta = functional.linear(middle, self.lora_b) * self.scaling
        return add_delta(base(hidden_states), delta)


def constant_lora(bank: ConstantBank, weights: Tensor) -> ConstantLoRA:
    """Fold constant routing weights into a bank.

        sum_e w_e s_e B_e A_e = s B A

    Exact. An expert of weight 0 is left out; so rank E * r for all experts of a `LoRABank`, r for
    one of them, and r for any number of the heads of a `SharedDownLoRABank`. If all experts have
    one scaling and the weights are 0 and 1, A and B are the experts' own, bit for bit. The experts
    of an `AveragedLoRABank` become their average, of rank r.

    Args:
        bank: The experts.
        weights: (K,) floating, any sign, K as `num_slots` tells: one an expert, for a bank of h
            heads first those of head 0.

    Returns:
        The LoRA, in the dtype of the bank, on its device, detached from it.
    """
    if isinstance(bank, AveragedLoRABank):
        return _average(bank, weights)
    used = [expert for expert, weight in enumerate(weights.tolist()) if weight]
    if isinstance(bank, SharedDownLoRABank):
        heads = bank.lora_b.detach().unflatten(1, (bank.num_experts, bank.r))  # (O, E, r)
        lora_b = torch.einsum("oer,e->or", heads.double(), weights.to(heads.device).double())
        size = bank.r if used else 0
        return ConstantLoRA(
            bank.lora_a.detach()[:size].clone(), lora_b.to(heads.dtype)[:, :size], bank.scaling
        )
    spans, scalings = _experts(bank)
    taken = [scalings[expert] for expert in used]
    scaling = taken[0] if taken and all(value == taken[0] for value in taken) else 1.0
    parts_a, parts_b = [bank.lora_a.detach()[:0]], [bank.lora_b.detach()[:, :0]]
    for expert in used:
        factor = float(weights[expert]) * scalings[expert] / scaling
        parts_a.append(bank.lora_a.detach()[spans[expert]])
        parts_b.append(bank.lora_b.detach()[:, spans[expert]] * factor)
    return ConstantLoRA(torch.cat(parts_a), torch.cat(parts_b, dim=1), scaling)


def num_slots(bank: ConstantBank) -> int:
    """How many weights a bank takes: one an expert, or one an expert and head."""
    return bank.num_experts * (bank.heads if isinstance(bank, AveragedLoRABank) else 1)


def _average(bank: AveragedLoRABank, weights: Tensor) -> ConstantLoRA:
    with torch.no_grad():
        by_head = weights.to(bank.lora_a.device).unflatten(0, (bank.heads, -1))
        mean_a, mean_b = bank.average(by_head[None])
    size = bank.r if weights.any() else 0
    return ConstantLoRA(mean_a[0, :size], mean_b[0, :, :size], bank.scaling)


def _experts(bank: LoRABank | RaggedLoRABank) -> tuple[Sequence[slice], Sequence[float]]:
    """Where each expert's ranks lie, and its scaling."""
    if isinstance(bank, LoRABank):
        spans = [slice(e * bank.r, (e + 1) * bank.r) for e in range(bank.num_experts)]
        return spans, [bank.scaling] * bank.num_experts
    spans = [bank.expert(e) for e in range(bank.num_experts)]
    return spans, [
        float(bank.scaling_of_rank[span.start]) if span.stop > span.start else 1.0 for span in spans
    ]
