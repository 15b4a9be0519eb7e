"""Grouped ops for mixtures of experts and of LoRA.

Every op is a `torch.library` op in the namespace "moeroute" with fake and autograd. The default
kernel is plain torch and runs on any device; a device's own kernel is registered beside it
(`register_kernel("cuda")` on the op object) and chosen by PyTorch's dispatcher.
"""

from moeroute_kernels import reference
from moeroute_kernels.combine import combine
from moeroute_kernels.expert_sort import expert_sort
from moeroute_kernels.gated_lora import gated_lora
from moeroute_kernels.grouped_lora import grouped_lora, virtual_experts
from moeroute_kernels.grouped_mm import grouped_mm
from moeroute_kernels.reference import SortedSlots
from moeroute_kernels.routed_mlp import routed_mlp

from moeroute_kernels import cuda  # isort: skip  # registers the kernels of CUDA devices

__all__ = [
    "SortedSlots",
    "combine",
    "cuda",
    "expert_sort",
    "gated_lora",
    "grouped_lora",
    "grouped_mm",
    "reference",
    "routed_mlp",
    "virtual_experts",
]
