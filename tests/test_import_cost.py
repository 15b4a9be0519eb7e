"""`import moeroute` costs about what `import torch` costs, and `moeroute_kernels` no more."""

import subprocess
import sys
import time

import pytest

import moeroute

HEAVY = (
    "transformers",
    "peft",
    "accelerate",
    "triton",
    "matplotlib",
    "rich",
    "typer",
    "tokenizers",
)
ROUNDS = 5
ALLOWED_RATIO = 1.3


def run_python(code: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True, timeout=120
    )
    return done.stdout


@pytest.mark.parametrize("package", ["moeroute", "moeroute_kernels"])
def test_import_leaves_heavy_packages_out(package: str):
    """What torch itself imports (numpy, and triton where it probes for it) is not our doing."""
    code = (
        "import sys, torch; before = set(sys.modules)\n"
        f"import {package}\n"
        "print(*sorted({name.partition('.')[0] for name in set(sys.modules) - before}))"
    )
    assert set(run_python(code).split()) & set(HEAVY) == set()


@pytest.mark.parametrize("package", ["moeroute", "moeroute_kernels"])
def test_import_without_torch_first_leaves_transformers_and_peft_out(package: str):
    code = f"import sys, {package}; print(*(name for name in {HEAVY!r} if name in sys.modules))"
    assert run_python(code).split() == []


def test_the_floors_below_integration_need_neither_transformers_nor_peft():
    """Layers, routers and methods work where transformers and peft cannot be imported at all."""
    code = (
        "import sys, torch\n"
        "class Absent:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in ('transformers', 'peft', 'accelerate', 'triton'):\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Absent())\n"
        "import moeroute\n"
        "layer = moeroute.MoELayer.build(\n"
        "    hidden_size=4, intermediate_size=8, num_experts=3, top_k=2)\n"
        "print(tuple(layer(torch.ones(1, 2, 4)).shape), *moeroute.list_methods())"
    )
    shape, *methods = run_python(code).rpartition(")")
    assert shape == "(1, 2, 4"
    assert methods[-1].split() == moeroute.list_methods()


def test_import_takes_about_as_long_as_torch():
    """The fastest of several runs each, interleaved: a busy machine slows some runs, not all."""
    fastest = {"torch": float("inf"), "moeroute": float("inf")}
    run_python("import moeroute")
    for _ in range(ROUNDS):
        for package in fastest:
            start = time.perf_counter()
            run_python(f"import {package}")
            fastest[package] = min(fastest[package], time.perf_counter() - start)
        if fastest["moeroute"] < ALLOWED_RATIO * fastest["torch"]:
            break
    assert fastest["moeroute"] < ALLOWED_RATIO * fastest["torch"], fastest
