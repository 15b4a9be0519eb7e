"""Published methods, one file a paper, and the table that names them."""

from moeroute.methods.adamole import AdaMoLE as AdaMoLE
from moeroute.methods.arrow import Arrow as Arrow
from moeroute.methods.dr_llm import DrLLM as DrLLM
from moeroute.methods.dynmole import DynMoLE as DynMoLE
from moeroute.methods.hydralora import HydraLoRA as HydraLoRA
from moeroute.methods.loramoe import LoRAMoE as LoRAMoE
from moeroute.methods.mhr import MHR as MHR
from moeroute.methods.mixlora import MixLoRA as MixLoRA
from moeroute.methods.moelora import MOELoRA as MOELoRA
from moeroute.methods.mola import MoLA as MoLA
from moeroute.methods.molora import MoLoRA as MoLoRA
from moeroute.methods.phatgoose import PHATGOOSE as PHATGOOSE
from moeroute.methods.poly import Poly as Poly
from moeroute.methods.registry import get_method as get_method
from moeroute.methods.registry import list_methods as list_methods
from moeroute.methods.remix import ReMix as ReMix
from moeroute.methods.smora import SMoRA as SMoRA

__all__ = [
    "MHR",
    "PHATGOOSE",
    "AdaMoLE",
    "Arrow",
    "DrLLM",
    "DynMoLE",
    "HydraLoRA",
    "LoRAMoE",
    "MOELoRA",
    "MixLoRA",
    "MoLA",
    "MoLoRA",
    "Poly",
    "ReMix",
    "SMoRA",
    "get_method",
    "list_methods",
]
