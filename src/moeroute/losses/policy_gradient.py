"""The policy gradient of routers that draw: RLOO, each copy's loss against the others'.

    gradient of  1/(M-1) sum_m (L_m - mean(L)) log Q(J_m),  the losses taken as numbers

Source: arXiv 2603.10160 (ReMix), which takes the estimator from Buy 4 REINFORCE Samples, Get a
Baseline for Free!, Kool et al., 2019. Differences from the papers: none.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from moeroute.types import RoutingRecord

LEAST_COPIES = 2


def rloo_surrogate(losses: Tensor, log_probs: Tensor) -> Tensor:
    """The number whose gradient is an unbiased estimate of that of the expected loss.

    Equal losses give exactly 0, and a constant added to all of them changes nothing.

    Args:
        losses: (M,) one a copy; no gradient passes.
        log_probs: (M,) log-probability of everything that was drawn for the copy.

    Returns:
        A scalar in float32 or wider.

    Raises:
        ValueError: Another shape, or fewer than two copies, which have no baseline.
    """
    if losses.ndim != 1 or losses.shape != log_probs.shape:
        raise ValueError(
            f"losses {tuple(losses.shape)} and log_probs {tuple(log_probs.shape)}: give one number "
            "a copy, (M,)"
        )
    check_copies(losses.shape[0])
    wide = torch.promote_types(torch.promote_types(losses.dtype, log_probs.dtype), torch.float32)
    values = losses.detach().to(wide)
    # the mean of M equal numbers may differ from them by rounding; their differences do not
    advantages = (values.unsqueeze(1) - values.unsqueeze(0)).mean(1)
    return (advantages * log_probs.to(wide)).sum() / (losses.shape[0] - 1)


def check_copies(count: int) -> None:
    """Raise ValueError below two copies."""
    if count < LEAST_COPIES:
        raise ValueError(
            f"copies={count}: the loss of a copy is judged by that of the others, so draw at least "
            f"{LEAST_COPIES}"
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class NeedsCopies:
    """Stands in a layer whose router learns from `moeroute.policy_gradient_loss` alone.

    It is charged where a loss is made without it, and refuses: the router would stay as it is.

    Args:
        weight: As of any loss.

    Raises:
        RuntimeError: Whenever it is asked.
    """

    weight: float = 1.0

    def __call__(self, record: RoutingRecord) -> Tensor:
        """Refuse."""
        raise RuntimeError(
            f"the router at {record.site or 'this layer'} draws its experts and gets no gradient "
            "from the loss of one forward, so that it would stay untrained. Train on "
            "moeroute.policy_gradient_loss(model, lambda: model(**batch).loss), or with a Trainer "
            "class of (moeroute.PolicyGradientMixin, Trainer); to measure a loss, call "
            "model.eval() or use torch.no_grad()"
        )
