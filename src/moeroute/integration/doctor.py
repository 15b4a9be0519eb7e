"""What will silently not work, said out loud."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from peft import PeftType
from torch import nn

from moeroute.integration.adapters.site_host import SiteHost
from moeroute.integration.experts_report import asks_for_moeroute, experts_report
from moeroute.layers.routed import routed_layers

Severity = Literal["error", "warning", "info"]
STACK_NDIM = 3


@dataclass(frozen=True, kw_only=True, slots=True)
class Finding:
    """One thing that does not do what its owner believes.

    Attributes:
        module: Full module name, "" for the model itself.
        problem: What is wrong.
        mend: What to do about it.
        severity: "error" will raise, "warning" is silently wrong, "info" is worth knowing.
    """

    module: str
    problem: str
    mend: str
    severity: Severity

    def __str__(self) -> str:
        """One line."""
        return f"{self.severity}: {self.module or '(model)'}: {self.problem}. {self.mend}"


def doctor(model: nn.Module) -> list[Finding]:
    """Examine a model for what is ignored, dropped or untrained without a word.

    Nothing is changed and nothing is run.

    Args:
        model: Any model: a checkpoint, a wrapped model, or one made of moeroute layers.

    Returns:
        The findings, errors first; empty if nothing was found.
    """
    findings = [finding for check in CHECKS for finding in check(model)]
    order: dict[Severity, int] = {"error": 0, "warning": 1, "info": 2}
    return sorted(findings, key=lambda finding: order[finding.severity])


def _ignored_experts(model: nn.Module) -> Iterator[Finding]:
    report = experts_report(model)
    if not any(asks_for_moeroute(module) for module in model.modules()):
        return
    for name, class_name in report.ignored:
        yield Finding(
            module=name,
            problem=f'experts_implementation="moeroute" has no effect on {class_name}',
            mend="This family computes its experts itself; choose another implementation or family",
            severity="warning",
        )
    for name in report.fp8:
        yield Finding(
            module=name,
            problem='experts_implementation="moeroute" cannot compute FP8 experts and will raise',
            mend="Dequantise on load, or model.set_experts_implementation('grouped_mm')",
            severity="error",
        )


def _reentrant_checkpointing(model: nn.Module) -> Iterator[Finding]:
    charged = [name for name, layer in routed_layers(model) if layer.losses]
    if not charged:
        return
    for name, module in model.named_modules():
        function = getattr(module, "_gradient_checkpointing_func", None)
        if not getattr(module, "gradient_checkpointing", False):
            continue
        if isinstance(function, functools.partial) and function.keywords.get("use_reentrant"):
            yield Finding(
                module=name,
                problem=f"reentrant checkpointing takes the gradient of {len(charged)} layers' "
                "auxiliary losses; training will raise",
                mend='Pass gradient_checkpointing_kwargs={"use_reentrant": False}',
                severity="error",
            )
            return


def _missing_balance_loss(model: nn.Module) -> Iterator[Finding]:
    config = getattr(model, "config", None)
    coefficient = getattr(config, "router_aux_loss_coef", None)
    if not model.training or not coefficient or getattr(config, "output_router_logits", True):
        return
    if any(parameter.requires_grad for parameter in model.parameters()):
        yield Finding(
            module="",
            problem=f"router_aux_loss_coef={coefficient} is not used: output_router_logits is off, "
            "so the model adds no balance loss",
            mend="Set model.config.output_router_logits = True to train with it",
            severity="info",
        )


def _untrained_adapters(model: nn.Module) -> Iterator[Finding]:
    hosts = [module for module in model.modules() if isinstance(module, SiteHost)]
    if not hosts or not model.training:
        return
    parameters = [parameter for host in hosts for parameter in host.moeroute_site.parameters()]
    if not any(parameter.requires_grad for parameter in parameters):
        yield Finding(
            module="",
            problem=f"the model is in training mode but none of its {len(parameters)} adapter "
            "tensors takes a gradient",
            mend="Load with is_trainable=True, or activate an adapter with set_adapter(name)",
            severity="warning",
        )


def _idle_targets(model: nn.Module) -> Iterator[Finding]:
    names = [name.replace(".base_layer", "") for name, _ in model.named_modules()]
    for adapter, config in _peft_configs(model).items():
        targets = getattr(config, "target_modules", None)
        if not isinstance(targets, (list, set, tuple)):
            continue
        for target in sorted(targets):
            if not any(name == target or name.endswith("." + target) for name in names):
                yield Finding(
                    module="",
                    problem=f"adapter {adapter!r} targets {target!r}, which no module is called",
                    mend="Correct or remove the entry of target_modules",
                    severity="warning",
                )


def _untouched_experts(model: nn.Module) -> Iterator[Finding]:
    stacks = _expert_stacks(model)
    for adapter, config in _peft_configs(model).items():
        is_lora = config.peft_type == PeftType.LORA
        if stacks and is_lora and not getattr(config, "target_parameters", None):
            yield Finding(
                module=stacks[0],
                problem=f"adapter {adapter!r} leaves {len(stacks)} stacks of experts frozen: they "
                "are 3-D parameters, which target_modules cannot match",
                mend='Name them, as in LoraConfig(target_parameters=["mlp.experts.gate_up_proj"])',
                severity="warning",
            )


def _unquantised_experts(model: nn.Module) -> Iterator[Finding]:
    quantised = any(type(module).__name__ in QUANTISED for module in model.modules())
    stacks = _expert_stacks(model) if quantised else []
    if stacks:
        yield Finding(
            module=stacks[0],
            problem=f"the linears are quantised but {len(stacks)} stacks of experts are not, and "
            "hold most of the memory",
            mend="Quantise them by parameter name (torchao's FqnToConfig), or plan for the memory",
            severity="warning",
        )


def _low_precision_routers(model: nn.Module) -> Iterator[Finding]:
    for name, layer in routed_layers(model):
        dtypes = {parameter.dtype for parameter in layer.router.parameters()}
        if dtypes & {torch.float16, torch.bfloat16}:
            yield Finding(
                module=name,
                problem=f"the router's weights are kept in {dtypes.pop()}, too coarse for small "
                "learning rates",
                mend="Keep routers in float32: layer.router.float()",
                severity="info",
            )


def _expert_stacks(model: nn.Module) -> list[str]:
    return [
        name
        for name in experts_report(model).dispatched
        if any(
            parameter.ndim == STACK_NDIM and parameter.is_floating_point()
            for parameter in model.get_submodule(name).parameters(recurse=False)
        )
    ]


def _peft_configs(model: nn.Module) -> dict[str, Any]:
    configs = getattr(model, "peft_config", None)
    return configs if isinstance(configs, dict) else {}


QUANTISED = frozenset({"Linear4bit", "Linear8bitLt"})
CHECKS: tuple[Callable[[nn.Module], Iterator[Finding]], ...] = (
    _ignored_experts,
    _reentrant_checkpointing,
    _missing_balance_loss,
    _untrained_adapters,
    _idle_targets,
    _untouched_experts,
    _unquantised_experts,
    _low_precision_routers,
)
