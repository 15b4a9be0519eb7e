"""The grouped products of `moeroute_kernels`, as layers and the experts seam call them.

Each name is documented where it is defined. `combine` is the kernel behind `dispatch.combine`;
`activate` and `split_pre_activation` are the pointwise middle of `routed_mlp`, for experts whose
activation the op does not know.
"""

from moeroute_kernels import SortedSlots as SortedSlots
from moeroute_kernels import combine as combine
from moeroute_kernels import expert_sort as expert_sort
from moeroute_kernels import gated_lora as gated_lora
from moeroute_kernels import grouped_lora as grouped_lora
from moeroute_kernels import grouped_mm as grouped_mm
from moeroute_kernels import routed_mlp as routed_mlp
from moeroute_kernels.activations import ACTIVATIONS as ACTIVATIONS
from moeroute_kernels.activations import activate as activate
from moeroute_kernels.activations import split_pre_activation as split_pre_activation

__all__ = [
    "ACTIVATIONS",
    "SortedSlots",
    "activate",
    "combine",
    "expert_sort",
    "gated_lora",
    "grouped_lora",
    "grouped_mm",
    "routed_mlp",
    "split_pre_activation",
]
