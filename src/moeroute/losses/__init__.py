"""Auxiliary losses: pure functions of what a layer routed."""

from moeroute.losses.active_weight import ActiveWeightLoss as ActiveWeightLoss
from moeroute.losses.alignment import Neighbors as Neighbors
from moeroute.losses.alignment import alignment_loss as alignment_loss
from moeroute.losses.alignment import routing_vectors as routing_vectors
from moeroute.losses.alignment import solved_neighbors as solved_neighbors
from moeroute.losses.anchor import AnchorLoss as AnchorLoss
from moeroute.losses.balance import BalanceLoss as BalanceLoss
from moeroute.losses.budget import BudgetLoss as BudgetLoss
from moeroute.losses.chunk_sparsity import ChunkSparsityLoss as ChunkSparsityLoss
from moeroute.losses.coupling import ERCLoss as ERCLoss
from moeroute.losses.depth_focal import DepthFocalLoss as DepthFocalLoss
from moeroute.losses.distil import DistilLoss as DistilLoss
from moeroute.losses.early_exit import ExitLoss as ExitLoss
from moeroute.losses.entropy import EntropyLoss as EntropyLoss
from moeroute.losses.forecast import ForecastLoss as ForecastLoss
from moeroute.losses.global_balance import GlobalBalanceLoss as GlobalBalanceLoss
from moeroute.losses.importance import ImportanceLoss as ImportanceLoss
from moeroute.losses.kinds_balance import KindsBalanceLoss as KindsBalanceLoss
from moeroute.losses.locality import LocalityLoss as LocalityLoss
from moeroute.losses.localized_balance import LocalizedBalanceLoss as LocalizedBalanceLoss
from moeroute.losses.membership import MembershipLoss as MembershipLoss
from moeroute.losses.orthogonality import OrthogonalityLoss as OrthogonalityLoss
from moeroute.losses.policy_gradient import rloo_surrogate as rloo_surrogate
from moeroute.losses.preserve import PreserveLoss as PreserveLoss
from moeroute.losses.renyi import RenyiLoss as RenyiLoss
from moeroute.losses.same_pair import SamePairLoss as SamePairLoss
from moeroute.losses.sequence_balance import SequenceBalanceLoss as SequenceBalanceLoss
from moeroute.losses.soft_balance import SoftBalanceLoss as SoftBalanceLoss
from moeroute.losses.task_contrast import TaskContrastLoss as TaskContrastLoss
from moeroute.losses.threshold_balance import ThresholdBalanceLoss as ThresholdBalanceLoss
from moeroute.losses.token_pruning import GuideLoss as GuideLoss
from moeroute.losses.token_pruning import SkipShareLoss as SkipShareLoss
from moeroute.losses.total import LossReport as LossReport
from moeroute.losses.total import total_loss as total_loss
from moeroute.losses.unit_gates import ForetoldChangeLoss as ForetoldChangeLoss
from moeroute.losses.unit_gates import SparsityTargetLoss as SparsityTargetLoss
from moeroute.losses.variance import VarianceLoss as VarianceLoss
from moeroute.losses.weight_balance import WeightBalanceLoss as WeightBalanceLoss
from moeroute.losses.z import ZLoss as ZLoss
from moeroute.ops.chunks import chunk_sparsity as chunk_sparsity

__all__ = [
    "ActiveWeightLoss",
    "AnchorLoss",
    "BalanceLoss",
    "BudgetLoss",
    "ChunkSparsityLoss",
    "DepthFocalLoss",
    "DistilLoss",
    "ERCLoss",
    "EntropyLoss",
    "ExitLoss",
    "ForecastLoss",
    "ForetoldChangeLoss",
    "GlobalBalanceLoss",
    "GuideLoss",
    "ImportanceLoss",
    "KindsBalanceLoss",
    "LocalityLoss",
    "LocalizedBalanceLoss",
    "LossReport",
    "MembershipLoss",
    "Neighbors",
    "OrthogonalityLoss",
    "PreserveLoss",
    "RenyiLoss",
    "SamePairLoss",
    "SequenceBalanceLoss",
    "SkipShareLoss",
    "SoftBalanceLoss",
    "SparsityTargetLoss",
    "TaskContrastLoss",
    "ThresholdBalanceLoss",
    "VarianceLoss",
    "WeightBalanceLoss",
    "ZLoss",
    "alignment_loss",
    "chunk_sparsity",
    "rloo_surrogate",
    "routing_vectors",
    "solved_neighbors",
    "total_loss",
]
