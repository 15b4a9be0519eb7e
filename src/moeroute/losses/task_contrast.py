"""A contrastive loss between how a sample is routed and the embedding of its task.

    f_b = mean over the sample's real tokens of its router logits
    L   = mean over samples of -log softmax_t(cos(f_b, e_t) / temperature) at the sample's task

Source: Expert Pyramid Tuning, Zhang et al., 2026, arXiv 2603.12577, read from notes on the paper:
InfoNCE between a sample's feature and the learned vector of its task, the other tasks' vectors
being the negatives. Our own reading: the feature is the mean of the router's logits, so that the
loss reaches the router itself, and the temperature is 0.07.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.nn import functional

from moeroute.losses.masked import real_tokens_only
from moeroute.ops.exact import without_autocast
from moeroute.types import RoutingRecord


@runtime_checkable
class HasTaskEmbeddings(Protocol):
    """A router with one vector a task."""

    task_embeddings: Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class TaskContrastLoss:
    """Pulls the routing of a task's samples to the task's vector, and away from other tasks'.

    Near 0 at perfect alignment with vectors at right angles, log(num_tasks) where all are alike; 0
    with one task, and without real tokens. Samples that are all padding are left out.

    Args:
        weight: Coefficient in the total, which takes the mean over the layers that ask for it.
        temperature: Divides the cosines.

    Shapes:
        router_logits: (T, E); router.task_embeddings: (num_tasks, E); record.task_ids: (B,) in
            range; the loss is a scalar in the logits' dtype.

    Raises:
        ValueError: The record knows no tasks, or its router has no embeddings of tasks.
    """

    weight: float = 0.1
    temperature: float = 0.07

    def __call__(self, record: RoutingRecord) -> Tensor:
        """The loss of one layer: a scalar, unweighted."""
        if record.task_ids is None or record.sequence_shape is None:
            raise ValueError(
                f"{record.site}: TaskContrastLoss needs task_ids, one a sample; call "
                "model(..., task_ids=ids), or set the loss's weight to 0"
            )
        if not isinstance(record.router, HasTaskEmbeddings):
            raise ValueError(
                f"{record.site}: TaskContrastLoss needs a router with task_embeddings, such as "
                "TaskAwareRouter"
            )
        features, real = _sample_features(record, record.sequence_shape)
        embeddings = record.router.task_embeddings.to(features)
        units = functional.normalize(features, dim=1)
        goals = functional.normalize(embeddings, dim=1)
        with without_autocast(features.device.type):
            cosines = units @ goals.T
        log_probs = torch.log_softmax(cosines / self.temperature, dim=1)
        task_ids = record.task_ids.to(features.device, torch.int64)
        own = log_probs.gather(1, task_ids.unsqueeze(1)).squeeze(1)
        return -torch.where(real, own, 0.0).sum() / real.sum().clamp(min=1)


def _sample_features(record: RoutingRecord, shape: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """(B, E) mean logits over real tokens, and (B,) whether the sample has any."""
    logits = real_tokens_only(record.routing.router_logits, record.token_mask)
    mask = record.token_mask
    if mask is None:
        mask = torch.ones(logits.shape[0], dtype=torch.bool, device=logits.device)
    counts = mask.to(torch.bool).reshape(shape).sum(1)
    sums = logits.reshape(*shape, logits.shape[1]).sum(1)
    return sums / counts.clamp(min=1).unsqueeze(1), counts > 0
