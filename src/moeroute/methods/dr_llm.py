"""Dr.LLM: a small router on every decoder layer reads the prompt and skips, runs or repeats it.

    m_w    = mean of the w-th of 8 windows of the prompt's hidden states before the layer
    logits = mean_w W2 gelu(W1 m_w + b1) + b2,  n = argmax in {0, 1, 2}
    h      = h, B(h) or B(B(h))
    loss   = focal loss of the logits against n found by search, classes by effective number

Source: Dr.LLM: Dynamic Layer Routing in LLMs, 2025, arXiv 2510.12773; read with the official code.
Where they differ the paper holds: the decision is taken once from the prompt (the code decides anew
at every token), and each sequence of a batch takes its own (in the code the first takes it for
all). Differences from the paper: padding is no part of a window; a repeated layer has keys of its
own for each of its runs; prompts end before the first label, or where `prompt_lengths` says.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from moeroute.layers.depth import DepthLayer
from moeroute.losses.depth_focal import DepthFocalLoss
from moeroute.routers.prompt_windows import PURE_ROUTER, PromptWindowRouter
from moeroute.types import Paper, Site

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch import nn

    from moeroute.types import SiteKind


@dataclass(frozen=True, kw_only=True)
class DrLLM:
    """Routers that choose for each prompt how often each decoder layer runs.

    Train with `depth_labels`, the actions that a search found for each prompt: the labelled actions
    are executed and the routers learn to predict them. The model is frozen and needs no labels of
    its own; without them the routers' loss is the output's loss. Routers that nobody trained choose
    at random.

    Args:
        bottleneck: Width between a router's two linears. Default of the paper: 128.
        num_windows: Windows that a prompt is cut into. Default of the paper: 8.
        gamma: Power of the focal factor. Default of the paper: 2.
        beta: Of the effective number of labels. Default of the paper: 0.999.
        class_counts: How often skip, run and repeat stand in the training labels, as
            `moeroute.ops.layer_paths.count_actions` counts them. Default: those of the paper's
            labels.
        router_penalty: In [-1, 1], saves or spends layers: -1 skips all, -0.5 asks the routers
            alone, 0.5 runs all once, 1 repeats all; between them it blends.

    Shapes:
        hidden_states: (B, S, H), any floating dtype; the router computes in float32.
        router_logits: (B, 3) float32.
        num_executions: (B,) int64 in {0, 1, 2}.

    Raises:
        ValueError: A field is out of range; the model is no decoder, or a layer keeps a state that
            cannot be skipped; labels of another number of layers; a sequence without real tokens.

    Cost: one mean over the prompt and two thin linears a layer and generation. Adds
    128 H + 128 + 3 * 128 + 3 parameters a layer.
    Trains: the routers, on labels alone. Inference: supported, with every cache of full or sliding
        keys; assisted generation is refused. Merging: undefined.

    Example:
        >>> wrapped = moeroute.wrap_model(model, DrLLM())
        >>> wrapped.train()(input_ids=prompts, depth_labels=labels).loss.backward()
    """

    paper: ClassVar[Paper] = Paper(
        title="Dr.LLM: Dynamic Layer Routing in LLMs", arxiv="2510.12773", year=2025
    )
    site_kind: ClassVar[SiteKind] = "decoder_layer"

    bottleneck: int = 128
    num_windows: int = 8
    gamma: float = 2.0
    beta: float = 0.999
    class_counts: tuple[int, ...] = (4399, 120956, 1457)
    router_penalty: float = PURE_ROUTER

    def __post_init__(self) -> None:
        """Check every field."""
        object.__setattr__(self, "class_counts", tuple(self.class_counts))  # JSON knows no tuples
        for name in ("bottleneck", "num_windows"):
            if getattr(self, name) < 1:
                raise ValueError(f"DrLLM: {name}={getattr(self, name)} is below 1")
        if not -1.0 <= self.router_penalty <= 1.0:
            raise ValueError(f"DrLLM: router_penalty={self.router_penalty} is outside [-1, 1]")
        self._loss()

    def build_shared(self, sites: Sequence[Site], /) -> nn.Module | None:
        """Layers share nothing."""
        return None

    def build(self, site: Site, shared: nn.Module | None, /) -> DepthLayer:
        """One router, and the loss that teaches it."""
        router = PromptWindowRouter(
            site.in_features,
            bottleneck=self.bottleneck,
            num_windows=self.num_windows,
            num_actions=len(self.class_counts),
            penalty=self.router_penalty,
        )
        return DepthLayer(
            router=router,
            losses=(self._loss(),),
            site=site.name,
            layer_index=site.layer_index,
            num_layers=site.num_layers,
        )

    def _loss(self) -> DepthFocalLoss:
        return DepthFocalLoss(class_counts=self.class_counts, gamma=self.gamma, beta=self.beta)
