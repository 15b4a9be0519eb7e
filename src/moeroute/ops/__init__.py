"""Pure tensor functions; the only folder that calls `moeroute_kernels`."""

from moeroute.ops.dispatch import combine as combine
from moeroute.ops.dispatch import dispatch as dispatch
from moeroute.ops.dispatch import plan_dispatch as plan_dispatch
from moeroute.ops.dispatch import plan_slots as plan_slots
from moeroute.ops.expert_mm import gated_lora as gated_lora
from moeroute.ops.expert_mm import grouped_lora as grouped_lora
from moeroute.ops.expert_mm import grouped_mm as grouped_mm
from moeroute.ops.expert_mm import routed_mlp as routed_mlp
from moeroute.ops.load import co_activation as co_activation
from moeroute.ops.load import coefficient_of_variation as coefficient_of_variation
from moeroute.ops.load import dead_experts as dead_experts
from moeroute.ops.load import load_entropy as load_entropy
from moeroute.ops.load import load_entropy_nats as load_entropy_nats
from moeroute.ops.load import max_violation as max_violation
from moeroute.ops.load import tokens_per_expert as tokens_per_expert

__all__ = [
    "co_activation",
    "coefficient_of_variation",
    "combine",
    "dead_experts",
    "dispatch",
    "gated_lora",
    "grouped_lora",
    "grouped_mm",
    "load_entropy",
    "load_entropy_nats",
    "max_violation",
    "plan_dispatch",
    "plan_slots",
    "routed_mlp",
    "tokens_per_expert",
]
