"""The ops with their Triton kernels, wherever the tests run."""

from collections.abc import Iterator

import pytest
import torch

from moeroute_kernels import cuda, lora_form


@pytest.fixture
def triton_ops(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let the ops run their Triton kernels on CPU tensors; a GPU's dispatch finds them itself."""
    if torch.cuda.is_available():
        yield
        return
    monkeypatch.setattr(lora_form, "runs_directly", lambda tensor: False)
    with torch.library._scoped_library("moeroute", "IMPL") as library:
        for name, kernel in cuda.KERNELS.items():
            library.impl(name, kernel, "CPU")
        yield
