"""MixLoRA: LoRA experts over one shared, frozen feed-forward block, routed top-k per block.

    p   = softmax(W_g x)
    w   = p over the top-k experts, renormalised
    h_e = act(W1 x + D1_e x) * (W3 x + D3_e x),  D = scaling * B A
    y   = sum_k w_k (W2 h_{e_k} + D2_{e_k} h_{e_k})

Source: MixLoRA: Enhancing Large Language Models Fine-Tuning with LoRA-based Mixture of Experts, Li
et al., 2024, arXiv 2404.15159; read from the official code. Differences from the paper: attention
is left alone (the paper adds one ordinary LoRA to each attention projection); W2 runs once a token
on the mixed hidden activation, which is equal because the weights sum to 1; the balance loss is
averaged over blocks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from moeroute.layers.lora_ffn import LoRAFeedForwardMixture
from moeroute.methods.checks import check_lora_fields, check_top_k
from moeroute.methods.parts import balance_losses, lora_bank
from moeroute.routers.composed import ComposedRouter
from moeroute.routers.scores import LinearScore
from moeroute.routers.select import TopK
from moeroute.types import Paper, Site

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from moeroute.types import SiteKind


@dataclass(frozen=True, kw_only=True)
class MixLoRA:
    """Mixture of LoRA experts on every feed-forward block.

    Args:
        r: Rank of one expert. Default of the paper: 16.
        lora_alpha: Scaling is lora_alpha / r. Default of the paper: 32.
        lora_dropout: Dropout on the experts' input, in training.
        use_rslora: Scaling lora_alpha / sqrt(r) instead.
        num_experts: Experts per block.
        top_k: Slots per token. 1 <= top_k <= num_experts.
        router_aux_loss_coef: Weight of the Switch balance loss, 1.0 at perfect balance; 0 turns it
            off.

    Shapes:
        hidden_states: (..., H), any floating dtype; the router computes in float32.
        router_logits: (T, E) float32.
        routing_weights, selected_experts: (T, K); weights sum to 1 per token.

    Raises:
        ValueError: A field is out of range, or a site is no feed-forward block of linears.

    Cost: per token and slot, LoRA on three projections; the frozen block runs once. Adds
    E * r * (2 * (H + I) + (I + H)) + E * H parameters a gated block.
    Trains: router and experts. Inference: supported. Merging: undefined, the weights depend on the
        token.

    Example:
        >>> wrapped = moeroute.wrap_model(model, MixLoRA(r=8, num_experts=8, top_k=2))
    """

    paper: ClassVar[Paper] = Paper(
        title="MixLoRA: Enhancing Large Language Models Fine-Tuning with LoRA-based Mixture "
        "of Experts",
        arxiv="2404.15159",
        year=2024,
    )
    site_kind: ClassVar[SiteKind] = "mlp"

    r: int = 16
    lora_alpha: float = 32.0
    lora_dropout: float = 0.0
    use_rslora: bool = False
    num_experts: int = 8
    top_k: int = 2
    router_aux_loss_coef: float = 0.01

    def __post_init__(self) -> None:
        """Check every field."""
        check_lora_fields(self)
        check_top_k(self, self.top_k)

    def build_shared(self, sites: Sequence[Site], /) -> nn.Module | None:
        """Blocks share nothing."""
        return None

    def build(self, site: Site, shared: nn.Module | None, /) -> LoRAFeedForwardMixture:
        """One router and a bank for each projection of the block."""
        banks = {
            role: lora_bank(self, site.widths[role], self.num_experts)
            for role in ("gate", "up", "down")
            if role in site.parts
        }
        router = ComposedRouter(
            LinearScore(site.in_features, self.num_experts, init_std=0.02),
            TopK(self.top_k, normalize=True),
        )
        return LoRAFeedForwardMixture(
            router=router,
            banks=banks,
            parts=site.parts,
            losses=balance_losses(self.router_aux_loss_coef),
            site=site.name,
            layer_index=site.layer_index,
        )
