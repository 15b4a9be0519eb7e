"""`doctor`: what will silently not work with a model, said out loud."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from moeroute.integration.doctor_adapters import check_adapters
from moeroute.integration.experts_report import asks_for_moeroute, experts_report
from moeroute.integration.finding import Finding, several
from moeroute.integration.lazy_registration import IMPLEMENTATION
from moeroute.integration.routing_sources import find_sources
from moeroute.layers.post_step import stateful_parts
from moeroute.layers.routed import routed_layers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

HALF = (torch.float16, torch.bfloat16)
SELECTION_BIASES = ("e_score_correction_bias", "expert_bias", "selection_bias")
ROUTER_NAMES = ("gate", "router")
ROUTER_DEPTH = 3  # how far below the router its parameters may lie
QUANTISED_LINEARS = ("Linear4bit", "Linear8bitLt")
STACK_NDIM = 3


def doctor(model: nn.Module) -> list[Finding]:
    """List what is silently ineffective or wrong about a model as it stands.

    Looks at modules, parameters and configs only; runs nothing and changes nothing. Checks that
    speak of training look at a model in training mode.

    Args:
        model: A transformers model, wrapped or not, or any model with moeroute's layers.

    Returns:
        The findings, errors first; empty for a healthy model.

    Example:
        >>> for finding in moeroute.doctor(model):
        ...     print(finding)
    """
    findings = [finding for check in CHECKS for finding in check(model)]
    order = ("error", "warning", "info")
    return sorted(findings, key=lambda finding: order.index(finding.severity))


def has_aux_losses(model: nn.Module) -> bool:
    """True if a training forward adds auxiliary losses to the model's loss."""
    ours = any(layer.losses for _, layer in routed_layers(model))
    return ours or bool(_setting(model, "output_router_logits") and _aux_coefficient(model))


def reentrant_modules(model: nn.Module) -> list[str]:
    """Names of the modules that run under reentrant activation checkpointing."""
    return [name for name, module in model.named_modules() if _is_reentrant(module)]


def check_ignored_experts(model: nn.Module) -> Iterator[Finding]:
    """`experts_implementation="moeroute"` on a family that computes its experts itself."""
    ignored = experts_report(model).ignored
    if ignored and _asks(model):
        classes = ", ".join(sorted({class_name for _, class_name in ignored}))
        yield Finding(
            module=ignored[0][0],
            problem=f'experts_implementation="{IMPLEMENTATION}" has no effect on '
            f"{several(ignored, 'module')} ({classes}): the family computes its experts itself",
            mend="use the model as it is, without experts_implementation; the results are the same",
        )


def check_quantised_experts(model: nn.Module) -> Iterator[Finding]:
    """Experts in FP8, which moeroute cannot multiply, or in full precision in a quantised model."""
    report = experts_report(model)
    if report.fp8 and _asks(model):
        yield Finding(
            module=report.fp8[0],
            problem=f"{several(report.fp8, 'stack')} of FP8 experts cannot run with "
            f'experts_implementation="{IMPLEMENTATION}"; the first forward would raise',
            mend="load with quantization_config=FineGrainedFP8Config(dequantize=True), or "
            'model.set_experts_implementation("grouped_mm")',
            severity="error",
        )
    stacks = [name for name in report.dispatched if _has_float_stack(model.get_submodule(name))]
    if stacks and _is_quantised(model):
        yield Finding(
            module=stacks[0],
            problem=f"the linears are quantised, but {several(stacks, 'stack')} of experts stayed "
            "in full precision and hold most of the memory: bitsandbytes quantises linears only",
            mend="quantise the expert parameters by name with torchao (TorchAoConfig with "
            "FqnToConfig), or plan memory for full-precision experts",
        )


