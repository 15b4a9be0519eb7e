"""`merge`: a mixture of LoRA over linears as one plain LoRA, and what that costs."""

from __future__ import annotations

from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from transformers.pytorch_utils import Conv1D

from moeroute.integration.adapters.logit_error import Text, as_batches, logit_error
from moeroute.integration.adapters.merge_strategies import Mixture, merged_loras
from moeroute.integration.adapters.merged import MergedLoRA, lora_tensors, rank_fields
from moeroute.integration.adapters.peft_method import MoeRouteConfig
from moeroute.integration.adapters.site_host import SITE_PREFIX, SiteHost
from moeroute.integration.adapters.sites import shortest_targets

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from moeroute.layers.constant_lora import ConstantLoRA


def merge(model: PeftModel, strategy: str = "uniform", *, text: Text | None = None) -> MergedLoRA:
    """Turn a mixture of LoRA over linears into one plain LoRA, for whoever cannot route.

    Exact for the constant weights that a strategy chooses, in the place of those that the routers
    would choose for each token; give `text` to be told how much that changes. The rank is the sum
    of the ranks of the experts that are used: E * r for all of them; r for methods that average
    their experts' matrices.

    Args:
        model: A wrapped model; its active adapter is merged, and nothing in it is changed.
        strategy: "uniform", every expert 1 / E; "usage", every expert its mean routing weight over
            the tokens of `text`, linear by linear; "expert:3" or "expert:NAME" (the name that
            `mix_adapters` was given), one expert with weight 1, linears that have no such expert
            left out; "task:3", the weights of a task, for methods that route by task: their answer
            for that task, nothing lost.
        text: (B, S) token ids, or what the model's forward takes by name (input_ids,
            attention_mask, task_ids), or several of these.

    Returns:
        The LoRA: `save(directory)`, `put_on(base)`, and its `error` on the text.

    Raises:
        ValueError: The adapter is no mixture over linears, the strategy, the expert or the task
            is unknown or not defined for the method, "usage" without text, or text without tokens.

    Example:
        >>> merged = moeroute.merge(model, "usage", text=input_ids)
        >>> print(merged.error)
        >>> merged.save("plain-lora")
    """
    batches = None if text is None else as_batches(text)
    mixture = _find_mixture(model)
    everywhere = merged_loras(mixture, strategy, batches)
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
        config=_lora_config(mixture, loras),
        tensors={**lora_tensors(loras), **extra},
        error=error,
    )


def plain_strategies(model: PeftModel) -> dict[str, str]:
    """The strategies that leave nothing out when taken together, by a name for each.

    "expert:0" and so on, by the names of the experts where they have any, else `expert_0`; for
    methods that route by task "task:0" and so on, by `task_0`.

    Raises:
        ValueError: As for `merge`.
    """
    mixture = _find_mixture(model)
    if mixture.num_tasks is not None:
        return {f"task_{index}": f"task:{index}" for index in range(mixture.num_tasks)}
    size, names = mixture.num_experts, mixture.expert_names
    if len(names) != size:
        names = tuple(f"expert_{index}" for index in range(size))
    return {name: f"expert:{index}" for index, name in enumerate(names)}


def _find_mixture(model: PeftModel) -> Mixture:
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
    hosts = {
        name: module
        for name, module in model.get_base_model().named_modules()
        if isinstance(module, SiteHost) and adapter in module.moeroute_site
    }
    if not hosts:
        raise ValueError(
            f"merging is not defined for {config.method}: its routers stand at gates and add no "
            "LoRA. Keep the adapter, or drop it with moeroute.unwrap_model(model)"
        )
    return Mixture(model, adapter, config, hosts)


@contextmanager
def _answering(mixture: Mixture, loras: Mapping[str, ConstantLoRA]) -> Iterator[None]:
    """Let plain LoRA answer in the mixture's places inside the block."""
    own = {name: host.moeroute_site[mixture.adapter] for name, host in mixture.hosts.items()}
    try:
        for name, host in mixture.hosts.items():
            host.moeroute_site[mixture.adapter] = loras[name]
        yield
    finally:
        for name, host in mixture.hosts.items():
            host.moeroute_site[mixture.adapter] = own[name]


def _lora_config(mixture: Mixture, loras: Mapping[str, ConstantLoRA]) -> LoraConfig:
    config = mixture.config
    bases = [host.base_layer for name, host in mixture.hosts.items() if name in loras]
    return LoraConfig(
        task_type=config.task_type,
        base_model_name_or_path=config.base_model_name_or_path,
        revision=config.revision,
        modules_to_save=config.modules_to_save,
        target_modules=sorted(shortest_targets(mixture.model.get_base_model(), loras)),
        fan_in_fan_out=any(isinstance(base, Conv1D) for base in bases),
        **rank_fields(loras),  # type: ignore[arg-type]
    )
