"""Auxiliary losses: pure functions of what a layer routed."""

from moeroute.losses.active_weight import ActiveWeightLoss as ActiveWeightLoss
from moeroute.losses.balance import BalanceLoss as BalanceLoss
from moeroute.losses.coupling import ERCLoss as ERCLoss
from moeroute.losses.importance import ImportanceLoss as ImportanceLoss
from moeroute.losses.kinds_balance import KindsBalanceLoss as KindsBalanceLoss
from moeroute.losses.policy_gradient import rloo_surrogate as rloo_surrogate
from moeroute.losses.preserve import PreserveLoss as PreserveLoss
from moeroute.losses.same_pair import SamePairLoss as SamePairLoss
from moeroute.losses.soft_balance import SoftBalanceLoss as SoftBalanceLoss
from moeroute.losses.task_contrast import TaskContrastLoss as TaskContrastLoss
from moeroute.losses.total import LossReport as LossReport
from moeroute.losses.total import total_loss as total_loss
from moeroute.losses.z import ZLoss as ZLoss

__all__ = [
    "ActiveWeightLoss",
    "BalanceLoss",
    "ERCLoss",
    "ImportanceLoss",
    "KindsBalanceLoss",
    "LossReport",
    "PreserveLoss",
    "SamePairLoss",
    "SoftBalanceLoss",
    "TaskContrastLoss",
    "ZLoss",
    "rloo_surrogate",
    "total_loss",
]
