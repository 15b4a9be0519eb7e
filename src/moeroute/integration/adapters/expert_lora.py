"""LoRA on the experts of a MoE checkpoint, without rebuilding their weights at every forward.

PEFT adapts a stack of experts by a wrapper that adds `scaling * B A` to the whole stack before the
experts run. Here the wrapper lends its two factors to the experts instead, which multiply the rows
by them. PEFT's modules, parameters, files and functions stay as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Self

from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from moeroute.integration.experts_function import (
    SECOND,
    ExpertLora,
    expert_weights,
    experts_forward_with_lora,
    first_name,
)
from moeroute.integration.experts_report import is_dispatched

ACTIVATE = "_activate_lora"
FORWARD = "forward"
FORWARD_BEHIND_HOOK = "_old_forward"
STACK_NDIM = 3


class FastExpertLora:
    """The way back from `fast_expert_lora`: call `remove`, or leave the `with` block.

    Args:
        model: The model whose experts are fast now.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def remove(self) -> None:
        """Give PEFT's own path back; a second time does nothing."""
        restore_expert_lora(self.model)

    def __enter__(self) -> Self:
        """The handle."""
        return self

    def __exit__(self, *_: object) -> None:
        """Remove."""
        self.remove()


def fast_expert_lora(model: nn.Module, *, lora_dropout: float = 0.0) -> FastExpertLora:
    """Compute PEFT's LoRA on the experts of a MoE checkpoint in factored form.

    For models adapted by `peft.LoraConfig(target_parameters=["experts.gate_up_proj",
    "experts.down_proj"])`, one of the two or both, any rank. Outputs and gradients are those of
    PEFT up to rounding; the cost is about that of the experts alone. Everything else stays PEFT's:
    files, several adapters, `set_adapter`, `disable_adapter`, merging; adapters that are added or
    loaded later are fast as well. While an adapter is active the experts run on moeroute's ops,
    whatever `experts_implementation` says; with none active, or merged, the model's own
    implementation runs. LoRA on 2-D parameters, such as a router's weight or the experts' biases,
    is left to PEFT.

    Args:
        model: A model that carries such an adapter: a PeftModel, or a transformers model with
            `add_adapter`. Changed in place.
        lora_dropout: Probability of zeroing an element of the adapters' input in training, drawn
            for each token and expert; the frozen experts see all of it. PEFT has no dropout on
            parameters, so its config cannot hold this number: give it again after loading.

    Returns:
        The handle that undoes it; also a context manager.

    Raises:
        ValueError: No expert stack is adapted, the experts compute themselves (Llama4 and others),
            another stack than the two is adapted, the experts' forward is replaced already, or
            lora_dropout is outside [0, 1). Nothing is changed then.
        TypeError: The experts are quantised.

    Example:
        >>> model = peft.get_peft_model(model, LoraConfig(target_parameters=[...]))
        >>> moeroute.fast_expert_lora(model)
    """
    if not 0.0 <= lora_dropout < 1.0:
        raise ValueError(f"lora_dropout={lora_dropout} is no probability; give one in [0, 1)")
    places = _places(model)
    for name, wrappers, experts in places:
        _check_place(name, wrappers, experts)
    if not places:
        raise ValueError(
            f"{type(model).__name__} has no LoRA on stacked experts; adapt them first: "
            'peft.get_peft_model(model, LoraConfig(target_parameters=["experts.gate_up_proj", '
            '"experts.down_proj"]))'
        )
    for _, wrappers, experts in places:
        lent: dict[str, list[ExpertLora]] = {}
        for wrapper in wrappers:
            setattr(wrapper, ACTIVATE, _Lend(wrapper, lent, lora_dropout))
        setattr(experts, _forward_slot(experts), _Forward(experts, lent))
    return FastExpertLora(model)


def is_fast_expert_lora(model: nn.Module) -> bool:
    """Whether `fast_expert_lora` was called on a model and not undone."""
    return any(_replaced_slot(module) for module in model.modules())


def restore_expert_lora(model: nn.Module) -> None:
    """Undo `fast_expert_lora` wherever it was done in a model, PEFT's wrappers there or not."""
    for module in model.modules():
        if isinstance(vars(module).get(ACTIVATE), _Lend):
            delattr(module, ACTIVATE)
        slot = _replaced_slot(module)
        if slot == FORWARD:
            delattr(module, slot)
        elif slot:
            setattr(module, slot, type(module).forward.__get__(module))


