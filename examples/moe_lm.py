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
        for index, block in enumerate(self.model.layers):
            block.mlp = make_layer(config, index)
        moeroute.connect_layers(self)


def make_layer(config: MoELMConfig, index: int) -> nn.Module:
    """The routed layer that stands for one feed-forward block."""
    method: Any = moeroute.get_method(config.router)(**config.router_fields)
    extra = tuple(
        getattr(moeroute.losses, name)(weight=weight) for name, weight in config.losses.items()
    )
    sizes = (config.hidden_size, config.num_experts)
    return MoELayer(
        router=method.router(*sizes),
        experts=SwiGLUExperts(config.num_experts, config.hidden_size, config.expert_size),
        losses=(*method.losses(), *extra),
        layer_index=index,
    )
