"""A small MoE language model as a Hugging Face model: Llama's attention, moeroute's layers.

The config names the router by its registered method, so a saved checkpoint says how it routes and
`MoELM.from_pretrained` builds it again.
"""

from typing import Any

from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

import moeroute
from moeroute.layers import MoELayer, SwiGLUExperts

PLAIN = "dense"
"""No experts at all: a feed-forward block as wide as the experts that a token passes."""


class MoELMConfig(LlamaConfig):
    """Llama's config, and how the feed-forward blocks are routed.

    Args:
        router: A method's registered name, or "dense".
        router_fields: The method's fields by name.
        losses: Class names of `moeroute.losses` and their weights, beside the method's own.
        num_experts: Experts a layer.
        active_size: Width of all experts that a token passes, together.
        experts_per_token: How many these are; one expert is active_size / experts_per_token wide.
    """

    model_type = "moeroute_moe_lm"

    def __init__(
        self,
        *,
        router: str = "switch",
        router_fields: dict[str, Any] | None = None,
        losses: dict[str, float] | None = None,
        num_experts: int = 8,
        active_size: int = 256,
        experts_per_token: int = 2,
        **llama: Any,
    ) -> None:
        self.router = router
        self.router_fields = router_fields or {}
        self.losses = losses or {}
        self.num_experts = num_experts
        self.active_size = active_size
        self.experts_per_token = experts_per_token
        super().__init__(**{"intermediate_size": active_size, **llama})

    @property
    def expert_size(self) -> int:
        """Width of one expert."""
        return self.active_size // self.experts_per_token


class MoELM(LlamaForCausalLM):
    """The model. Its loss holds the auxiliary losses; routers see padding and token ids."""

    config_class = MoELMConfig

    def __init__(self, config: MoELMConfig) -> None:
        super().__init__(config)
        self.loss_type = "ForCausalLM"
        if config.router == PLAIN:
            return
        for block, layer in zip(self.model.layers, make_layers(config), strict=True):
            block.mlp = layer
        moeroute.connect_layers(self)


def make_layers(config: MoELMConfig) -> list[nn.Module]:
    """The routed layers that stand for the feed-forward blocks."""
    method: Any = method_of(config.router, config.router_fields)
    sizes = (config.hidden_size, config.num_experts)
    count = config.num_hidden_layers
    extra = tuple(
        getattr(moeroute.losses, name)(weight=weight) for name, weight in config.losses.items()
    )
    if hasattr(method, "layer"):  # a method with experts of its own
        layers = [method.layer(sizes[0], config.expert_size, sizes[1]) for _ in range(count)]
        for index, layer in enumerate(layers):
            charge(layer, index, extra)
        return layers
    losses = (*method.losses(), *extra)
    return [
        MoELayer(
            router=router,
            experts=SwiGLUExperts(config.num_experts, config.hidden_size, config.expert_size),
            losses=losses,
            layer_index=index,
        )
        for index, router in enumerate(routers_of(method, sizes, count))
    ]


def method_of(name: str, fields: dict[str, Any]) -> Any:
    """A method by its registered name.

    Raises:
        ValueError: There is none, or it has no router or layer for a new model.
        TypeError: It has no such field.
    """
    method: Any = moeroute.get_method(name)(**fields)
    if not any(hasattr(method, part) for part in ("layer", "router", "routers")):
        raise ValueError(
            f"{name} is made for adapters, not for new layers; use one with a router or a layer, "
            "such as switch, cosine, rmoe or null_experts"
        )
    return method


def routers_of(method: Any, sizes: tuple[int, int], count: int) -> list[nn.Module]:
    """One a layer; those that share a part are made together."""
    if hasattr(method, "routers"):
        return method.routers(*sizes, count)
    return [method.router(*sizes) for _ in range(count)]


def charge(layer: nn.Module, index: int, losses: tuple[Any, ...]) -> None:
    """Number the routed layers inside a layer, and give them more losses."""
    inner = [module for module in layer.modules() if isinstance(module, MoELayer)]
    if losses and not inner:
        raise ValueError(f"losses: {type(layer).__name__} takes none; leave --loss out")
    for module in inner:
        module.layer_index = index
        module.losses = (*module.losses, *losses)
