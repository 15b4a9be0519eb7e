"""X-LoRA: existing LoRA adapters, scaled token by token by a head that has read the whole model.

    first pass:  h = last hidden states of the model without adapters
    scalings:    w = softmax(MLP(h) / temperature)
    second pass: y = W0 x + sum_e w_e s_e B_e A_e x at every linear

Source: X-LoRA: Mixture of Low-Rank Adapter Experts, Buehler and Buehler, 2024, arXiv 2402.07148;
read from the code in PEFT. Differences from that code: the first pass has a key-value cache of its
own, which lives in the caller's; it leaves the output embedding out; a top-k leaves E - k experts
out of the routing instead of zeroing them, and one that renormalises counts a logit of 0 like any
other; the head computes in float32. An adapter without LoRA at a linear keeps its share there, so
that one scaling holds for the whole adapter. One row of scalings a sample is our own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from moeroute.methods.existing import (
    LoRAExpert,
    check_sites,
    check_slots,
    expert_bank,
    load_experts,
)
from moeroute.methods.parts import linear_mixture
from moeroute.ops.probs import raw_logits, softmax_probs
from moeroute.routers.composed import ComposedRouter
from moeroute.routers.first_pass import MLP, EqualInFirstPass, FirstPassHead
from moeroute.routers.select import TopK
from moeroute.types import Paper

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from moeroute.layers.lora_mixture import LoRAMixture
    from moeroute.types import Site, SiteKind


@dataclass(frozen=True, kw_only=True)
class XLoRA:
    """Existing LoRA adapters, scaled by a head that reads a first pass of the model.

    Args:
        top_k: Adapters per token, the best of the scalings; None, the default, takes all.
        normalize_top_k: Divide the chosen scalings by their sum.
        softmax: Else the head's outputs are the scalings.
        temperature: Divides the head's outputs.
        layerwise: Scalings of its own for every linear, instead of one row for all.
        per_sample: One row of scalings a sample, from the mean of its tokens; text that is
            generated keeps its prompt's and costs one pass a token.
        head_depth: Linears of the head; of more than one it is an MLP with, between them,
        head_width, head_dropout: numbers, and the share of them zeroed in training.
        first_pass_weight: Scaling of every adapter in the first pass.
        global_weight: Multiplies all scalings.
        train_adapters: Train the adapters with the head.
        sites, experts: Filled in by `moeroute.mix_adapters`.

    Shapes:
        hidden_states: (..., in_features), any floating dtype; the head computes in float32.
        router_logits: (T, E) float32, the head's outputs over the temperature.
        routing_weights, selected_experts: (T, E), or (T, K) with top_k; highest first.

    Raises:
        ValueError: A field is out of range, there are no adapters to mix, or the model does not
            end in one state a token; in forward, a part of the model was called without the whole,
            or the cache holds tokens that no first pass saw.

    Cost: two passes of the backbone, one without gradients, and two caches; one LoRA of the
        adapters' joint rank a linear. Adds a head of E outputs, E a linear where layerwise.
    Trains: the head; the adapters are frozen unless train_adapters. Inference: supported. Merging:
        undefined, the weights depend on the token.

    Example:
        >>> paths = {"math": "adapters/math", "code": "adapters/code"}
        >>> mixed = moeroute.mix_adapters(model, paths, router=XLoRA(layerwise=True))
        >>> mixed.train()(**batch).loss.backward()
    """

    paper: ClassVar[Paper] = Paper(
        title="X-LoRA: Mixture of Low-Rank Adapter Experts, a Flexible Framework for Large "
        "Language Models with Applications in Protein Mechanics and Molecular Design",
        arxiv="2402.07148",
        year=2024,
    )
    site_kind: ClassVar[SiteKind] = "linear"

    top_k: int | None = None
    normalize_top_k: bool = False
    softmax: bool = True
    temperature: float = 1.0
    layerwise: bool = False
    per_sample: bool = False
    head_depth: int = 1
    head_width: int = 2048
    head_dropout: float = 0.2
    first_pass_weight: float = 0.0
    global_weight: float = 1.0
    train_adapters: bool = False
    sites: tuple[str, ...] = ()
    experts: tuple[LoRAExpert, ...] = ()

    def __post_init__(self) -> None:
        """Check every field."""
        load_experts(self)
        check_slots(self, 1 if self.top_k is None else self.top_k)
        if self.temperature <= 0:
            raise ValueError(f"XLoRA: temperature={self.temperature} is not above 0")
        if min(self.head_depth, self.head_width) < 1 or not 0 <= self.head_dropout < 1:
            sizes = f"depth={self.head_depth}, width={self.head_width}, dropout={self.head_dropout}"
            raise ValueError(f"XLoRA: head of {sizes}: at least 1, at least 1, in [0, 1)")
        if self.normalize_top_k and not (self.softmax and (self.top_k or 0) > 1):
            raise ValueError("XLoRA: normalize_top_k needs a top_k of 2 or more and softmax=True")

    def build_shared(self, sites: Sequence[Site], /) -> nn.Module | None:
        """The head of all linears."""
        check_sites(self, sites)
        if not sites[0].hidden_size:
            raise ValueError("XLoRA: the model's config tells no hidden_size; its head needs one")
        mlp = MLP(
            sites[0].hidden_size,
            len(self.experts) * (len(sites) if self.layerwise else 1),
            depth=self.head_depth,
            width=self.head_width,
            dropout=self.head_dropout,
        )
        return FirstPassHead(
            mlp,
            len(self.experts),
            [site.name for site in sites],
            temperature=self.temperature,
            per_sample=self.per_sample,
            first_weight=self.first_pass_weight,
        )

    def build(self, site: Site, shared: nn.Module | None, /) -> LoRAMixture:
        """A bank of the adapters, and a router that is told the scalings."""
        assert isinstance(shared, FirstPassHead)
        bank = expert_bank(self, site, trainable=self.train_adapters)
        select = TopK(
            min(self.top_k or bank.num_experts, bank.num_experts),
            probs=softmax_probs if self.softmax else raw_logits,
            normalize=self.normalize_top_k,
            routed_scaling_factor=self.global_weight,
        )
        router = ComposedRouter(shared.score(site.name), select)
        return linear_mixture(site, EqualInFirstPass(router, self.first_pass_weight), bank)
