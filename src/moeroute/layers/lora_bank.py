"""The LoRA experts of one linear: one LoRA of rank E * r whose ranks are gated."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from moeroute.ops.expert_mm import gated_lora


class LoRABank(nn.Module):
    """E LoRA experts over one linear, stored as one LoRA of rank E * r.

        y = base + scaling * sum_k w_k B_{e_k} A_{e_k} x

    Expert e owns rows e*r to (e+1)*r of `lora_a` and the same columns of `lora_b`, so an expert's
    slice is an ordinary LoRA weight pair. With `lora_b` at zero, as after construction, y equals
    base bit for bit.

    Args:
        num_experts: E, at least 1.
        r: Rank of one expert.
        in_features: Width of x.
        out_features: Width of base and y.
        lora_alpha: The scaling is lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora.
        lora_dropout: Probability of zeroing an element of x, in training.
        use_rslora: Rank-stabilised scaling (arXiv 2312.03732).

    Shapes:
        lora_a: (E * r, in_features), uniform in +-1/sqrt(in_features).
        lora_b: (out_features, E * r), zero.

    Raises:
        ValueError: A size below 1, or a dropout outside [0, 1).
    """

    def __init__(
        self,
        *,
        num_experts: int,
        r: int,
        in_features: int,
        out_features: int,
        lora_alpha: float,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
    ) -> None:
        super().__init__()
        self.num_experts = num_experts
        self.r = r
        self.scaling = lora_alpha / (math.sqrt(r) if use_rslora else r)
        self.dropout = nn.Dropout(lora_dropout) if lora_dropout else nn.Identity()
        self.lora_a = nn.Parameter(torch.empty(num_experts * r, in_features))
        self.lora_b = nn.Parameter(torch.empty(out_features, num_experts * r))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """LoRA's initialisation: A as in PEFT, B zero."""
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        nn.init.zeros_(self.lora_b)

    def forward(
        self, base: Tensor, x: Tensor, selected_experts: Tensor, routing_weights: Tensor
    ) -> Tensor:
        """Add the gated experts to the base output.

        Args:
            base: (T, out_features), what the frozen linear answered.
            x: (T, in_features), what it was asked; dropout is applied here.
            selected_experts: (T, K) int64, E marks an empty slot.
            routing_weights: (T, K).

        Returns:
            (T, out_features) in base's dtype.
        """
        lora_a = self.lora_a.unflatten(0, (self.num_experts, self.r))  # (E, R, I)
        lora_b = self.lora_b.unflatten(1, (self.num_experts, self.r))  # (O, E, R)
        return gated_lora(
            base, self.dropout(x), lora_a, lora_b, selected_experts, routing_weights, self.scaling
        )

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        out_features, in_features = self.lora_b.shape[0], self.lora_a.shape[1]
        return (
            f"num_experts={self.num_experts}, r={self.r}, in_features={in_features}, "
            f"out_features={out_features}, scaling={self.scaling:g}"
        )
