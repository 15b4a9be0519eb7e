"""What one layer routed: sums on the device, and what is derived from them.

Axes: T tokens, K slots per token, E experts.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from moeroute.ops.load import (
    co_activation,
    coefficient_of_variation,
    dead_experts,
    load_entropy,
    max_violation,
    tokens_per_expert,
)

if TYPE_CHECKING:
    from moeroute.integration.coupling import CouplingGauge


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LayerStats:
    """The routing of one layer over all tokens seen; tensors are on the CPU.

    Attributes:
        name: Full module name of the layer.
        layer_index: Position in depth, -1 if the name holds none.
        tokens: Tokens routed, padding left out.
        counts: (E,) int64, filled slots of each expert.
        load: (E,) float32, each expert's share, sums to 1: of the slots, or of the routing weight
            where the layer is `soft`.
        mean_weight: (E,) float32, mean routing weight over the slots of each expert, 0 where it has
            none.
        entropy: Entropy of `load` as a fraction of its maximum, 1 at perfect balance.
        cv: Standard deviation of `load` divided by its mean, 0 at perfect balance.
        max_violation: Largest load divided by the mean load, minus 1; 0 at perfect balance.
        dead_experts: Ids of the experts that no token chose.
        coactivation: (E, E) int64, tokens that chose both experts of a pair; None if not counted.
        soft: True if every token took every expert, so that slots say nothing about balance.
        gauge: How specialised router and experts are, where `track_routing` was asked for it and
            the layer can be read.
        executions: How often a decoder layer ran, mean over tokens, where depth is routed: its
            "experts" are then actions, 0 to skip, 1 to run, 2 to run twice. None elsewhere.
        layer_share: The part of a decoder layer that this is: 0.5 for one of its two units, where
            depth is routed by unit.
        expert_names: What its experts are called, by id; empty where they are but numbers.
    """

    name: str
    layer_index: int
    tokens: int
    counts: Tensor
    load: Tensor
    mean_weight: Tensor
    entropy: float
    cv: float
    max_violation: float
    dead_experts: tuple[int, ...]
    coactivation: Tensor | None
    soft: bool
    gauge: CouplingGauge | None = None
    executions: float | None = None
    layer_share: float = 1.0
    expert_names: tuple[str, ...] = ()

    @property
    def num_experts(self) -> int:
        """E."""
        return self.counts.shape[0]

    @property
    def slots_per_token(self) -> float:
        """Mean number of filled slots a token: K, or less where slots stay empty."""
        return int(self.counts.sum()) / self.tokens if self.tokens else 0.0

    def to_dict(self) -> dict[str, Any]:
        """The same as plain data."""
        return {
            "name": self.name,
            "layer_index": self.layer_index,
            "num_experts": self.num_experts,
            "tokens": self.tokens,
            "slots_per_token": self.slots_per_token,
            "counts": self.counts.tolist(),
            "load": self.load.tolist(),
            "mean_weight": self.mean_weight.tolist(),
            "entropy": self.entropy,
            "cv": self.cv,
            "max_violation": self.max_violation,
            "dead_experts": list(self.dead_experts),
            "coactivation": None if self.coactivation is None else self.coactivation.tolist(),
            "soft": self.soft,
            "gauge": None if self.gauge is None else asdict(self.gauge),
            "executions": self.executions,
            "layer_share": self.layer_share,
            "expert_names": list(self.expert_names),
        }


class LayerTally:
    """Running sums of one layer; nothing here waits for the device.

    Args:
        num_experts: E.
        device: Where the sums live.
        coactivation: Whether to count pairs, an (E, E) table.
    """

    def __init__(self, num_experts: int, device: torch.device, *, coactivation: bool) -> None:
        exact = torch.float32 if device.type == "mps" else torch.float64
        self.counts = torch.zeros(num_experts, dtype=torch.int64, device=device)
        self.weights = torch.zeros(num_experts, dtype=exact, device=device)
        self.tokens = torch.zeros((), dtype=torch.int64, device=device)
        self.pairs = torch.zeros_like(self.counts).repeat(num_experts, 1) if coactivation else None

    def add(self, ids: Tensor, weights: Tensor, token_mask: Tensor | None) -> None:
        """Add (T, K) ids and weights of tokens, those where the (T,) mask is False left out."""
        size = self.counts.shape[0]
        ids, weights = ids.to(self.counts.device), weights.to(self.counts.device)
        if token_mask is not None:
            token_mask = token_mask.to(self.counts.device)
        self.counts += tokens_per_expert(ids, size, token_mask)
        if self.pairs is not None:
            self.pairs += co_activation(ids, size, token_mask)
        filled = (ids >= 0) & (ids < size)
        if token_mask is not None:
            filled = filled & token_mask[:, None]
        amounts = torch.where(filled, weights.abs().to(self.weights.dtype), 0.0).reshape(-1)
        groups = torch.where(filled, ids, size).reshape(-1).to(torch.int64)
        self.weights += (
            torch.zeros_like(self.weights[:1])
            .repeat(size + 1)
            .scatter_add(0, groups, amounts)[:size]
        )
        self.tokens += ids.shape[0] if token_mask is None else token_mask.sum()

    def sums(self) -> tuple[Tensor, ...]:
        """The tensors that add up over processes."""
        return (self.counts, self.weights, self.tokens)

    def read(self, name: str) -> LayerStats:
        """Fetch the sums and derive the rest; waits for the device."""
        counts, weights, tokens = self.counts.cpu(), self.weights.cpu(), int(self.tokens)
        soft = counts.shape[0] > 1 and tokens > 0 and bool((counts == tokens).all())
        usage = weights if soft else counts
        return LayerStats(
            name=name,
            layer_index=layer_index(name),
            tokens=tokens,
            counts=counts,
            load=(usage / usage.sum().clamp(min=torch.finfo(torch.float32).tiny)).float(),
            mean_weight=(weights / counts.clamp(min=1)).float(),
            entropy=load_entropy(usage).item(),
            cv=coefficient_of_variation(usage).item(),
            max_violation=max_violation(usage).item(),
            dead_experts=tuple(dead_experts(counts).nonzero().flatten().tolist()) if tokens else (),
            coactivation=None if self.pairs is None else self.pairs.cpu(),
            soft=soft,
        )


def layer_index(name: str) -> int:
    """The first number that stands alone in a dotted name, -1 if there is none."""
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return int(found.group(1)) if found else -1
