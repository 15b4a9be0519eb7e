"""`merge`: a mixture of LoRA over linears as one plain LoRA, and what that costs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from torch import Tensor
from transformers.pytorch_utils import Conv1D

from moeroute.integration.adapters.logit_error import (
    Batch,
    Text,
    as_batches,
    evaluating,
    logit_error,
    run,
)
from moeroute.integration.adapters.merged import MergedLoRA, lora_tensors, rank_fields
from moeroute.integration.adapters.peft_method import MoeRouteConfig
from moeroute.integration.adapters.site_host import SITE_PREFIX, SiteHost
from moeroute.integration.adapters.sites import shortest_targets
from moeroute.layers.constant_lora import ConstantBank, ConstantLoRA, constant_lora
from moeroute.layers.lora_mixture import LoRAMixture
from moeroute.layers.routed import routing_passes
from moeroute.ops.gates import expert_table

if TYPE_CHECKING:
    from moeroute.types import RoutingRecord

Banks = Mapping[str, ConstantBank]
Weights = dict[str, Tensor]


MERGE_IS_NOT_DEFINED = (
    "merge({strategy!r}) is not defined for {method}, which is no sum of LoRA over one linear: no "
    "plain LoRA equals it for any constant weights. Keep the adapter as it is (save_pretrained, "
    "PeftModel.from_pretrained), or train a method on linears, such as molora, if you need to merge"
)


class _Mixture(NamedTuple):
    """The active adapter of a wrapped model.

    Attributes:
        adapter: Its name.
        config: Its config.
        hosts: Module name in the base model -> what stands there.
        banks: Module name in the base model -> the experts there.
    """

    adapter: str
    config: MoeRouteConfig
    hosts: Mapping[str, SiteHost]
    banks: Banks


def merge(model: PeftModel, strategy: str = "uniform", *, text: Text | None = None) -> MergedLoRA:
    """Turn a mixture of LoRA over linears into one plain LoRA, for whoever cannot route.

    Exact for the constant weights that a strategy chooses, in the place of those that the routers
    would choose for each token; give `text` to be told how much that changes. The rank is the sum
    of the ranks of the experts that are used: E * r for all of them.

    Args:
        model: A wrapped model; its active adapter is merged, and nothing in it is changed.
        strategy: "uniform", every expert 1 / E; "usage", every expert its mean routing weight over
            the tokens of `text`, linear by linear; "expert:3" or "expert:NAME", one expert with
            weight 1, linears that have no such expert left out.
        text: (B, S) token ids, or what the model's forward takes by name (input_ids,
            attention_mask, task_ids), or several of these.

    Returns:
        The LoRA: `save(directory)`, `put_on(base)`, and its `error` on the text.

    Raises:
        ValueError: The adapter is no mixture over linears that is linear in its weights, the
            strategy or the expert is unknown, "usage" without text, or text without tokens.

    Example:
        >>> merged = moeroute.merge(model, "usage", text=input_ids)
        >>> print(merged.error)
        >>> merged.save("plain-lora")
    """
    batches = None if text is None else as_batches(text)
    mixture = _find_mixture(model, strategy)
    weights = _weights_of(model, mixture, strategy, batches)
    everywhere = {name: constant_lora(bank, weights[name]) for name, bank in mixture.banks.items()}
    loras = {name: lora for name, lora in everywhere.items() if lora.r}
    if not loras:
        raise ValueError(f"merge({strategy!r}): no linear has an expert of weight above 0")
    error = None
    if batches is not None:
        changed = partial(_answering, mixture, everywhere)
        error = logit_error(model, batches, changed)
    extra = {
        name: value
        for name, value in get_peft_model_state_dict(model, adapter_name=mixture.adapter).items()
        if f".{SITE_PREFIX}." not in name
    }
    return MergedLoRA(
        strategy=strategy,
        config=_lora_config(model, mixture, loras),
        tensors={**lora_tensors(loras), **extra},
        error=error,
    )


def num_mergeable_experts(model: PeftModel) -> int:
    """The most experts that a linear of the active adapter has, for "expert:INDEX".

    Raises:
        ValueError: As for `merge`.
    """
    return max(bank.num_experts for bank in _find_mixture(model, "expert").banks.values())


def _find_mixture(model: PeftModel, strategy: str) -> _Mixture:
    if not isinstance(model, PeftModel):
        raise ValueError(
            f"{type(model).__name__} is no PeftModel; give what moeroute.wrap_model or "
            "PeftModel.from_pretrained returned"
        )
    adapter = model.active_adapters[0]
    config = model.peft_config.get(adapter)
    if not isinstance(config, MoeRouteConfig):
        raise ValueError(
            f"the active adapter {adapter!r} is no mixture of moeroute; a plain LoRA is merged by "
            "PEFT's own merge_and_unload()"
        )
    hosts, banks = {}, {}
    for name, module in model.get_base_model().named_modules():
        if not isinstance(module, SiteHost) or adapter not in module.moeroute_site:
            continue
        layer: Any = module.moeroute_site[adapter]
        if not isinstance(layer, LoRAMixture) or not isinstance(layer.bank, ConstantBank):
            reason = MERGE_IS_NOT_DEFINED.format(strategy=strategy, method=config.method)
            raise ValueError(f"{name} ({type(layer).__name__}): {reason}")
        hosts[name], banks[name] = module, layer.bank
    return _Mixture(adapter, config, hosts, banks)


def _weights_of(
    model: PeftModel, mixture: _Mixture, strategy: str, batches: Sequence[Batch] | None
) -> Weights:
    kind, _, argument = strategy.partition(":")
    if kind not in STRATEGIES:
        raise ValueError(
            f"unknown strategy {strategy!r}; choose "
            '"uniform", "usage", "expert:INDEX" or "expert:NAME"'
        )
    return STRATEGIES[kind](model, mixture, argument, batches)


def _uniform(
    _: PeftModel, mixture: _Mixture, argument: str, batches: Sequence[Batch] | None
) -> Weights:
    _take_no_argument("uniform", argument)
    return {
        name: torch.full((bank.num_experts,), 1.0 / bank.num_experts, dtype=torch.float64)
        for name, bank in mixture.banks.items()
    }


def _usage(
    model: PeftModel, mixture: _Mixture, argument: str, batches: Sequence[Batch] | None
) -> Weights:
    _take_no_argument("usage", argument)
    if batches is None:
        raise ValueError(
            'merge("usage") measures how much each expert is used; give text=input_ids'
        )
    names = {id(bank): name for name, bank in mixture.banks.items()}
    sums = {
        name: torch.zeros(bank.num_experts, dtype=torch.float64)
        for name, bank in mixture.banks.items()
    }
    tokens = dict.fromkeys(sums, 0)

    def listen(record: RoutingRecord) -> None:
        name = names.get(id(record.experts))
        if name is None:
            return
        routing = record.routing
        table = expert_table(routing.selected_experts, routing.routing_weights, sums[name].shape[0])
        if record.token_mask is not None:
            table = table[record.token_mask]
        sums[name] += table.double().sum(0).cpu()
        tokens[name] += table.shape[0]

    with ExitStack() as stack:
        stack.enter_context(evaluating(model))
        for routing_pass in routing_passes(model):
            stack.enter_context(routing_pass.listening(listen))
        for batch in batches:
            run(model, batch)
    idle = [name for name, count in tokens.items() if not count]
    if idle:
        raise ValueError(f'merge("usage"): no token of the text reached {idle[0]}; give other text')
    return {name: total / tokens[name] for name, total in sums.items()}


def _one_expert(
    _: PeftModel, mixture: _Mixture, argument: str, batches: Sequence[Batch] | None
) -> Weights:
    size = max(bank.num_experts for bank in mixture.banks.values())
    names = tuple(mixture.config.method_fields.get("expert_names") or ())
    if argument in names:
        index = names.index(argument)
    elif argument.isdecimal() and int(argument) < size:
        index = int(argument)
    else:
        named = f" or a name of {', '.join(names)}" if names else ""
        raise ValueError(
            f"unknown expert {argument!r}; give a number from 0 to {size - 1}{named}, as in "
            '"expert:0"'
        )
    weights = {}
    for name, bank in mixture.banks.items():
        weights[name] = torch.zeros(bank.num_experts, dtype=torch.float64)
        weights[name][index : index + 1] = 1.0
    return weights


def _one_task(
    _: PeftModel, mixture: _Mixture, argument: str, batches: Sequence[Batch] | None
) -> Weights:
    raise ValueError(
        f'merge("task:{argument}") is not defined for {mixture.config.method}: it routes by token, '
        'not by task. Choose "uniform", "usage" or "expert:INDEX"'
    )


Strategy = Callable[[PeftModel, _Mixture, str, Sequence[Batch] | None], Weights]

STRATEGIES: Mapping[str, Strategy] = MappingProxyType(
    {"uniform": _uniform, "usage": _usage, "expert": _one_expert, "task": _one_task}
)
"""What stands before the colon of a strategy -> the constant weights, (E,) for each linear."""


def _take_no_argument(kind: str, argument: str) -> None:
    if argument:
        raise ValueError(f"strategy {kind!r} takes nothing after it, found {argument!r}")


@contextmanager
def _answering(mixture: _Mixture, loras: Mapping[str, ConstantLoRA]) -> Iterator[None]:
    """Let plain LoRA answer in the mixture's places inside the block."""
    own = {name: host.moeroute_site[mixture.adapter] for name, host in mixture.hosts.items()}
    try:
        for name, host in mixture.hosts.items():
            host.moeroute_site[mixture.adapter] = loras[name]
        yield
    finally:
        for name, host in mixture.hosts.items():
            host.moeroute_site[mixture.adapter] = own[name]


def _lora_config(
    model: PeftModel, mixture: _Mixture, loras: Mapping[str, ConstantLoRA]
) -> LoraConfig:
    config = mixture.config
    bases = [host.base_layer for name, host in mixture.hosts.items() if name in loras]
    return LoraConfig(
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        modules_to_save=config.modules_to_save,
        target_modules=sorted(shortest_targets(model.get_base_model(), loras)),
        fan_in_fan_out=any(isinstance(base, Conv1D) for base in bases),
        **rank_fields(loras),  # type: ignore[arg-type]
    )
