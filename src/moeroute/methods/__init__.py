"""Published methods, one file a paper, and the table that names them."""

from moeroute.methods.adamole import AdaMoLE as AdaMoLE
from moeroute.methods.arrow import Arrow as Arrow
from moeroute.methods.aux_free import AuxFree as AuxFree
from moeroute.methods.blockffn import BlockFFN as BlockFFN
from moeroute.methods.cosine import Cosine as Cosine
from moeroute.methods.dr_llm import DrLLM as DrLLM
from moeroute.methods.duo_llm import DuoLLM as DuoLLM
from moeroute.methods.dynmole import DynMoLE as DynMoLE
from moeroute.methods.early_exit import EarlyExit as EarlyExit
from moeroute.methods.ept import EPT as EPT
from moeroute.methods.expert_choice import ExpertChoice as ExpertChoice
from moeroute.methods.ftp import FTP as FTP
from moeroute.methods.glider import GLIDER as GLIDER
from moeroute.methods.group_limited import GroupLimited as GroupLimited
from moeroute.methods.hash_layers import HashLayers as HashLayers
from moeroute.methods.hydralora import HydraLoRA as HydraLoRA
from moeroute.methods.informed_routing import InformedRouting as InformedRouting
from moeroute.methods.lora_mixer import LoRAMixer as LoRAMixer
from moeroute.methods.loramoe import LoRAMoE as LoRAMoE
from moeroute.methods.mhr import MHR as MHR
from moeroute.methods.mixlora import MixLoRA as MixLoRA
from moeroute.methods.mixture_of_depths import MixtureOfDepths as MixtureOfDepths
from moeroute.methods.moelora import MOELoRA as MOELoRA
from moeroute.methods.mola import MoLA as MoLA
from moeroute.methods.molora import MoLoRA as MoLoRA
from moeroute.methods.norm_halting import NormHalting as NormHalting
from moeroute.methods.null_experts import NullExperts as NullExperts
from moeroute.methods.phatgoose import PHATGOOSE as PHATGOOSE
from moeroute.methods.poly import Poly as Poly
from moeroute.methods.registry import get_method as get_method
from moeroute.methods.registry import list_methods as list_methods
from moeroute.methods.relu_routing import ReLURouting as ReLURouting
from moeroute.methods.remix import ReMix as ReMix
from moeroute.methods.rmoe import RMoE as RMoE
from moeroute.methods.smora import SMoRA as SMoRA
from moeroute.methods.soft_moe import SoftMoE as SoftMoE
from moeroute.methods.switch import Switch as Switch
from moeroute.methods.t2mir import T2MIR as T2MIR
from moeroute.methods.top_p import TopP as TopP
from moeroute.methods.union_of_experts import UnionOfExperts as UnionOfExperts
from moeroute.methods.xlora import XLoRA as XLoRA

__all__ = [
    "EPT",
    "FTP",
    "GLIDER",
    "MHR",
    "PHATGOOSE",
    "T2MIR",
    "AdaMoLE",
    "Arrow",
    "AuxFree",
    "BlockFFN",
    "Cosine",
    "DrLLM",
    "DuoLLM",
    "DynMoLE",
    "EarlyExit",
    "ExpertChoice",
    "GroupLimited",
    "HashLayers",
    "HydraLoRA",
    "InformedRouting",
    "LoRAMixer",
    "LoRAMoE",
    "MOELoRA",
    "MixLoRA",
    "MixtureOfDepths",
    "MoLA",
    "MoLoRA",
    "NormHalting",
    "NullExperts",
    "Poly",
    "RMoE",
    "ReLURouting",
    "ReMix",
    "SMoRA",
    "SoftMoE",
    "Switch",
    "TopP",
    "UnionOfExperts",
    "XLoRA",
    "get_method",
    "list_methods",
]
