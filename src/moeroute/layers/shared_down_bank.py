"""LoRA experts of one linear that share A and differ in B."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from moeroute.ops.gates import add_delta, expert_table


class SharedDownLoRABank(nn.Module):
    """One A, E heads B over one linear.

        y = base + scaling * sum_k w_k B_{e_k} A x

    Head e owns columns e*r to (e+1)*r of `lora_b`. With `lora_b` at zero, as after construction, y
    equals base bit for bit; all heads then see the same gradient but for the weights, so a router
    that gives every token the same weights would never tell them apart.

    Args:
        num_experts: E, at least 1.
        r: Rank of A and of each B.
        in_features: Width of x.
        out_features: Width of base and y.
        lora_alpha: The scaling is lora_alpha / r, or lora_alpha / sqrt(r) with use_rslora.
        lora_dropout: Probability of zeroing an element of x, in training.
        use_rslora: Rank-stabilised scaling (arXiv 2312.03732).

    Shapes:
        lora_a: (r, in_features), uniform in +-1/sqrt(in_features).
        lora_b: (out_features, E * r), zero.
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
        self.lora_a = nn.Parameter(torch.empty(r, in_features))
        self.lora_b = nn.Parameter(torch.empty(out_features, num_experts * r))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """LoRA's initialisation: A as in PEFT, B zero."""
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        nn.init.zeros_(self.lora_b)

    def forward(
        self, base: Tensor, x: Tensor, selected_experts: Tensor, routing_weights: Tensor
    ) -> Tensor:
        """Add the gated heads to the base output; arguments as in `LoRABank.forward`."""
        table = expert_table(selected_experts, routing_weights, self.num_experts) * self.scaling
        middle = functional.linear(self.dropout(x).to(self.lora_a.dtype), self.lora_a)  # (T, r)
        gated = table.to(middle.dtype).unsqueeze(2) * middle.unsqueeze(1)  # (T, E, r)
        return add_delta(base, functional.linear(gated.flatten(1), self.lora_b))

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        out_features, in_features = self.lora_b.shape[0], self.lora_a.shape[1]
        return (
            f"num_experts={self.num_experts}, r={self.r}, in_features={in_features}, "
            f"out_features={out_features}, scaling={self.scaling:g}"
        )
