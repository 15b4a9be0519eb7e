"""The library's uninitialised memory is NaN in tests; everybody else's is left alone."""

from types import ModuleType

import pytest
import torch
from torch import Tensor

ALLOCATIONS = [
    "torch.empty(3)",
    "torch.empty((3,), dtype=torch.float64, requires_grad=True)",
    "torch.empty_like(torch.zeros(3, dtype=torch.bfloat16))",
    "torch.empty_strided((3,), (2,))",
    "torch.zeros(2).new_empty(3)",
    "torch.zeros(2).new_empty_strided((3,), (1,))",
]


def allocate_in(module_name: str, expression: str) -> Tensor:
    """Evaluate the expression as code of a module of that name."""
    module = ModuleType(module_name)
    exec(f"import torch\ndef allocate():\n    return {expression}", vars(module))
    return module.allocate()


@pytest.mark.parametrize("expression", ALLOCATIONS)
@pytest.mark.parametrize("module_name", ["moeroute.layers.moe", "moeroute_kernels.combine"])
def test_memory_of_the_library_is_nan(module_name: str, expression: str):
    assert allocate_in(module_name, expression).isnan().all()


@pytest.mark.parametrize(
    ("module_name", "is_ours"),
    [
        ("moeroute", True),
        ("moeroute.layers.moe", True),
        ("moeroutes", False),
        ("torch.nn", False),
        ("transformers.modeling_utils", False),
    ],
)
def test_memory_of_others_is_left_alone(module_name: str, is_ours: bool):
    called = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            called.append(func.__name__)
            return func(*args, **(kwargs or {}))

    with Watch():
        allocate_in(module_name, "torch.empty(3)")
    assert ("fill_" in called) == is_ours


def test_integers_and_meta_tensors_pass():
    assert allocate_in("moeroute.ops", "torch.empty(3, dtype=torch.int64)").dtype == torch.int64
    assert allocate_in("moeroute.ops", "torch.empty(3, device='meta')").is_meta


def test_a_device_block_still_places_what_is_allocated_in_it():
    with torch.device("meta"):
        assert torch.empty(3).is_meta
        assert allocate_in("moeroute.layers", "torch.empty(3)").is_meta


def test_compiled_library_code_still_traces():
    module = ModuleType("moeroute.ops.sample")
    exec("import torch\ndef copy(x):\n    return torch.empty_like(x).copy_(x)", vars(module))
    compiled = torch.compile(module.copy, fullgraph=True, backend="eager")
    assert compiled(torch.arange(3.0)).tolist() == [0.0, 1.0, 2.0]
