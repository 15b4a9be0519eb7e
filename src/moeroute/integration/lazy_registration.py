"""Registers "moeroute" with transformers at the moment transformers is imported, not before.

`import moeroute` must stay about as cheap as `import torch`, yet
`from_pretrained(..., experts_implementation="moeroute")` must find the name. So a finder on
`sys.meta_path` waits for the modules that hold transformers' two registries of experts functions,
lets the regular finders load them, and registers right after their code has run. A registry that is
loaded already is filled at once; a reloaded one is filled again.

This module imports neither torch nor transformers.
"""

from __future__ import annotations

import importlib
import sys
from importlib.abc import Loader, MetaPathFinder
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

IMPLEMENTATION = "moeroute"


def _register_experts(module: ModuleType) -> None:
    from moeroute.integration.experts_function import moeroute_experts_forward

    module.ExpertsInterface.register(IMPLEMENTATION, moeroute_experts_forward)


def _register_fp8_experts(module: ModuleType) -> None:
    from moeroute.integration.experts_function import refuse_fp8_experts

    module.FP8ExpertsInterface.register(IMPLEMENTATION, refuse_fp8_experts)


def _watch_ignored_experts(_: ModuleType) -> None:
    from moeroute.integration.experts_report import watch_construction

    watch_construction()


def _register_peft_method(_: ModuleType) -> None:
    importlib.import_module("moeroute.integration.adapters.peft_method")


WATCHED: Mapping[str, Callable[[ModuleType], None]] = MappingProxyType(
    {
        "transformers.integrations.moe": _register_experts,
        "transformers.integrations.finegrained_fp8": _register_fp8_experts,
        "peft": _register_peft_method,
        "transformers.modeling_utils": _watch_ignored_experts,
    }
)


class _RegisteringLoader(Loader):
    """The module's own loader, with one call after its code has run."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        self._loader.exec_module(module)
        WATCHED[module.__name__](module)

    def __getattr__(self, name: str) -> Any:
        if name == "_loader":
            raise AttributeError(name)
        return getattr(self._loader, name)


class PostImportFinder(MetaPathFinder):
    """Finds the watched modules where the other finders find them."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Answer for a watched module only; None leaves every other one to the regular finders."""
        if fullname not in WATCHED:
            return None
        for finder in sys.meta_path:
            if finder is self or isinstance(finder, PostImportFinder):
                continue
            spec = finder.find_spec(fullname, path, target)
            if spec is not None:
                if spec.loader is not None and not isinstance(spec.loader, _RegisteringLoader):
                    spec.loader = _RegisteringLoader(spec.loader)
                return spec
        return None


def install() -> None:
    """Register now with what is loaded, later with what is not; calling it again is harmless."""
    if not any(isinstance(finder, PostImportFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, PostImportFinder())
    for name, register in WATCHED.items():
        if sys.modules.get(name) is not None:
            register(importlib.import_module(name))


def uninstall() -> None:
    """Take the finder away again; what is registered stays registered."""
    sys.meta_path[:] = [
        finder for finder in sys.meta_path if not isinstance(finder, PostImportFinder)
    ]
