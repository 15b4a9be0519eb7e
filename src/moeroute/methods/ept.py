"""EPT: a pyramid of experts, each a kernel of its own size over one shared low-rank matrix.

    p   = softmax(W_g x / 0.05);  w = p over the top-k experts, not renormalised
    W_e = (B[:h_e] A[:, :w_e]) (x) K_e,  K_e of size s_e by s_e, h_e s_e = out, w_e s_e = in
    y   = W0 x + scaling * sum_k w_k W_{e_k} x
    L   = task loss + 0.1 * InfoNCE(the sample's routing, its task's embedding)

Source: Expert Pyramid Tuning: Efficient Parameter Fine-Tuning for Expertise-Driven Task Allocation,
Zhang et al., 2026, arXiv 2603.12577; read from notes on the paper, its code could not be reached.
Our own reading: a constant scaling (the paper writes d_t / T, d_t being ambiguous); gates that sum
to less than 1; A and B normal with standard deviation 1 / sqrt(r); a linear whose widths a size
does not divide is padded with zeros and cropped; the contrast's feature, see `TaskContrastLoss`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from moeroute.layers.kronecker_bank import KroneckerBank
from moeroute.losses.task_contrast import TaskContrastLoss
from moeroute.methods.checks import check_adapter_fields, load_tasks
from moeroute.methods.parts import linear_mixture
from moeroute.ops.probs import SoftmaxAt
from moeroute.routers.composed import ComposedRouter
from moeroute.routers.scores import LinearScore
from moeroute.routers.select import TopK
from moeroute.routers.task_aware import TaskAwareRouter
from moeroute.types import Paper, Site

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from moeroute.layers.lora_mixture import LoRAMixture
    from moeroute.types import SiteKind

PYRAMID = (2, 2, 4, 4, 6, 6, 8, 8)


@dataclass(frozen=True, kw_only=True)
class EPT:
    """Kernels of several sizes over one shared low-rank matrix beside every targeted linear.

    Args:
        num_tasks: How many tasks there are; training asks for task_ids below it while contrast_coef
            is above 0. Inference never asks.
        task_names: Their names in the order of their ids, saved with the adapter; they then count
            the tasks.
        r: Rank of the shared matrix.
        scaling: Multiplies the experts' sum.
        lora_dropout: Dropout on the experts' input, in training.
        kernel_sizes: Size of each expert's kernel. Default of the paper: (2, 2, 4, 4, 6, 6, 8, 8).
        top_k: Slots per token.
        normalize: Divide a token's weights by their sum; without it they sum to less than 1.
        temperature: Of the router's softmax.
        contrast_coef: Weight of the contrastive loss, averaged over linears; 0 turns it off, and
            leaves the tasks' embeddings out.

    Shapes:
        hidden_states: (..., in_features), any floating dtype; the router computes in float32.
        router_logits: (T, E) float32.
        routing_weights, selected_experts: (T, K).

    Raises:
        ValueError: A field is out of range; in training with the contrast, no task_ids or one out
            of range.

    Cost: one LoRA of rank r * (sum of the different sizes) a linear, for few tokens less. Adds
        about r * (in + out) / min s + sum s^2 + E * in + num_tasks * E parameters a linear.
    Trains: router, shared matrix, kernels and the tasks' embeddings. Inference: supported, without
        task_ids. Merging: undefined, the weights depend on the token.

    Example:
        >>> wrapped = moeroute.wrap_model(model, EPT(num_tasks=3), target_modules=["q_proj"])
        >>> loss = wrapped(**batch, task_ids=torch.tensor([0, 2])).loss
    """

    paper: ClassVar[Paper] = Paper(
        title="Expert Pyramid Tuning: Efficient Parameter Fine-Tuning for Expertise-Driven Task "
        "Allocation",
        arxiv="2603.12577",
        year=2026,
    )
    site_kind: ClassVar[SiteKind] = "linear"

    num_tasks: int = 1
    task_names: tuple[str, ...] = ()
    r: int = 8
    scaling: float = 1.0
    lora_dropout: float = 0.0
    kernel_sizes: tuple[int, ...] = PYRAMID
    top_k: int = 2
    normalize: bool = False
    temperature: float = 0.05
    contrast_coef: float = 0.1

    def __post_init__(self) -> None:
        """Check every field."""
        object.__setattr__(self, "kernel_sizes", tuple(self.kernel_sizes))
        check_adapter_fields(self)
        load_tasks(self)
        sizes = self.kernel_sizes
        if not sizes or min(sizes) < 1:
            raise ValueError(f"EPT: kernel_sizes={sizes}; give one size of at least 1 an expert")
        if not 1 <= self.top_k <= len(sizes):
            raise ValueError(
                f"EPT: top_k={self.top_k} is outside 1..{len(sizes)}, the number of kernel_sizes"
            )
        if self.temperature <= 0.0:
            raise ValueError(f"EPT: temperature={self.temperature}; it divides, so set it above 0")
        if self.contrast_coef < 0.0:
            raise ValueError(
                f"EPT: contrast_coef={self.contrast_coef} would push tasks together; use 0 or more"
            )

    def build_shared(self, sites: Sequence[Site], /) -> nn.Module | None:
        """Linears share nothing."""
        return None

    def build(self, site: Site, shared: nn.Module | None, /) -> LoRAMixture:
        """One router and one bank for the linear."""
        score = LinearScore(site.in_features, len(self.kernel_sizes), init_std=0.02)
        probs = SoftmaxAt(self.temperature)
        router = ComposedRouter(score, TopK(self.top_k, probs=probs, normalize=self.normalize))
        bank = KroneckerBank(
            kernel_sizes=self.kernel_sizes,
            r=self.r,
            in_features=site.in_features,
            out_features=site.out_features,
            scaling=self.scaling,
            lora_dropout=self.lora_dropout,
        )
        if not self.contrast_coef:
            return linear_mixture(site, router, bank)
        losses = (TaskContrastLoss(weight=self.contrast_coef),)
        return linear_mixture(site, TaskAwareRouter(router, num_tasks=self.num_tasks), bank, losses)
