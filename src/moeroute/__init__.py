"""Mixture-of-experts and mixture-of-LoRA layers for PyTorch, PEFT-native, on grouped kernels.

Everything that needs transformers or PEFT is loaded when it is first used, so that the import costs
about as much as torch itself.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from moeroute import layers as layers
from moeroute import losses as losses
from moeroute import routers as routers
from moeroute.integration import lazy_registration
from moeroute.layers import MoELayer as MoELayer
from moeroute.layers.policy_gradient import policy_gradient_loss as policy_gradient_loss
from moeroute.layers.post_step import post_step as post_step
from moeroute.layers.routed import aux_losses as aux_losses
from moeroute.methods import get_method as get_method
from moeroute.methods import list_methods as list_methods
from moeroute.version import __version__ as __version__

if TYPE_CHECKING:
    from moeroute.integration.adapters.expert_lora import fast_expert_lora as fast_expert_lora
    from moeroute.integration.adapters.few_shot import transfer_skills as transfer_skills
    from moeroute.integration.adapters.files import save_adapter as save_adapter
    from moeroute.integration.adapters.inputs import (
        accept_routing_inputs as accept_routing_inputs,
    )
    from moeroute.integration.adapters.inputs import routing_inputs as routing_inputs
    from moeroute.integration.adapters.merge import merge as merge
    from moeroute.integration.adapters.mix import mix_adapters as mix_adapters
    from moeroute.integration.adapters.peft_method import MoeRouteConfig as MoeRouteConfig
    from moeroute.integration.adapters.wrap import unwrap_model as unwrap_model
    from moeroute.integration.adapters.wrap import wrap_model as wrap_model
    from moeroute.integration.callback import RoutingCallback as RoutingCallback
    from moeroute.integration.coupling import add_coupling_loss as add_coupling_loss
    from moeroute.integration.coupling import coupling_loss as coupling_loss
    from moeroute.integration.depth.force import force_depth as force_depth
    from moeroute.integration.doctor import doctor as doctor
    from moeroute.integration.own_models import connect_layers as connect_layers
    from moeroute.integration.policy_gradient_trainer import (
        PolicyGradientMixin as PolicyGradientMixin,
    )
    from moeroute.integration.post_step_callback import PostStepCallback as PostStepCallback
    from moeroute.integration.track import track_routing as track_routing

__all__ = [
    "MoELayer",
    "MoeRouteConfig",
    "PolicyGradientMixin",
    "PostStepCallback",
    "RoutingCallback",
    "__version__",
    "accept_routing_inputs",
    "add_coupling_loss",
    "aux_losses",
    "connect_layers",
    "coupling_loss",
    "doctor",
    "fast_expert_lora",
    "force_depth",
    "get_method",
    "layers",
    "list_methods",
    "losses",
    "merge",
    "mix_adapters",
    "policy_gradient_loss",
    "post_step",
    "routers",
    "routing_inputs",
    "save_adapter",
    "track_routing",
    "transfer_skills",
    "unwrap_model",
    "wrap_model",
]


def __getattr__(name: str) -> Any:
    """Load what needs transformers or PEFT when it is asked for."""
    module = {
        "MoeRouteConfig": "adapters.peft_method",
        "PolicyGradientMixin": "policy_gradient_trainer",
        "PostStepCallback": "post_step_callback",
        "RoutingCallback": "callback",
        "accept_routing_inputs": "adapters.inputs",
        "add_coupling_loss": "coupling",
        "connect_layers": "own_models",
        "coupling_loss": "coupling",
        "doctor": "doctor",
        "fast_expert_lora": "adapters.expert_lora",
        "merge": "adapters.merge",
        "force_depth": "depth.force",
        "mix_adapters": "adapters.mix",
        "routing_inputs": "adapters.inputs",
        "save_adapter": "adapters.files",
        "track_routing": "track",
        "transfer_skills": "adapters.few_shot",
        "unwrap_model": "adapters.wrap",
        "wrap_model": "adapters.wrap",
    }.get(name)
    if module is None:
        raise AttributeError(f"module 'moeroute' has no attribute {name!r}")
    value = getattr(import_module(f"moeroute.integration.{module}"), name)
    globals()[name] = value
    return value


lazy_registration.install()
