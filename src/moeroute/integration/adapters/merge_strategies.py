"""Which plain LoRA stands for the mixture at each linear: the strategies of `merge`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from moeroute.integration.adapters.logit_error import Batch, evaluating, run
from moeroute.layers.averaged_mixture import AveragedLoRAMixture
from moeroute.layers.constant_lora import ConstantBank, ConstantLoRA, constant_lora, num_slots
from moeroute.layers.lora_mixture import LoRAMixture
from moeroute.layers.routed import routing_passes
from moeroute.ops.gates import expert_table
from moeroute.routers.composed import ComposedRouter
from moeroute.routers.granularity import TaskScore
from moeroute.routers.task_skills import TaskSkills
from moeroute.types import RouterInput

if TYPE_CHECKING:
    from peft import PeftModel

    from moeroute.integration.adapters.peft_method import MoeRouteConfig
    from moeroute.integration.adapters.site_host import SiteHost
    from moeroute.types import RoutingRecord

LinearMixture = LoRAMixture | AveragedLoRAMixture
Loras = dict[str, ConstantLoRA]

MERGE_IS_NOT_DEFINED = (
    "merge({strategy!r}) is not defined for {method}, which is no sum of LoRA over one linear: no "
    "plain LoRA equals it for any constant weights. Keep the adapter as it is (save_pretrained, "
    "PeftModel.from_pretrained), or train a method on linears, such as molora, if you need to merge"
)


class Mixture(NamedTuple):
    """The active adapter of a wrapped model.

    Attributes:
        model: The model.
        adapter: The adapter's name.
        config: Its config.
        hosts: Module name in the base model -> what stands there.
    """

    model: PeftModel
    adapter: str
    config: MoeRouteConfig
    hosts: Mapping[str, SiteHost]

    def layers(self, strategy: str) -> dict[str, LinearMixture]:
        """Module name in the base model -> the mixture there.

        Raises:
            ValueError: The method's mixtures are no LoRA over a linear, whatever the weights.
        """
        layers = {}
        for name, host in self.hosts.items():
            layer: Any = host.moeroute_site[self.adapter]
            if not isinstance(layer, LinearMixture) or not isinstance(layer.bank, ConstantBank):
                reason = MERGE_IS_NOT_DEFINED.format(strategy=strategy, method=self.config.method)
                raise ValueError(f"{name} ({type(layer).__name__}): {reason}")
            layers[name] = layer
        return layers

    def banks(self, strategy: str) -> dict[str, ConstantBank]:
        """Module name in the base model -> the experts there; raises as `layers` does."""
        layers = self.layers(strategy)
        return {name: _bank(layer) for name, layer in layers.items()}

    @property
    def num_experts(self) -> int:
        """The most experts that a linear has; raises as `layers` does."""
        return max(bank.num_experts for bank in self.banks("expert").values())

    @property
    def expert_names(self) -> tuple[str, ...]:
        """What the adapters were called that the method mixes; empty for experts of its own."""
        return tuple(expert.name for expert in getattr(self.config.build_method(), "experts", ()))

    @property
    def num_tasks(self) -> int | None:
        """How many tasks the routers know; None if a router looks at anything else."""
        scores = [_task_score(layer.router) for layer in self.layers("task").values()]
        tasks = {None if score is None else score.num_tasks for score in scores}
        return tasks.pop() if len(tasks) == 1 else None


def merged_loras(mixture: Mixture, strategy: str, batches: Sequence[Batch] | None) -> Loras:
    """The plain LoRA of each linear, of rank 0 where nothing is left.

    Args:
        mixture: What to merge.
        strategy: As `merge` takes it.
        batches: The text, for strategies that look at it.

    Raises:
        ValueError: The strategy is unknown, not defined for this method, or needs a text.
    """
    kind, _, argument = strategy.partition(":")
    if kind not in STRATEGIES:
        raise ValueError(
            f"unknown strategy {strategy!r}; choose "
            '"uniform", "usage", "expert:INDEX", "expert:NAME" or "task:ID"'
        )
    return STRATEGIES[kind](mixture, argument, batches)


def _uniform(mixture: Mixture, argument: str, batches: Sequence[Batch] | None) -> Loras:
    _take_no_argument("uniform", argument)
    return {
        name: constant_lora(bank, _no_weights(bank) + 1.0 / bank.num_experts)
        for name, bank in mixture.banks("uniform").items()
    }


def _usage(mixture: Mixture, argument: str, batches: Sequence[Batch] | None) -> Loras:
    _take_no_argument("usage", argument)
    if batches is None:
        raise ValueError(
            'merge("usage") measures how much each expert is used; give text=input_ids'
        )
    banks = mixture.banks("usage")
    usage = _mean_weights(mixture.model, banks, batches)
    return {name: constant_lora(bank, usage[name]) for name, bank in banks.items()}


def _mean_weights(
    model: PeftModel, banks: Mapping[str, ConstantBank], batches: Sequence[Batch]
) -> dict[str, Tensor]:
    """(K,) float64 for each linear: its router's weights, in the mean over all real tokens."""
    names = {id(bank): name for name, bank in banks.items()}
    sums = {name: _no_weights(bank) for name, bank in banks.items()}
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