class _Lend:
    """Stands in the place of a wrapper's `_activate_lora`: lends its factors for one call."""

    def __init__(
        self, wrapper: ParamWrapper, lent: dict[str, list[ExpertLora]], dropout: float
    ) -> None:
        self.wrapper = wrapper
        self.lent = lent
        self.dropout = dropout

    @contextmanager
    def __call__(self, active_adapters: list[str]) -> Iterator[None]:
        wrapper = self.wrapper
        found = [self._factors(name) for name in active_adapters if name in wrapper.lora_A]
        if not found:
            yield
            return
        self.lent[wrapper.parameter_name] = found
        try:
            yield
        finally:
            del self.lent[wrapper.parameter_name]

    def _factors(self, name: str) -> ExpertLora:
        """PEFT's factors as (E, R, in) and (E, out, R): it keeps A by expert, B by rank."""
        wrapper: Any = self.wrapper
        lora_a, lora_b = wrapper.lora_A[name].weight, wrapper.lora_B[name].weight
        size = wrapper.num_experts
        return ExpertLora(
            lora_a.unflatten(0, (size, -1)),
            lora_b.unflatten(1, (-1, size)).permute(2, 0, 1),
            wrapper.scaling[name],
            self.dropout if wrapper.training else 0.0,
        )


class _Forward:
    """Stands in the place of the experts' forward: takes what the wrappers lend."""

    def __init__(self, experts: nn.Module, lent: dict[str, list[ExpertLora]]) -> None:
        self.experts = experts
        self.lent = lent

    def __call__(self, hidden_states: Tensor, ids: Tensor, weights: Tensor, /) -> Tensor:
        if not self.lent:
            return type(self.experts).forward(self.experts, hidden_states, ids, weights)
        return experts_forward_with_lora(self.experts, hidden_states, ids, weights, self.lent)


def _places(model: nn.Module) -> list[tuple[str, list[ParamWrapper], nn.Module]]:
    """Adapted expert stacks: (full name, the wrappers of 3-D parameters, the experts)."""
    inner = {
        id(module.base_layer) for module in model.modules() if isinstance(module, ParamWrapper)
    }
    places = []
    for name, module in model.named_modules():
        if not isinstance(module, ParamWrapper) or id(module) in inner:
            continue
        wrappers, base = [], module
        while isinstance(base, ParamWrapper):
            wrappers.append(base)
            base = base.base_layer
        stacks = [wrapper for wrapper in wrappers if wrapper.get_param().ndim == STACK_NDIM]
        if stacks:
            places.append((name, stacks, base))
    return places


def _check_place(name: str, wrappers: list[ParamWrapper], experts: nn.Module) -> None:
    kind = type(experts).__name__
    if not is_dispatched(experts):
        raise ValueError(
            f"{name}: {kind} computes its experts itself instead of asking transformers' experts "
            "registry, so their LoRA cannot be made fast; leave this model to PEFT"
        )
    known = (first_name(experts), SECOND)
    for wrapper in wrappers:
        if wrapper.parameter_name not in known:
            raise ValueError(
                f"{name}: LoRA on {wrapper.parameter_name} of {kind} cannot be made fast, only on "
                f"{' and '.join(known)}; take it out of target_parameters"
            )
        if ACTIVATE in vars(wrapper):
            raise ValueError(
                f"{name}: the LoRA of these experts is fast already; call remove() of the first "
                "handle to begin anew"
            )
    if _forward_slot(experts) == FORWARD and FORWARD in vars(experts):
        raise ValueError(
            f"{name}: the forward of this {kind} was replaced by something else; undo that first"
        )
    expert_weights(experts)


def _forward_slot(experts: nn.Module) -> str:
    """Where the forward lies that is to be replaced: accelerate's hooks keep it aside."""
    return FORWARD_BEHIND_HOOK if "_hf_hook" in vars(experts) else FORWARD


def _replaced_slot(module: nn.Module) -> str:
    """Where a `_Forward` of ours lies; "" if there is none."""
    own = vars(module)
    slots = (FORWARD, FORWARD_BEHIND_HOOK)
    return next((slot for slot in slots if isinstance(own.get(slot), _Forward)), "")
