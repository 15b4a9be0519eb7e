"""Which expert modules of a model listen to the experts registry, and a warning about the others.

A family without transformers' `use_experts_implementation` decorator computes its experts itself,
whatever `experts_implementation` says. `get_experts_implementation()` still answers "moeroute" for
it, so nothing but this report tells.
"""

from __future__ import annotations

import functools
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from moeroute.integration.families import EXPERTS_OUTSIDE_REGISTRY
from moeroute.integration.lazy_registration import IMPLEMENTATION

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

_OUTSIDE = frozenset(name for names in EXPERTS_OUTSIDE_REGISTRY.values() for name in names)


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertsReport:
    """The expert modules of one model, by full module name.

    Attributes:
        dispatched: Modules whose computation the registry decides.
        fp8: Modules decided by the registry for FP8 experts, in which moeroute only raises.
        ignored: (module name, class name) of experts that compute themselves, whatever
            `experts_implementation` says.
    """

    dispatched: tuple[str, ...]
    fp8: tuple[str, ...]
    ignored: tuple[tuple[str, str], ...]


def experts_report(model: nn.Module) -> ExpertsReport:
    """Sort the expert modules of a model by who decides their computation.

    Args:
        model: Any model; a dense one gives an empty report.
    """
    dispatched, fp8, ignored = [], [], []
    for name, module in model.named_modules():
        class_name = type(module).__name__
        if is_dispatched(module):
            (fp8 if class_name == "FP8Experts" else dispatched).append(name)
        elif _computes_experts_itself(module):
            ignored.append((name, class_name))
    return ExpertsReport(dispatched=tuple(dispatched), fp8=tuple(fp8), ignored=tuple(ignored))


def is_dispatched(module: nn.Module) -> bool:
    """Whether transformers' `use_experts_implementation` decorates the module's class."""
    own = vars(module)
    return (
        "has_gate" in own
        and "is_transposed" in own
        and hasattr(type(module).forward, "__wrapped__")
    )


def warn_if_ignored(model: nn.Module) -> ExpertsReport:
    """Warn about experts that ignore `experts_implementation="moeroute"`.

    Args:
        model: A model whose config may ask for moeroute; otherwise nothing is said.

    Returns:
        The report that the warning is about.
    """
    report = experts_report(model)
    if report.ignored and asks_for_moeroute(model):
        warnings.warn(_message(report), stacklevel=2)
    return report


@functools.cache
def watch_construction() -> RemovableHandle:
    """Have the same said while a model is built, so that loading it is enough to hear it.

    Uses torch's own hook on the registration of submodules: it looks at those registrations whose
    parent's config asks for moeroute, and changes nothing. Installed once a process.

    Returns:
        The handle that takes the hook away again.
    """
    return register_module_module_registration_hook(_on_registration)


def _on_registration(parent: nn.Module, _: str, child: nn.Module | None) -> None:
    if child is None or not _is_asking_model(parent) or any(map(_is_asking_model, child.modules())):
        return
    report = experts_report(child)
    if report.ignored:
        warnings.warn(_message(report), stacklevel=2)


def _is_asking_model(module: nn.Module) -> bool:
    return hasattr(type(module), "get_experts_implementation") and asks_for_moeroute(module)


def asks_for_moeroute(module: nn.Module) -> bool:
    """Whether the module's config names moeroute as its experts implementation."""
    config = getattr(module, "config", None)
    return getattr(config, "_experts_implementation", None) == IMPLEMENTATION


def _computes_experts_itself(module: nn.Module) -> bool:
    kind = type(module)
    if kind.__module__.partition(".")[0] == "moeroute":
        return False
    return kind.__name__ in _OUTSIDE or kind.__name__.endswith("Experts")


def _message(report: ExpertsReport) -> str:
    classes = sorted({class_name for _, class_name in report.ignored})
    return (
        f'experts_implementation="{IMPLEMENTATION}" has no effect on {", ".join(classes)}: this '
        "family does not use transformers' experts registry and computes its experts itself. "
        "The model runs as without moeroute; `moeroute.doctor(model)` lists the modules"
    )
