"""What is known about transformers' model families, as tables.

The tables are data; the tests compare them with the installed transformers, so that a family that
appears, changes or disappears is noticed there.
"""

from __future__ import annotations

from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping

EXPERTS_OUTSIDE_REGISTRY: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "dbrx": ("DbrxExperts",),
        "doge": ("DogeCDMoE",),
        "jetmoe": ("JetMoeParallelExperts",),
        "llama4": ("Llama4TextExperts",),
        "longcat_flash": ("LongcatFlashExperts",),
        "nllb_moe": ("NllbMoeExperts",),
        "step3p7": ("Step3p7Experts",),
        "switch_transformers": ("SwitchTransformersExperts",),
        "vitpose_backbone": ("VitPoseNaiveMoe",),
    }
)
"""Family -> the classes that compute its experts without asking transformers' experts registry, so
that `experts_implementation` has no effect on them."""
