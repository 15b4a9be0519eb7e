"""Layers that host a router, and the experts that stand behind it."""

from moeroute.layers.beside import BesideFeedForward as BesideFeedForward
from moeroute.layers.branch_experts import BranchExperts as BranchExperts
from moeroute.layers.branches import Branches as Branches
from moeroute.layers.cheap_experts import CheapExperts as CheapExperts
from moeroute.layers.experts import ExpertActivation as ExpertActivation
from moeroute.layers.experts import MLPExperts as MLPExperts
from moeroute.layers.experts import SwiGLUExperts as SwiGLUExperts
from moeroute.layers.feed_forward import SwiGLUFeedForward as SwiGLUFeedForward
from moeroute.layers.instructions import (
    set_instruction_embeddings as set_instruction_embeddings,
)
from moeroute.layers.kronecker_bank import KroneckerBank as KroneckerBank
from moeroute.layers.lora_bank import LoRABank as LoRABank
from moeroute.layers.lora_ffn import LoRAFeedForwardMixture as LoRAFeedForwardMixture
from moeroute.layers.lora_mixture import LoRAMixture as LoRAMixture
from moeroute.layers.module_experts import ModuleExperts as ModuleExperts
from moeroute.layers.moe import MoELayer as MoELayer
from moeroute.layers.multi_hop import MultiHopLayer as MultiHopLayer
from moeroute.layers.post_step import post_step as post_step
from moeroute.layers.ragged_bank import RaggedLoRABank as RaggedLoRABank
from moeroute.layers.routed_gate import RoutedGate as RoutedGate
from moeroute.layers.shared_down_bank import SharedDownLoRABank as SharedDownLoRABank
from moeroute.layers.soft_moe import SlotRouter as SlotRouter
from moeroute.layers.soft_moe import SoftMoELayer as SoftMoELayer
from moeroute.layers.union import UnionFeedForward as UnionFeedForward
from moeroute.layers.union import slice_block as slice_block
from moeroute.layers.union_attention import UnionAttention as UnionAttention

__all__ = [
    "BesideFeedForward",
    "BranchExperts",
    "Branches",
    "CheapExperts",
    "ExpertActivation",
    "KroneckerBank",
    "LoRABank",
    "LoRAFeedForwardMixture",
    "LoRAMixture",
    "MLPExperts",
    "MoELayer",
    "ModuleExperts",
    "MultiHopLayer",
    "RaggedLoRABank",
    "RoutedGate",
    "SharedDownLoRABank",
    "SlotRouter",
    "SoftMoELayer",
    "SwiGLUExperts",
    "SwiGLUFeedForward",
    "UnionAttention",
    "UnionFeedForward",
    "post_step",
    "set_instruction_embeddings",
    "slice_block",
]
