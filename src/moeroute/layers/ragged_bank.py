"""LoRA experts of different ranks and scalings over one linear."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from moeroute.ops.gates import expert_table, rank_gated_lora


class RaggedLoRABank(nn.Module):
    """E LoRA experts over one linear, each of its own rank, stored as one LoRA.

        y = base + sum_k w_k s_{e_k} B_{e_k} A_{e_k} x

    Expert e owns ranks[e] consecutive rows of `lora_a`, after those of the experts before it, and
    the same columns of `lora_b`; a rank of 0 is an expert that does nothing here. For experts of
    one rank `LoRABank` is faster where E * r is large.

    Args:
        ranks: Rank of each expert, 0 or more.
        scalings: What multiplies each expert.
        in_features: Width of x.
        out_features: Width of base and y.
        lora_dropout: Probability of zeroing an element of x, in training.
        trainable: Whether `lora_a` and `lora_b` are parameters; else they are buffers, which are
            saved and moved likewise but which no optimizer sees.
        anchored: Whether the bank remembers what `set_expert` gave it, for `drift`.

    Shapes:
        lora_a: (R, in_features) with R the sum of ranks, uniform in +-1/sqrt(in_features).
        lora_b: (out_features, R), zero.
        anchor_a, anchor_b: Buffers of the same shapes, empty unless anchored.

    Raises:
        ValueError: No expert, a negative rank, or as many scalings as there are no ranks.
    """

    lora_a: Tensor
    lora_b: Tensor
    anchor_a: Tensor
    anchor_b: Tensor
    expert_of_rank: Tensor
    scaling_of_rank: Tensor

    def __init__(
        self,
        *,
        ranks: Sequence[int],
        scalings: Sequence[float],
        in_features: int,
        out_features: int,
        lora_dropout: float = 0.0,
        trainable: bool = True,
        anchored: bool = False,
    ) -> None:
        super().__init__()
        if not ranks or min(ranks) < 0 or len(ranks) != len(scalings):
            raise ValueError(
                f"ranks={list(ranks)} and scalings={list(scalings)}: a bank takes one rank of 0 or "
                "more and one scaling for each of at least one expert"
            )
        self.ranks = tuple(ranks)
        self.num_experts = len(ranks)
        self.dropout = nn.Dropout(lora_dropout) if lora_dropout else nn.Identity()
        weights = {
            "lora_a": torch.empty(sum(ranks), in_features),
            "lora_b": torch.empty(out_features, sum(ranks)),
        }
        for name, weight in weights.items():
            if trainable:
                self.register_parameter(name, nn.Parameter(weight))
            else:
                self.register_buffer(name, weight)
        for name, weight in (("anchor_a", self.lora_a), ("anchor_b", self.lora_b)):
            anchor = torch.zeros_like(weight) if anchored else weight.new_empty(0)
            self.register_buffer(name, anchor, persistent=anchored)
        self.anchored = anchored
        counts = torch.tensor(self.ranks)
        expert = torch.arange(self.num_experts).repeat_interleave(counts)
        scaling = torch.tensor([float(value) for value in scalings])
        self.register_buffer("expert_of_rank", expert, persistent=False)
        self.register_buffer("scaling_of_rank", scaling[expert], persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """LoRA's initialisation: A as in PEFT, B zero."""
        if self.lora_a.numel():
            nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        nn.init.zeros_(self.lora_b)
        if self.anchored:
            self.anchor_a.copy_(self.lora_a.detach())
            self.anchor_b.zero_()

    def expert(self, index: int) -> slice:
        """Where an expert's ranks lie: rows of lora_a, columns of lora_b."""
        start = sum(self.ranks[:index])
        return slice(start, start + self.ranks[index])

    @torch.no_grad()
    def set_expert(self, index: int, lora_a: Tensor, lora_b: Tensor) -> None:
        """Give an expert its weights.

        Args:
            index: Of the expert.
            lora_a: (ranks[index], in_features).
            lora_b: (out_features, ranks[index]).
        """
        own = self.expert(index)
        self.lora_a[own].copy_(lora_a)
        self.lora_b[:, own].copy_(lora_b)
        if self.anchored:
            self.anchor_a[own].copy_(lora_a)
            self.anchor_b[:, own].copy_(lora_b)

    def drift(self) -> Tensor:
        """How far the experts are from what they were given: the sum of squares, a scalar."""
        assert self.anchored
        moved_a, moved_b = self.lora_a - self.anchor_a, self.lora_b - self.anchor_b
        return moved_a.square().sum() + moved_b.square().sum()

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
        table = expert_table(selected_experts, routing_weights, self.num_experts)  # (T, E)
        gates = table[:, self.expert_of_rank] * self.scaling_of_rank  # (T, R)
        return rank_gated_lora(base, self.dropout(x), self.lora_a, self.lora_b, gates)

    def extra_repr(self) -> str:
        """Sizes, for `print(model)`."""
        out_features, in_features = self.lora_b.shape[0], self.lora_a.shape[1]
        return f"ranks={self.ranks}, in_features={in_features}, out_features={out_features}"
