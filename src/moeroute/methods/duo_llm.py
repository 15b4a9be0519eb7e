"""Duo-LLM: each token takes a big feed-forward block, a small one or none, under a budget.

    P = softmax(kappa W_l u);  training: y = sum_x P_x FFN_x(u), FFN_bypass = 0
    evaluation: y = FFN_{argmax P}(u);  L = CE + alpha (mean of P_big - budget)^2, one mean over all

Source: Duo-LLM: A Framework for Studying Adaptive Computation in Large Language Models, 2024, arXiv
2410.10846. Differences from the paper: it trains a model from scratch with small and big blocks;
here the big ones are a checkpoint's, frozen, and the small ones are new and learn from them, by the
mean squared error. Our own reading: kappa, a temperature that is said to grow, multiplies; alpha is
1; where logits are equal the token takes the big block, so that a fresh method is the base. The
oracle is `moeroute.depth.search_routes`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from moeroute.layers.feed_forward import SwiGLUFeedForward
from moeroute.layers.width import WidthFeedForward
from moeroute.losses.budget import BudgetLoss
from moeroute.losses.distil import DistilLoss
from moeroute.methods.ffn_parts import check_width
from moeroute.ops.widths import Width
from moeroute.routers.composed import ComposedRouter
from moeroute.routers.scores import LinearScore
from moeroute.routers.step_schedule import StepSchedule
from moeroute.routers.width_choice import WidthChoice
from moeroute.types import Paper

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from moeroute.types import AuxLoss, Site, SiteKind

PAPERS_SHARE = 16


@dataclass(frozen=True, kw_only=True)
class DuoLLM:
    """A small twin and a router for every feed-forward block; attention always runs.

    Train in two stages, each begun by `moeroute.depth.train_only`: first "small", on text without
    labels, then "routers", with `moeroute.post_step(model)` after each optimizer step, so that
    kappa grows. After wrapping all learns. A fresh method equals the base in evaluation and, with a
    random_share of 0, in the first stage; while routers learn, a fresh one weighs all alike.

    Args:
        small_intermediate_size: Hidden units of a small block; None for a sixteenth of the big
            one's, as in the paper, at least 1.
        bypass: Whether a token may also take no block at all.
        budget: Share of pairs of token and layer that take the big block.
        budget_loss_coef: alpha.
        distil_loss_coef: Weight of the small blocks' error against the big ones' answers, charged
            while they learn; 0 turns it off.
        random_share: While small blocks learn alone, the share of pairs of token and layer, drawn
            anew, that take the small one. 0: they learn from the big ones beside the unmodified
            model. The paper's training from scratch: 0.5.
        sharpness_start: kappa at the first step.
        sharpness_end: kappa from the last step on.
        sharpness_steps: Optimizer steps of routers between them.

    Shapes:
        hidden_states: (..., H), any floating dtype; routed in float32.
        router_logits: (T, X) float32, X = 2 or 3: small, big, bypass.
        routing_weights, selected_experts: (T, X) in training, weights sum to 1; else (T, 1).

    Raises:
        ValueError: A field is out of range, or a block changes the width.

    Cost: one product with (X, H) a token and layer, and the block that it takes; training computes
        both. Adds H * (X + 3 I / 16) parameters and one number a layer.
    Trains: what `train_only` says, all after wrapping. Inference: supported, with every cache; it
        waits for the device at every block. Merging: undefined.

    Example:
        >>> wrapped = moeroute.wrap_model(model, DuoLLM(budget=0.5)).train()
        >>> moeroute.depth.train_only(wrapped, "small")
        >>> wrapped(input_ids=text).loss.backward()
        >>> moeroute.depth.train_only(wrapped, "routers")
        >>> wrapped(input_ids=text, labels=text).loss.backward()
    """

    paper: ClassVar[Paper] = Paper(
        title="Duo-LLM: A Framework for Studying Adaptive Computation in Large Language Models",
        arxiv="2410.10846",
        year=2024,
    )
    site_kind: ClassVar[SiteKind] = "mlp"

    small_intermediate_size: int | None = None
    bypass: bool = False
    budget: float = 0.5
    budget_loss_coef: float = 1.0
    distil_loss_coef: float = 1.0
    random_share: float = 0.0
    sharpness_start: float = 1.0
    sharpness_end: float = 10.0
    sharpness_steps: int = 2000

    def __post_init__(self) -> None:
        """Check every field."""
        if self.small_intermediate_size is not None and self.small_intermediate_size < 1:
            raise ValueError(f"DuoLLM: small_intermediate_size={self.small_intermediate_size} < 1")
        for name in ("budget_loss_coef", "distil_loss_coef", "sharpness_steps"):
            if getattr(self, name) < 0:
                raise ValueError(f"DuoLLM: {name}={getattr(self, name)} is below 0")
        for name in ("budget", "random_share"):
            if not 0.0 <= getattr(self, name) <= 1.0:
                raise ValueError(f"DuoLLM: {name}={getattr(self, name)} is outside [0, 1]")
        if not 0.0 < self.sharpness_start <= self.sharpness_end:
            raise ValueError(
                f"DuoLLM: sharpness_start={self.sharpness_start} must be above 0 and at most "
                f"sharpness_end={self.sharpness_end}, or training never comes near evaluation"
            )

    def build_shared(self, sites: Sequence[Site], /) -> nn.Module | None:
        """Blocks share nothing but the budget's loss, which is asked once for all."""
        return None

    def build(self, site: Site, shared: nn.Module | None, /) -> WidthFeedForward:
        """A small twin and a router for one block."""
        width = self.small_intermediate_size or max(1, site.widths["up"][1] // PAPERS_SHARE)
        hidden_size = check_width(site)
        return WidthFeedForward(
            router=self.router(hidden_size),
            small=SwiGLUFeedForward(hidden_size, width),
            random_share=self.random_share,
            small_losses=_charged(DistilLoss(weight=self.distil_loss_coef)),
            routing_losses=_charged(
                BudgetLoss(budget=self.budget, expert=Width.BIG, weight=self.budget_loss_coef)
            ),
            site=site.name,
            layer_index=site.layer_index,
        )

    def router(self, in_features: int) -> ComposedRouter:
        """A fresh router; all its logits are 0."""
        schedule = StepSchedule(
            start=self.sharpness_start, end=self.sharpness_end, steps=self.sharpness_steps
        )
        score = LinearScore(in_features, 3 if self.bypass else 2, init_std=0.0)
        return ComposedRouter(score, WidthChoice(schedule))


def _charged(loss: AuxLoss) -> tuple[AuxLoss, ...]:
    """The loss, if it weighs anything."""
    return (loss,) if loss.weight else ()
