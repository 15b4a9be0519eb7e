"""What `import moeroute` offers: few names, all of them documented, all of them there."""

import importlib
import inspect
import types

import pytest
from torch import nn

import moeroute
import moeroute_kernels

RELIED_ON = {
    "MoELayer",
    "MoeRouteConfig",
    "RoutingCallback",
    "aux_losses",
    "doctor",
    "get_method",
    "layers",
    "list_methods",
    "losses",
    "routers",
    "track_routing",
    "unwrap_model",
    "wrap_model",
}
KERNELS = {"combine", "expert_sort", "gated_lora", "grouped_mm", "reference", "routed_mlp"}
PACKAGES = [
    "moeroute",
    "moeroute.layers",
    "moeroute.losses",
    "moeroute.routers",
    "moeroute_kernels",
]


@pytest.mark.parametrize("package", PACKAGES)
def test_all_is_sorted_without_repeats_and_resolves(package: str):
    module = importlib.import_module(package)
    names = [*module.__all__]
    assert names == sorted(set(names))
    assert [name for name in names if getattr(module, name, None) is None] == []


def test_there_are_at_most_thirty_names():
    assert len(moeroute.__all__) <= 30


def test_names_that_others_rely_on_are_public():
    assert set(moeroute.__all__) >= RELIED_ON
    assert set(moeroute_kernels.__all__) >= KERNELS


@pytest.mark.parametrize("package", PACKAGES)
def test_every_public_name_is_documented(package: str):
    module = importlib.import_module(package)
    public = {name: getattr(module, name) for name in module.__all__ if name != "__version__"}
    described = {name: value for name, value in public.items() if is_code(value)}
    assert [name for name, value in described.items() if len(own_doc(value)) < 20] == []
    assert "wrap_model" in described or package != "moeroute"


@pytest.mark.parametrize("package", PACKAGES)
def test_public_signatures_are_annotated(package: str):
    module = importlib.import_module(package)
    for name in module.__all__:
        value = getattr(module, name)
        if not is_code(value) or inspect.ismodule(value) or is_protocol(value):
            continue
        parameters = inspect.signature(value).parameters.values()
        assert [p.name for p in parameters if p.annotation is p.empty] == [], f"{package}.{name}"


def test_names_that_are_loaded_on_use_show_in_dir():
    assert set(moeroute.__all__) <= set(dir(moeroute))


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="wrap_modl"):
        _ = moeroute.wrap_modl


def test_routers_is_a_subpackage_and_a_function():
    assert isinstance(moeroute.routers, types.ModuleType)
    assert (
        moeroute.routers.ComposedRouter
        is importlib.import_module("moeroute.routers.composed").ComposedRouter
    )
    layer = moeroute.MoELayer.build(hidden_size=4, intermediate_size=8, num_experts=3, top_k=2)
    found = moeroute.routers(nn.ModuleDict({"ffn": layer}))
    assert list(found.values()) == [layer.router]


def is_code(value: object) -> bool:
    return inspect.ismodule(value) or inspect.isclass(value) or callable(value)


def is_protocol(value: object) -> bool:
    return inspect.isclass(value) and getattr(value, "_is_protocol", False)


def own_doc(value: object) -> str:
    """The docstring of this very object, not one that a class inherits or a dataclass makes."""
    text = (vars(value).get("__doc__") if inspect.isclass(value) else value.__doc__) or ""
    return "" if inspect.isclass(value) and text.startswith(f"{value.__name__}(") else text
