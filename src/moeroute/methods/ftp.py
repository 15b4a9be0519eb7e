"""FTP: the least important tokens skip decoder layers, by four numbers a token.

    f  = (place in the prompt, attention received, its rank, the layer's sparsity s)
    z  = M2 relu(M1 f + c1) + c2;  h_t <- B(h)_t where z says "run", else h_t
    L  = CE(z, static rule) * (1 -> 0) + 10 mean over layers of (mean P(skip) - s)^2 + distillation

Source: FTP: A Fine-grained Token-wise Pruner for Large Language Models via Token Routing, 2024,
arXiv 2412.11494, of which the abstract alone was read: search of sparsities, a static router before
a trained one, four factors, three losses. Our own reading: which the factors are, and all formulas
and numbers. Attention received is softmax(q k) of the prompt's last queries in the last layer that
ran, a later token's what it attends to itself; its first layer and, for one number s, the last run
whole. A prompt's tokens are compared with each other, once; later ones each with the prompt.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from moeroute.layers.pruning_plan import PruningPlan
from moeroute.layers.token_pruning import TokenPruningLayer
from moeroute.losses.token_pruning import GuideLoss, SkipShareLoss
from moeroute.routers.least_important import LeastImportantRouter
from moeroute.routers.token_pruning import FactorRouter
from moeroute.types import Paper

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from moeroute.types import AuxLoss, Site, SiteKind


@dataclass(frozen=True, kw_only=True)
class FTP:
    """Routers of fewer than 150 parameters that choose which tokens run a decoder layer.

    They see no hidden state. A prompt is decided on the first call with a cache; without a cache
    every call decides it, from the first `prompt_lengths` tokens or, in their absence, from all
    before the labels or all there are: then the choice looks at later tokens. Skipped tokens keep
    giving their keys and values. `moeroute.depth.search_sparsity` finds a sparsity for each layer,
    `moeroute.depth.distillation_loss` is the third loss; a fresh learned router runs every token.

    Args:
        sparsity: The share of a prompt's tokens that a layer leaves out. One number for all layers
            but the first and the last, which run whole, or one for each layer.
        router: "learned", or "static" for a rule without parameters: the highest ranks run.
        num_queries: How many of a prompt's last queries are looked at.
        width: Of M1.
        temperature: Of the draws of training, which run all tokens.
        guide_steps: Optimizer steps, counted by `moeroute.post_step`, in which the guide fades.
        guide_loss_coef: Weight of the guide.
        sparsity_loss_coef: Weight of the distance from s.

    Shapes:
        hidden_states: (B, S, H), any floating dtype; the router computes in float32.
        num_executions: (B, S) int64 in {0, 1}.

    Raises:
        ValueError: A field is out of range; sparsities of another number of layers, or one above 0
            for the first, which has no attention before it; the model is no decoder, a layer keeps
            a state that cannot be skipped or has an attention that cannot be watched.

    Cost: num_queries queries against the keys a prompt and layer, one query a later token; the
        layer on the tokens that run, the keys and values of the others. Adds 7 width + 2 parameters
        a layer.
    Trains: the routers. Inference: supported, with every cache of full or sliding keys; assisted
        generation is refused. Merging: undefined.

    Example:
        >>> found = moeroute.depth.search_sparsity(model, batches, 0.3)
        >>> wrapped = moeroute.wrap_model(model, FTP(sparsity=found.sparsity)).train()
        >>> loss = moeroute.depth.distillation_loss(wrapped, input_ids=text)
        >>> (loss + moeroute.aux_losses(wrapped).total).backward()
    """

    paper: ClassVar[Paper] = Paper(
        title="FTP: A Fine-grained Token-wise Pruner for Large Language Models via Token Routing",
        arxiv="2412.11494",
        year=2024,
    )
    site_kind: ClassVar[SiteKind] = "decoder_layer"

    sparsity: float | tuple[float, ...] = 0.3
    router: Literal["learned", "static"] = "learned"
    num_queries: int = 8
    width: int = 16
    temperature: float = 1.0
    guide_steps: int = 1000
    guide_loss_coef: float = 1.0
    sparsity_loss_coef: float = 10.0

    def __post_init__(self) -> None:
        """Check every field."""
        if not isinstance(self.sparsity, int | float):  # JSON knows no tuples
            object.__setattr__(self, "sparsity", tuple(self.sparsity))
        if self.router not in ("learned", "static"):
            raise ValueError(f"FTP: router={self.router!r} is neither 'learned' nor 'static'")
        least = {"num_queries": 1, "guide_loss_coef": 0, "sparsity_loss_coef": 0}
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"FTP: {name}={getattr(self, name)} is below {low}")
        try:
            given = self.sparsity if isinstance(self.sparsity, tuple) else (self.sparsity,)
            for sparsity in given:
                self._router(sparsity)
        except ValueError as error:
            raise ValueError(f"FTP: {error}") from None

    def build_shared(self, sites: Sequence[Site], /) -> PruningPlan:
        """A sparsity for every site, and which of them is the last."""
        return PruningPlan.over(sites, self.sparsity)

    def build(self, site: Site, shared: nn.Module | None, /) -> TokenPruningLayer:
        """A router, and the losses that teach it."""
        if not isinstance(shared, PruningPlan):
            raise ValueError("FTP needs what build_shared made; pass it on")
        return TokenPruningLayer(
            router=self._router(shared.sparsities[site.name]),
            num_queries=0 if site.name == shared.last else self.num_queries,
            losses=self._losses() if self.router == "learned" else (),
            site=site.name,
            layer_index=site.layer_index,
        )

    def _router(self, sparsity: float) -> nn.Module:
        if self.router == "static":
            return LeastImportantRouter(sparsity=sparsity)
        return FactorRouter(
            sparsity=sparsity,
            width=self.width,
            temperature=self.temperature,
            guide_steps=self.guide_steps,
        )

    def _losses(self) -> tuple[AuxLoss, ...]:
        guide = GuideLoss(weight=self.guide_loss_coef) if self.guide_loss_coef else None
        share = SkipShareLoss(weight=self.sparsity_loss_coef) if self.sparsity_loss_coef else None
        return tuple(loss for loss in (guide, share) if loss is not None)
