"""The ops with their Triton kernels, wherever the tests run."""

import importlib
from collections.abc import Iterator

import pytest
import torch

from moeroute_kernels import cuda


@pytest.fixture
def triton_ops(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the ops run their Triton kernels on CPU tensors; a GPU's dispatch finds them itself."""
    if torch.cuda.is_available():
        yield
        return
    lora = importlib.import_module("moeroute_kernels.gated_lora")
    monkeypatch.setattr(lora, "_runs_directly", lambda tensor: False)
    with torch.library._scoped_library("moeroute", "IMPL") as library:
        for name, kernel in cuda.KERNELS.items():
            library.impl(name, kernel, "CPU")
        yield
