"""What early exits need of the whole model: how it reads tokens off states, and the labels."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from moeroute.integration.depth.decoder_layers import decoder_layers
from moeroute.integration.depth.host import depth_hosts
from moeroute.layers.early_exit import EarlyExitLayer
from moeroute.losses.early_exit import IGNORED
from moeroute.routing_pass import RoutingPass

SCALES = ("logit_scale", "logits_scaling", "output_multiplier", "lm_head_multiplier")
CAP = "final_logit_softcapping"


@dataclass(frozen=True, kw_only=True)
class ReadOut:
    """Hidden states before the final norm to logits, as the model's own forward makes them.

    Args:
        norm: The final norm.
        head: The output embedding.
        cap: Where the model bounds its logits, cap * tanh(logits / cap); None leaves them.
    """

    norm: nn.Module
    head: nn.Module
    cap: float | None = None

    def __call__(self, hidden_states: Tensor) -> Tensor:
        """(..., V) logits of (..., H) states, where the output embedding is."""
        weight = next(self.norm.parameters())
        states = self.norm(hidden_states.to(weight.device))
        logits = self.head(states.to(next(self.head.parameters()).device))
        return logits if self.cap is None else self.cap * torch.tanh(logits / self.cap)


class OpenExits:
    """Forward pre-hook of the root, after the pass was opened.

    Args:
        root: The model; `final_norm` says which will do.
        routing_pass: Its pass.
    """

    def __init__(self, root: nn.Module, routing_pass: RoutingPass) -> None:
        self.routing_pass = routing_pass
        self.norm = final_norm(root)

    def __call__(self, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Give the pass what the exits of this forward read."""
        self.routing_pass.read_out = read_out(root, self.norm)
        self.routing_pass.targets = next_tokens(kwargs, self.routing_pass.token_mask)


def connect_exits(root: nn.Module, routing_pass: RoutingPass) -> None:
    """Put the hook on the root, once, if a decoder layer has exits."""
    sites = [site for _, host in depth_hosts(root) for site in host.moeroute_site.values()]
    connected = any(isinstance(hook, OpenExits) for hook in root._forward_pre_hooks.values())
    if not connected and check_exits(root, sites):
        root.register_forward_pre_hook(OpenExits(root, routing_pass), with_kwargs=True)


def check_exits(root: nn.Module, modules: Iterable[nn.Module]) -> bool:
    """True if one of the modules that a method built reads tokens off hidden states.

    Raises:
        ValueError: One does, and the model is none whose states can be read.
    """
    exits = [module for module in modules if isinstance(module, EarlyExitLayer)]
    reads = any(layer.losses or layer.router.threshold is not None for layer in exits)
    if reads:
        final_norm(root)
    return reads


def read_out(root: nn.Module, norm: str) -> ReadOut:
    """How this model reads tokens, its final norm given by name."""
    head: Any = root.get_output_embeddings()  # pyright: ignore[reportCallIssue]
    config = text_config(root)
    return ReadOut(norm=root.get_submodule(norm), head=head, cap=getattr(config, CAP, None))


def final_norm(root: nn.Module) -> str:
    """The name of a model's final norm.

    Raises:
        ValueError: The model has no output embedding or no final norm that can be found, or does to
            its logits what is not known here.
    """
    name, find = type(root).__name__, getattr(root, "get_output_embeddings", None)
    if find is None or find() is None:
        raise ValueError(
            f"{name} has no output embedding, so that its layers cannot be read as the next "
            "token's; early exit needs a causal language model, such as AutoModelForCausalLM loads"
        )
    config = text_config(root)
    scales = [scale for scale in SCALES if getattr(config, scale, None) not in (None, 1, 1.0)]
    if scales:
        raise ValueError(
            f"{name} multiplies its logits by {scales[0]}, which early exits do not know how to "
            "apply; use moeroute.force_depth, which leaves the end of the model to itself"
        )
    layers = next(iter(decoder_layers(root))).rpartition(".")[0]
    owner = layers.rpartition(".")[0]
    children = [child for child, _ in root.get_submodule(owner).named_children()]
    norms = [
        child
        for child, module in root.get_submodule(owner).named_children()
        if "norm" in type(module).__name__.lower()
    ]
    place = children.index(layers.rpartition(".")[2])
    after = [child for child in norms if children.index(child) > place]
    found = after if len(after) == 1 else norms
    if len(found) != 1:
        raise ValueError(
            f"{name} has {len(norms)} norms beside {layers} ({', '.join(norms) or 'none'}), so it "
            "is unknown which one its output embedding reads; early exit needs exactly one"
        )
    return f"{owner}.{found[0]}" if owner else found[0]


def text_config(root: nn.Module) -> Any:
    """The config of a model's decoder."""
    config: Any = root.config
    return config.get_text_config(decoder=True)


def next_tokens(kwargs: dict[str, Any], mask: Tensor | None) -> Tensor | None:
    """(B, S) int64, the label after each token, as transformers shifts labels; None without any.

    -100 where there is none, and where the token or the one after it is padding.
    """
    shifted, labels = kwargs.get("shift_labels"), kwargs.get("labels")
    if isinstance(shifted, Tensor):
        return shifted if mask is None else shifted.masked_fill(~mask.to(shifted.device), IGNORED)
    if not isinstance(labels, Tensor) or labels.ndim != 2:
        return None
    if mask is not None:
        labels = labels.masked_fill(~mask.to(labels.device), IGNORED)
    shifted = pad(labels, (0, 1), value=IGNORED)[:, 1:]
    return shifted if mask is None else shifted.masked_fill(~mask.to(labels.device), IGNORED)