def check_router_precision(model: nn.Module) -> Iterator[Finding]:
    """Selection biases in half precision; in training, trainable router weights too."""
    biases = [
        name
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
        if name.rpartition(".")[2] in SELECTION_BIASES and tensor.dtype in HALF
    ]
    if biases:
        yield Finding(
            module=biases[0].rpartition(".")[0],
            problem=f"{several(biases, 'selection bias tensor')} in half precision: the small "
            "differences that choose the experts are rounded away",
            mend="keep them in float32: `module.e_score_correction_bias.data = ....float()`, or "
            "load with from_pretrained(dtype=...) instead of casting the model",
        )
    weights = [
        name
        for name, parameter in model.named_parameters()
        if model.training and parameter.requires_grad and parameter.dtype in HALF
    ]
    routers = _routers_of(weights)
    if routers:
        yield Finding(
            module=routers[0],
            problem=f"{several(routers, 'router')} would train in half precision: updates below "
            "its resolution are lost, and near ties are decided by rounding",
            mend="train a float32 model under autocast (TrainingArguments(bf16=True)), or freeze "
            "the routers",
        )


def check_reentrant_checkpointing(model: nn.Module) -> Iterator[Finding]:
    """Auxiliary losses that reentrant checkpointing would leave without a gradient."""
    names = reentrant_modules(model)
    if names and has_aux_losses(model):
        yield Finding(
            module=names[0],
            problem=f"reentrant activation checkpointing on {several(names, 'module')} takes the "
            "gradient of the auxiliary losses away: the routers would not learn from them",
            mend='gradient_checkpointing_kwargs={"use_reentrant": False}',
            severity="error",
        )


def check_balance_loss(model: nn.Module) -> Iterator[Finding]:
    """A checkpoint's routers in training without the balance loss that its family has."""
    if not model.training or has_aux_losses(model) or not _aux_coefficient(model):
        return
    if any(stateful_parts(layer.router) for _, layer in routed_layers(model)):
        return  # balance comes from a bias
    routers = _routers_of([n for n, p in model.named_parameters() if p.requires_grad])
    if routers and find_sources(model).readable:
        yield Finding(
            module=routers[0],
            problem=f"{several(routers, 'router')} would train without a balance loss: "
            "transformers computes it only if config.output_router_logits is True",
            mend="model.config.output_router_logits = True (weight: "
            f"config.router_aux_loss_coef = {_aux_coefficient(model):g}), or freeze the routers",
            severity="info",
        )


CHECKS: tuple[Callable[[nn.Module], Iterator[Finding]], ...] = (
    check_ignored_experts,
    check_quantised_experts,
    check_router_precision,
    check_reentrant_checkpointing,
    check_balance_loss,
    check_adapters,
)
"""Every check that `doctor` makes, in order."""


def _setting(model: nn.Module, name: str) -> Any:
    """A field of the model's config, or of its text model's."""
    config = getattr(model, "config", None)
    get_text_config = getattr(config, "get_text_config", None)
    text_config = get_text_config() if get_text_config is not None else None
    values = (getattr(found, name, None) for found in (config, text_config))
    return next((value for value in values if value is not None), None)


def _asks(model: nn.Module) -> bool:
    return any(asks_for_moeroute(module) for module in model.modules())


def _aux_coefficient(model: nn.Module) -> float:
    return float(_setting(model, "router_aux_loss_coef") or 0.0)


def _is_reentrant(module: nn.Module) -> bool:
    if getattr(module, "gradient_checkpointing", False) is not True:
        return False
    function = getattr(module, "_gradient_checkpointing_func", None)
    if isinstance(function, partial):
        return function.keywords.get("use_reentrant") is not False
    return function is checkpoint


def _routers_of(parameter_names: list[str]) -> list[str]:
    """The modules called gate or router that hold these parameters, each once."""
    found: dict[str, None] = {}
    for name in parameter_names:
        parts = name.split(".")[:-1]
        if "banks" in parts:  # LoRA experts by role, one of which is called gate
            continue
        for depth in range(len(parts), max(len(parts) - ROUTER_DEPTH, 0), -1):
            if parts[depth - 1] in ROUTER_NAMES:
                found[".".join(parts[:depth])] = None
                break
    return list(found)


def _has_float_stack(module: nn.Module) -> bool:
    stacks = [p for p in module.parameters(recurse=False) if p.ndim == STACK_NDIM]
    return any(isinstance(p, Tensor) and p.is_floating_point() for p in stacks)


def _is_quantised(model: nn.Module) -> bool:
    return any(type(module).__name__ in QUANTISED_LINEARS for module in model.modules())
