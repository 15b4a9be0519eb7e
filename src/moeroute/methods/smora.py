"""SMoRA: one LoRA, each of whose ranks is an expert.

    s   = sigmoid(W x) + b                     one score a block of rank_partition ranks
    g_j = top_k * s_j / sum of s over the top_k picked ranks, 0 for the others
    y   = W0 x + lora_alpha / top_k * B (g * (A x))
    b_j <- b_j + u * sign(mean(c) - c_j)       c = tokens of block j, once an optimizer step

Source: Each Rank Could be an Expert: Single-Ranked Mixture of Experts LoRA for Multi-Task Learning,
Zhao et al., 2025, arXiv 2501.15103; read from the official code. Differences from the code: b moves
once an optimizer step, by the picks of all accumulated batches and ranks without padding, not in
every forward; the router sees the input before dropout and starts normal, not uniform, with
`nn.Linear`'s standard deviation; blocks are chosen, not ranks, so that none is cut. A
rank-stabilised scaling and a bias for choosing only are our options.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from moeroute.layers.lora_bank import LoRABank
from moeroute.methods.checks import check_adapter_fields
from moeroute.methods.parts import linear_mixture
from moeroute.routers.composed import ComposedRouter
from moeroute.routers.scores import LinearScore
from moeroute.routers.selection_bias import SelectionBias
from moeroute.routers.sigmoid_top_k import SigmoidTopK
from moeroute.types import Paper, Site

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from moeroute.layers.lora_mixture import LoRAMixture
    from moeroute.types import SiteKind


@dataclass(frozen=True, kw_only=True)
class SMoRA:
    """One LoRA beside every targeted linear, of whose ranks each token picks some.

    Call `moeroute.post_step(model)` after every `optimizer.step()`, or add
    `moeroute.PostStepCallback()` to Trainer's callbacks: nothing else balances the ranks.

    Args:
        r: Rank of the whole LoRA. Default of the paper: 64.
        top_k: Ranks that a token picks. Default of the paper: 8.
        rank_partition: Ranks that share one score; divides r and top_k. Default of the paper: 1.
        lora_alpha: Scaling is lora_alpha / top_k. Default of the paper: 16.
        lora_dropout: Dropout on the LoRA's input, in training.
        use_rslora: Scaling lora_alpha / sqrt(top_k) instead.
        bias_in_gate: Whether b is part of the gates, as in the paper's code, or of the choice only.
        bias_update_rate: u, in units of score. Default of the paper: 1e-5; 0 keeps b at zero.

    Shapes:
        hidden_states: (..., in_features), any floating dtype; the router computes in float32.
        router_logits: (T, E) float32, E = r / rank_partition blocks.
        routing_weights, selected_experts: (T, K), K = top_k / rank_partition; weights sum to K.

    Raises:
        ValueError: A field is out of range, a block would be cut, or one block alone is picked of
            several: its gate is always 1, so that the router would never learn.

    Cost: one LoRA of rank r a linear. Adds r * (in + out) + r / rank_partition * in parameters and
        a buffer of r / rank_partition numbers a linear.
    Trains: router and ranks; the bias moves without a gradient. Inference: supported, with the bias
        as it is. Merging: undefined, the gates depend on the token.

    Example:
        >>> method = SMoRA(r=32, top_k=8)
        >>> wrapped = moeroute.wrap_model(model, method, target_modules="all-linear")
    """

    paper: ClassVar[Paper] = Paper(
        title="Each Rank Could be an Expert: Single-Ranked Mixture of Experts LoRA for Multi-Task "
        "Learning",
        arxiv="2501.15103",
        year=2025,
    )
    site_kind: ClassVar[SiteKind] = "linear"

    r: int = 64
    top_k: int = 8
    rank_partition: int = 1
    lora_alpha: float = 16.0
    lora_dropout: float = 0.0
    use_rslora: bool = False
    bias_in_gate: bool = True
    bias_update_rate: float = 1e-5

    def __post_init__(self) -> None:
        """Check every field."""
        check_adapter_fields(self)
        if not 1 <= self.top_k <= self.r:
            raise ValueError(
                f"SMoRA: top_k={self.top_k} is outside 1..{self.r} (r={self.r}); lower top_k or "
                "raise r"
            )
        size = self.rank_partition
        if size < 1 or self.r % size or self.top_k % size:
            raise ValueError(
                f"SMoRA: rank_partition={size} does not divide r={self.r} and top_k={self.top_k}; "
                "a block of ranks is picked as a whole"
            )
        if self.top_k == size < self.r:
            raise ValueError(
                f"SMoRA: top_k={self.top_k} picks one block of {size} ranks, whose gate is always "
                "1, so that the router would get no gradient; raise top_k"
            )
        if self.bias_update_rate < 0.0:
            raise ValueError(
                f"SMoRA: bias_update_rate={self.bias_update_rate} would reward imbalance; use 0 or "
                "more"
            )

    def build_shared(self, sites: Sequence[Site], /) -> nn.Module | None:
        """Linears share nothing."""
        return None

    def build(self, site: Site, shared: nn.Module | None, /) -> LoRAMixture:
        """One router and one LoRA for the linear."""
        size = self.rank_partition
        blocks = self.r // size
        active = math.sqrt(self.top_k) if self.use_rslora else self.top_k
        score = LinearScore(site.in_features, blocks, init_std=(3 * site.in_features) ** -0.5)
        bias = SelectionBias(blocks, update_rate=self.bias_update_rate)
        select = SigmoidTopK(
            self.top_k // size, selection_bias=bias, bias_in_gate=self.bias_in_gate
        )
        bank = LoRABank(
            num_experts=blocks,
            r=size,
            in_features=site.in_features,
            out_features=site.out_features,
            lora_alpha=self.lora_alpha * size / active,
            lora_dropout=self.lora_dropout,
        )
        return linear_mixture(site, ComposedRouter(score, select), bank)
