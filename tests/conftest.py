"""What every test shares: no network, fixed seeds, and uninitialised memory that shows itself."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("MPLBACKEND", "Agg")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start

import functools
import random
import sys
from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils import _device

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # read when triton is imported

POISONED_CALLERS = ("moeroute", "moeroute_kernels")
ALLOCATORS = (
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_strided"),
    (torch.Tensor, "new_empty"),
    (torch.Tensor, "new_empty_strided"),
)


def poisoned(allocate: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The same allocator, but what the library gets from it is NaN until it is written.

    Memory that nobody wrote is often zero by chance, so an operator that forgets some rows passes
    its tests. Only calls from the library's own files are changed: Hugging Face and torch itself
    build models from `torch.empty` and pay nothing but one look at the calling frame.
    """

    @functools.wraps(allocate)
    def wrapper(*args: object, **kwargs: object) -> Tensor:
        tensor = allocate(*args, **kwargs)
        if torch.compiler.is_compiling():
            return tensor
        caller = sys._getframe(1).f_globals.get("__name__", "").partition(".")[0]
        if caller in POISONED_CALLERS and (tensor.is_floating_point() or tensor.is_complex()):
            with torch.no_grad():
                tensor.fill_(float("nan"))
        return tensor

    return wrapper


@pytest.fixture(autouse=True, scope="session")
def poison_uninitialised_memory() -> Iterator[None]:
    """Fill with NaN every floating tensor that the library allocates without a value."""
    # `with torch.device(...)` looks the factories up once and for all; let it see torch's own.
    _device._device_constructors()
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in ALLOCATORS:
            patch.setattr(owner, name, poisoned(getattr(owner, name)))
        yield


@pytest.fixture(autouse=True)
def seed_everything() -> None:
    """Give each test the same random numbers, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def forget_compiled_code() -> Iterator[None]:
    """Let no test meet the compiler's limit on recompilations because of those before it."""
    yield
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
