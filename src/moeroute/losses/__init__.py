"""Auxiliary losses: pure functions of what a layer routed."""

from moeroute.losses.balance import BalanceLoss as BalanceLoss
from moeroute.losses.importance import ImportanceLoss as ImportanceLoss
from moeroute.losses.policy_gradient import rloo_surrogate as rloo_surrogate
from moeroute.losses.task_contrast import TaskContrastLoss as TaskContrastLoss
from moeroute.losses.total import LossReport as LossReport
from moeroute.losses.total import total_loss as total_loss
from moeroute.losses.z import ZLoss as ZLoss

__all__ = [
    "BalanceLoss",
    "ImportanceLoss",
    "LossReport",
    "TaskContrastLoss",
    "ZLoss",
    "rloo_surrogate",
    "total_loss",
]
