"""Experts of one linear that are Kronecker products of a shared matrix and small kernels.

Axes: T tokens, K slots per token, E experts, R rank, I in, O out, s kernel size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moeroute.ops.gates import add_delta, expert_table
from moeroute.ops.kronecker import gated_kronecker


class KroneckerBank(nn.Module):
    """E experts W_e = (B[:h_e] A[:, :w_e]) (x) K_e over one linear, with K_e of size s_e by s_e.

        y = base + scaling * sum_k w_k W_{e_k} x

    h_e = ceil(O / s_e) and w_e = ceil(I / s_e); where s_e does not divide a width, x is padded with
    zeros and the output cropped. This is the transposed convolution of the shared matrix with
    kernel K_e and stride s_e. W_e is never made, and experts of one size share their work: the cost
    grows with the number of different sizes, not with the number of experts (see
    `ops.kronecker.gated_kronecker`). With the kernels at zero, as after construction, y equals base
    bit for bit.

    Args:
        kernel_sizes: s of each expert, at least 1.
        r: R, the rank of the shared matrix; W_e has rank R * rank(K_e) at most.
        in_features: I.
        out_features: O.
        scaling: Multiplies the sum.
        lora_dropout: Probability of zeroing an element of x, in training.

    Shapes:
        meta_a: (R, ceil(I / min s)); meta_b: (ceil(O / min s), R); both normal with standard
            deviation 1 / sqrt(R).
        kernels: by size s, (experts of that size, s, s), zero, in the order of kernel_sizes.

    Raises:
        ValueError: No expert, or a size below 1.

    Cost: about one LoRA of rank R * (sum of the different sizes) for many tokens, R * (number of
        different sizes) for few.
    """

    experts_by_size: Tensor

    def __init__(
        self,
        *,
        kernel_sizes: Sequence[int],
        r: int,
        in_features: int,
        out_features: int,
        scaling: float = 1.0,
        lora_dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if not kernel_sizes or min(kernel_sizes) < 1:
            raise ValueError(
                f"kernel_sizes={tuple(kernel_sizes)}: give one size of at least 1 an expert"
            )
        self.kernel_sizes = tuple(kernel_sizes)
        self.num_experts = len(self.kernel_sizes)
        self.in_features = in_features
        self.out_features = out_features
        self.scaling = scaling
        self.dropout = nn.Dropout(lora_dropout) if lora_dropout else nn.Identity()
        smallest = min(self.kernel_sizes)
        self.meta_a = nn.Parameter(torch.empty(r, math.ceil(in_features / smallest)))
        self.meta_b = nn.Parameter(torch.empty(math.ceil(out_features / smallest), r))
        sizes = sorted(set(self.kernel_sizes))
        self.kernels = nn.ParameterDict(
            {str(s): torch.empty(self.kernel_sizes.count(s), s, s) for s in sizes}
        )
        order = sorted(range(self.num_experts), key=lambda expert: self.kernel_sizes[expert])
        self.register_buffer("experts_by_size", torch.tensor(order), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Shared matrices normal, kernels zero."""
        for meta in (self.meta_a, self.meta_b):
            nn.init.normal_(meta, std=self.meta_a.shape[0] ** -0.5)
        for kernels in self.kernels.values():
            nn.init.zeros_(kernels)

    def forward(
        self, base: Tensor, x: Tensor, selected_experts: Tensor, routing_weights: Tensor
    ) -> Tensor:
        """Add the gated experts to the base output.

        Args:
            base: (T, O), what the frozen linear answered.
            x: (T, I), what it was asked; dropout is applied here.
            selected_experts: (T, K) int64, E marks an empty slot.
            routing_weights: (T, K).

        Returns:
            (T, O) in base's dtype.
        """
        table = expert_table(selected_experts, routing_weights, self.num_experts) * self.scaling
        x, table = self.dropout(x).to(self.meta_a.dtype), table.to(self.meta_a.dtype)
        kernels = list(self.kernels.values())
        gates = table[:, self.experts_by_size].split([len(stack) for stack in kernels], dim=1)
        delta = gated_kronecker(x, self.meta_a, self.meta_b, kernels, gates, self.out_features)
        return add_delta(base, delta)

    @torch.no_grad()
    def expert_weight(self, index: int) -> Tensor:
        """What one expert would add to the linear's weight at gate 1: (O, I), made in full."""
        size = self.kernel_sizes[index]
        columns, rows = math.ceil(self.in_features / size), math.ceil(self.out_features / size)
        kernel = self.kernels[str(size)][self.kernel_sizes[:index].count(size)]
        meta = self.meta_b[:rows] @ self.meta_a[:, :columns]
        weight = torch.kron(meta, kernel)[: self.out_features, : self.in_features]
        return weight * self.scaling

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        return (
            f"kernel_sizes={self.kernel_sizes}, r={self.meta_a.shape[0]}, "
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"scaling={self.scaling:g}"
        )
