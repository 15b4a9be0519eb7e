"""A first pass of the whole model before its own, for routers that read what it ends in."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn

from moeroute.integration.adapters.first_cache import put_first, take_first
from moeroute.integration.adapters.site_host import SiteHost
from moeroute.routers.first_pass import FirstPassHead
from moeroute.routing_pass import RoutingPass

FIRST_PASS = "first pass"
FOR_THE_SECOND = frozenset(
    ["labels", "shift_labels", "num_items_in_batch", "logits_to_keep", "return_dict"]
    + ["output_hidden_states", "output_attentions", "output_router_logits", "use_cache"]
)


class RunFirstPass:
    """Forward pre-hook of the root, after the pass was opened.

    If the active adapter has a head for it, the model's backbone is run without gradients and the
    head's logits are handed to the pass. The output embedding is not run.

    Args:
        root: The model; `backbone_of` says which will do.
        routing_pass: Its pass.
    """

    def __init__(self, root: nn.Module, routing_pass: RoutingPass) -> None:
        self.routing_pass = routing_pass
        self.hosts: list[SiteHost] = []
        self.cache: Any = None
        named = inspect.signature(root.forward).parameters
        known = inspect.signature(backbone_of(root).forward).parameters
        self.positions = tuple(named)
        self.takes_more = any(p.kind is p.VAR_KEYWORD for p in known.values())
        self.known = frozenset(known)
        self.cache_name = "cache_params" if "cache_params" in known else "past_key_values"
        self.own = frozenset(named) - self.known | FOR_THE_SECOND

    def __call__(self, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Run the first pass if somebody wants to read it."""
        self.cache = None
        head = self.active_head()
        if head is None:
            return
        inputs = {**dict(zip(self.positions, args, strict=False)), **kwargs}
        logits = self._recalled(head, inputs)
        if logits is None:
            with self.routing_pass.rehearsal(resting=head.first_weight == 0), torch.no_grad():
                states = self._states(root, inputs, keeps=not head.per_sample)
            logits = head(self.routing_pass.router_input(states, FIRST_PASS))
        self.routing_pass.first_pass = logits

    def active_head(self) -> FirstPassHead | None:
        """The head of the adapter that answers now."""
        for host in self.hosts:
            head = head_of(host.active_module())
            if head is not None:
                return head
        return None

    def _recalled(self, head: FirstPassHead, inputs: dict[str, Any]) -> Tensor | None:
        memory = self.routing_pass.memory
        if memory is None or FIRST_PASS not in memory:
            return None
        ids = inputs.get("input_ids")
        tokens = ids if ids is not None else inputs["inputs_embeds"]
        return head.recall(memory[FIRST_PASS], (tokens.shape[0], tokens.shape[1]))

    def _states(self, root: nn.Module, inputs: dict[str, Any], *, keeps: bool) -> Tensor:
        """(B, S, H), what the backbone ends in; `keeps` if later calls continue from it."""
        passed = {
            name: value
            for name, value in inputs.items()
            if name not in self.own and (self.takes_more or name in self.known)
        }
        cache, use_cache = inputs.get(self.cache_name), inputs.get("use_cache")
        if use_cache is None:
            use_cache = getattr(root.config, "use_cache", False)
        first = None if cache is None else take_first(cache)
        caches = keeps and (first is not None or (use_cache and not root.training))
        if self.cache_name in self.known:
            passed |= {"use_cache": caches, self.cache_name: first if caches else None}
        backbone = backbone_of(root)
        run = root.forward if backbone is root else backbone
        output = run(**passed, return_dict=True)
        if caches:
            self.cache = getattr(output, self.cache_name, None)
        return output.last_hidden_state


class KeepFirstCache:
    """Forward hook of the root: the first pass's cache goes along with the second's."""

    def __init__(self, before: RunFirstPass) -> None:
        self.before = before

    def __call__(
        self, root: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any
    ) -> None:
        """Join the caches, if the call returns one."""
        cache = getattr(output, self.before.cache_name, None)
        if cache is not None and self.before.cache is not None:
            put_first(cache, self.before.cache)
        self.before.cache = None


def connect_first_pass(root: nn.Module, routing_pass: RoutingPass) -> None:
    """Put both hooks on the root, once, if a site holds a head for a first pass."""
    hosts = [
        host
        for host in root.modules()
        if isinstance(host, SiteHost) and head_of(host.moeroute_site) is not None
    ]
    if not hosts:
        return
    for hook in root._forward_pre_hooks.values():
        if isinstance(hook, RunFirstPass):
            hook.hosts = hosts
            return
    before = RunFirstPass(root, routing_pass)
    before.hosts = hosts
    root.register_forward_pre_hook(before, with_kwargs=True)
    root.register_forward_hook(KeepFirstCache(before), with_kwargs=True)


def backbone_of(root: nn.Module) -> nn.Module:
    """The part of a model that ends in one state a token.

    Raises:
        ValueError: It has none, or a decoder beside its encoder.
    """
    config, backbone = getattr(root, "config", None), getattr(root, "base_model", None)
    if not isinstance(backbone, nn.Module) or getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"{type(root).__name__} has no backbone that answers with one state a token; a method "
            "of two passes needs a transformers model that is no encoder-decoder"
        )
    return backbone


def head_of(module: nn.Module | None) -> FirstPassHead | None:
    """The head inside a module, if there is one."""
    if module is None:
        return None
    return next((part for part in module.modules() if isinstance(part, FirstPassHead)), None)