def _one_expert(mixture: Mixture, argument: str, batches: Sequence[Batch] | None) -> Loras:
    names, size = mixture.expert_names, mixture.num_experts
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
    loras = {}
    for name, bank in mixture.banks("expert").items():
        weights = _no_weights(bank).unflatten(0, (-1, bank.num_experts))  # (heads, E)
        weights[:, index : index + 1] = 1.0
        loras[name] = constant_lora(bank, weights.flatten())
    return loras


def _one_task(mixture: Mixture, argument: str, batches: Sequence[Batch] | None) -> Loras:
    num_tasks = mixture.num_tasks
    if num_tasks is None:
        raise ValueError(
            f'merge("task:{argument}") is not defined for {mixture.config.method}: it routes by '
            'what it reads, not by task. Choose "uniform", "usage" or "expert:INDEX"'
        )
    if not argument.isdecimal() or int(argument) >= num_tasks:
        raise ValueError(
            f'unknown task {argument!r}; give a number from 0 to {num_tasks - 1}, as in "task:0"'
        )
    return {
        name: constant_lora(_bank(layer), _task_weights(layer, int(argument)))
        for name, layer in mixture.layers("task").items()
    }


def _task_weights(layer: LinearMixture, task_id: int) -> Tensor:
    """(K,) float64: what the router gives every token of a task in eval."""
    score = _task_score(layer.router)
    assert score is not None
    device = score.task_table.weight.device
    token = RouterInput(
        hidden_states=torch.zeros(1, 1, device=device),
        sequence_shape=(1, 1),
        task_ids=torch.tensor([task_id], device=device),
    )
    with evaluating(layer.router), torch.no_grad():
        routing = layer.router(token)
    size = num_slots(_bank(layer))
    return expert_table(routing.selected_experts, routing.routing_weights, size)[0].double()


Strategy = Callable[[Mixture, str, Sequence[Batch] | None], Loras]

STRATEGIES: Mapping[str, Strategy] = MappingProxyType(
    {"uniform": _uniform, "usage": _usage, "expert": _one_expert, "task": _one_task}
)
"""What stands before the colon of a strategy -> the plain LoRA of each linear, given the mixture,
what stands after the colon, and the text."""


def _take_no_argument(kind: str, argument: str) -> None:
    if argument:
        raise ValueError(f"strategy {kind!r} takes nothing after it, found {argument!r}")


def _bank(layer: LinearMixture) -> ConstantBank:
    bank = layer.bank
    assert isinstance(bank, ConstantBank)
    return bank


def _no_weights(bank: ConstantBank) -> Tensor:
    return torch.zeros(num_slots(bank), dtype=torch.float64)


def _task_score(router: object) -> TaskScore | None:
    """The table by task of a router that looks at nothing else, or None."""
    score = router.score if isinstance(router, ComposedRouter | TaskSkills) else None
    return score if isinstance(score, TaskScore) else None
