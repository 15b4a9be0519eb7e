"""Every loss of `moeroute.losses`, what it is at perfect balance and what it looks at."""

import math
from dataclasses import dataclass, replace

import torch
from torch import nn

from moeroute import losses
from moeroute.layers import MLPExperts
from moeroute.outputs import ContrastOutput, ThresholdOutput
from moeroute.routers import ComposedRouter, LinearScore, TopK
from moeroute.types import RoutingRecord

SAMPLES, LENGTH, EXPERTS, WIDTH = 4, 6, 6, 8
TOKENS = SAMPLES * LENGTH


@dataclass(frozen=True)
class LossCase:
    """One loss.

    Attributes:
        fields: Arguments that it must be given.
        at_balance: Its value where all experts are equal and used the same.
        reads: "logits", "weights" (which pass through the selection) or "parameters".
        ordered: Whether the order of a sample's tokens, and which sample they are of, matters.
        least: Its lower bound.
    """

    at_balance: float
    reads: str = "logits"
    ordered: bool = False
    least: float = 0.0
    fields: tuple[tuple[str, object], ...] = ()


EVEN = math.log(2)
CASES = {
    "ActiveWeightLoss": LossCase(2 / EXPERTS, "weights"),
    "AnchorLoss": LossCase(1 - 1 / EXPERTS, fields=(("experts", (2,)),)),
    "BalanceLoss": LossCase(1.0),
    "BudgetLoss": LossCase((1 / EXPERTS / 3 - 0.5) ** 2, "weights"),
    "ChunkSparsityLoss": LossCase(0.75, ordered=True, least=-1e-3, fields=(("chunk_size", 6),)),
    "ERCLoss": LossCase(0.0, "parameters", fields=(("noise", False),)),
    "EntropyLoss": LossCase(1.0),
    "GlobalBalanceLoss": LossCase(1.0),
    "ImportanceLoss": LossCase(0.0, "weights"),
    "KindsBalanceLoss": LossCase(1.0, fields=(("num_first", EXPERTS),)),
    "LocalityLoss": LossCase(EVEN, ordered=True),
    "LocalizedBalanceLoss": LossCase(0.0, "weights", ordered=True, fields=(("delta", 0.0),)),
    "OrthogonalityLoss": LossCase(0.0, "parameters"),
    "PreserveLoss": LossCase(0.0, "parameters"),
    "RenyiLoss": LossCase(1.0),
    "SamePairLoss": LossCase(EVEN, ordered=True),
    "SequenceBalanceLoss": LossCase(1.0, ordered=True),
    "SoftBalanceLoss": LossCase(1.0),
    "TaskContrastLoss": LossCase(math.log(2), ordered=True),
    "ThresholdBalanceLoss": LossCase(float(EXPERTS), least=-math.inf),
    "VarianceLoss": LossCase(1.0),
    "WeightBalanceLoss": LossCase(2 / EXPERTS, "weights"),
    "ZLoss": LossCase(math.log(EXPERTS) ** 2),
}


def make(name: str, **changed: object):
    """A loss with the fields of its case."""
    return getattr(losses, name)(**{**dict(CASES[name].fields), **changed})


class Rich(nn.Module):
    """A router with everything that some loss reads."""

    def __init__(self) -> None:
        super().__init__()
        self.score = LinearScore(WIDTH, EXPERTS)
        with torch.no_grad():
            self.score.weight.copy_(torch.eye(EXPERTS, WIDTH))
        self.bilinear = nn.Parameter(torch.eye(EXPERTS))
        self.task_embeddings = nn.Parameter(torch.eye(2, EXPERTS))
        self.register_buffer("coefficient", torch.tensor(1.0))
        self.slots = 2.0


class RichExperts(MLPExperts):
    """Experts that each answer to their own row of the router alone, and know what they were."""

    def __init__(self) -> None:
        super().__init__(EXPERTS, WIDTH, WIDTH)
        rows = torch.eye(EXPERTS, WIDTH)
        with torch.no_grad():
            self.up_proj.copy_(rows[:, None].expand(-1, WIDTH, -1))
        self.start = self.up_proj.detach().clone()

    def drift(self) -> torch.Tensor:
        """As experts that exist already measure it."""
        return (self.up_proj - self.start).square().sum()


def record(logits, mask=None, select=None, parts=None, pairs=False) -> RoutingRecord:  # noqa: FBT002
    """What a layer of (T, E) logits did; two tasks, four samples where the tokens allow it."""
    router, experts = parts or (Rich(), RichExperts())
    select = select or TopK(2, normalize=False)
    selection = select(logits)
    shape = (SAMPLES, LENGTH) if len(logits) == TOKENS else (1, len(logits))
    known = torch.ones(len(logits), dtype=torch.bool) if mask is None else mask
    real = logits.masked_fill(~known[:, None], 0.0).reshape(*shape, EXPERTS)
    features = real.sum(1) / known.reshape(shape).sum(1, keepdim=True).clamp(min=1)
    if shape[0] == 1:  # pairs of samples
        features = features.repeat(2, 1)
    chosen = {
        "router_logits": logits,
        "routing_weights": selection.routing_weights,
        "selected_experts": selection.selected_experts,
    }
    if pairs:
        keys = features.detach().roll(1, 1)
        routing = ContrastOutput(**chosen, features=features, momentum_features=keys)
    else:
        routing = ThresholdOutput(**chosen, thresholds=logits.new_zeros(len(logits)))
    return RoutingRecord(
        site="layers.0.mlp",
        layer_index=0,
        routing=routing,
        token_mask=mask,
        sequence_shape=shape,
        task_ids=torch.arange(shape[0]) % 2,
        router=router,
        experts=experts,
    )


def without_samples(known: RoutingRecord) -> RoutingRecord:
    """The same of a layer that saw tokens alone."""
    return replace(known, sequence_shape=None, task_ids=None)


def plain_router() -> ComposedRouter:
    """One that knows nothing of losses."""
    return ComposedRouter(LinearScore(WIDTH, EXPERTS), TopK(2))
