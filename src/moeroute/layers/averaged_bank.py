"""LoRA experts that are averaged before they are applied: one LoRA a sample, of the rank of one.

Axes: B samples, S tokens of a sample, E experts, h heads, r rank, I in, O out.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from moeroute.ops.gates import add_delta


class AveragedLoRABank(nn.Module):
    """E LoRA experts over one linear, mixed by the average of their matrices.

        A' = sum_e w_e A_e,  B' = sum_e w_e B_e,  y = base + scaling * B' A' x

    A and B are averaged separately, so y holds the cross terms w_e w_f B_e A_f too: it equals the
    mixture of the experts' outputs only where one expert has all the weight. With several heads,
    each slice of the input has weights of its own in A' and each slice of the output in B'.

    Args:
        num_experts: E, at least 1.
        r: Rank of one expert, and of the average.
        in_features: Width of x; heads divide it.
        out_features: Width of base and y; heads divide it.
        scaling: Multiplies the sum.
        heads: h.
        lora_dropout: Probability of zeroing an element of x, in training.

    Shapes:
        lora_a: (E * r, in_features), uniform in +-sqrt(h / in_features).
        lora_b: (out_features, E * r), zero.

    Raises:
        ValueError: heads do not divide a width.
    """

    def __init__(
        self,
        *,
        num_experts: int,
        r: int,
        in_features: int,
        out_features: int,
        scaling: float,
        heads: int = 1,
        lora_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if in_features % heads or out_features % heads:
            raise ValueError(
                f"heads={heads} do not divide a linear of {in_features} -> {out_features}; choose "
                "a number that divides both widths, or leave the linear out of target_modules"
            )
        self.num_experts = num_experts
        self.r = r
        self.heads = heads
        self.scaling = scaling
        self.dropout = nn.Dropout(lora_dropout) if lora_dropout else nn.Identity()
        self.lora_a = nn.Parameter(torch.empty(num_experts * r, in_features))
        self.lora_b = nn.Parameter(torch.empty(out_features, num_experts * r))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """A as in PEFT on the width of one head, B zero."""
        bound = math.sqrt(self.heads / self.lora_a.shape[1])
        nn.init.uniform_(self.lora_a, -bound, bound)
        nn.init.zeros_(self.lora_b)

    def average(self, weights: Tensor) -> tuple[Tensor, Tensor]:
        """The averaged matrices of each sample.

        Args:
            weights: (B, h, E).

        Returns:
            A' (B, r, I) and B' (B, O, r).
        """
        weights = weights.to(self.lora_a.dtype)
        experts = (self.num_experts, self.r)
        a = self.lora_a.unflatten(0, experts).unflatten(2, (self.heads, -1))  # (E, r, h, I / h)
        b = self.lora_b.unflatten(1, experts).unflatten(0, (self.heads, -1))  # (h, O / h, E, r)
        mean_a = torch.einsum("bhe,erhi->brhi", weights, a).flatten(2)
        return mean_a, torch.einsum("bhe,hoer->bhor", weights, b).flatten(1, 2)

    def forward(self, base: Tensor, x: Tensor, weights: Tensor) -> Tensor:
        """Add the average's answer to the base output.

        Args:
            base: (B, S, O), what the frozen linear answered.
            x: (B, S, I), what it was asked; dropout is applied here.
            weights: (B, h, E).

        Returns:
            (B, S, O) in base's dtype.
        """
        mean_a, mean_b = self.average(weights)
        middle = self.dropout(x).to(mean_a.dtype) @ mean_a.transpose(1, 2)
        return add_delta(base, self.scaling * (middle @ mean_b.transpose(1, 2)))

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        out_features, in_features = self.lora_b.shape[0], self.lora_a.shape[1]
        return (
            f"num_experts={self.num_experts}, r={self.r}, heads={self.heads}, "
            f"in_features={in_features}, out_features={out_features}, scaling={self.scaling:g}"
        )
