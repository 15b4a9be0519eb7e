"""The Switch balance loss: load times mean probability.

    L = E * sum_e f_e P_e
    f_e = share of the slots that chose expert e,  P_e = mean over tokens of p_e

Source: Switch Transformers, Fedus et al., 2021, arXiv 2101.03961, equations 4-6; for K > 1 slots f
is divided by K, so that the value at perfect balance is 1 for every K (transformers'
`load_balancing_loss_func` does not divide, and is K times this for one layer).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional

from moeroute.losses.masked import masked_mean
from moeroute.ops.probs import softmax_probs
from moeroute.types import RoutingRecord


@dataclass(frozen=True, kw_only=True, slots=True)
class BalanceLoss:
    """Pushes the router's mean probabilities away from the experts that are fullest.

    The gradient flows through P alone; f is counted. Padding is left out of both means. 1 at
    perfect balance, E when one expert takes all; 0 without real tokens.

    Args:
        weight: Coefficient in the total. A total takes the mean over the layers that ask for this
            loss.
        probs: Logits to probabilities whose rows sum to 1.
    """

    weight: float = 0.01
    probs: Callable[[Tensor], Tensor] = softmax_probs

    def __call__(self, record: RoutingRecord) -> Tensor:
        """The loss of one layer: a scalar, unweighted."""
        routing = record.routing
        size = routing.num_experts
        mean_probs = masked_mean(self.probs(routing.router_logits), record.token_mask)  # (E,)
        chosen = functional.one_hot(routing.selected_experts, size + 1)[..., :size]  # (T, K, E)
        slots = max(routing.selected_experts.shape[-1], 1)
        load = masked_mean(chosen.sum(dim=1).to(mean_probs.dtype), record.token_mask) / slots
        return size * (load.detach() * mean_probs).sum()
