"""Every shipped kernel compiles for a GPU that is not there, and fits it."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="the kernels are written in Triton")
ROOT = Path(__file__).parents[2]
HOPPER_BYTES = 232_448
SMALL_BYTES = 101_376
"""Shared memory of one program on sm_90 and sm_120."""


def compile_for(arch: int, folder: Path) -> list[dict[str, Any]]:
    """What `python -m benchmarks.aot` finds, in a process without the interpreter.

    The command itself fails where a kernel spills registers or wants more shared memory than the
    device has.
    """
    out = folder / "aot.json"
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-m", "benchmarks.aot", "--arch", str(arch), "--json", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(out.read_text())


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """For Hopper."""
    return compile_for(90, tmp_path_factory.mktemp("aot"))


@pytest.mark.slow
def test_half_precision_products_use_the_tensor_cores_of_hopper(compiled: list[dict[str, Any]]):
    half = [row for row in compiled if row["has_product"] and not row["case"].endswith("fp32")]
    assert {row["kernel"] for row in half} == {
        "mlp_up_kernel",
        "mlp_inner_kernel",
        "mm_rows_kernel",
        "mm_weights_kernel",
    }
    assert not [row for row in half if row["tensor_cores"] != "wgmma"]


@pytest.mark.slow
def test_weights_of_half_precision_come_by_tma(compiled: list[dict[str, Any]]):
    reading = {"mlp_up_kernel", "mlp_inner_kernel", "mm_rows_kernel"}
    half = [r for r in compiled if r["kernel"] in reading and not r["case"].endswith("fp32")]
    assert half
    assert not [row for row in half if not row["tma"]]


@pytest.mark.slow
def test_nothing_spills_on_hopper_and_all_of_it_fits(compiled: list[dict[str, Any]]):
    assert not [row for row in compiled if row["spilled"]]
    assert max(row["shared"] for row in compiled) <= HOPPER_BYTES


@pytest.mark.slow
def test_inference_over_many_rows_takes_wide_tiles(compiled: list[dict[str, Any]]):
    wide = {row["kernel"] for row in compiled if row["constants"].get("COLUMNS") == 256}
    assert wide == {"mlp_up_kernel", "mm_rows_kernel"}


@pytest.mark.slow
def test_one_token_is_not_sorted(compiled: list[dict[str, Any]]):
    """The kernels without the tiles' starts are compiled, too."""
    unsorted = {row["kernel"] for row in compiled if row["constants"].get("starts_ptr", 0) is None}
    assert unsorted == {"mlp_up_kernel", "mm_rows_kernel"}


@pytest.mark.slow
def test_a_smaller_device_gets_fewer_stages(tmp_path: Path):
    rows = compile_for(120, tmp_path)
    assert not [row for row in rows if row["spilled"]]
    assert SMALL_BYTES // 2 < max(row["shared"] for row in rows) <= SMALL_BYTES


COUNT = """
import torch
from benchmarks.aot import compiling, run_routed_mlp
from moeroute_kernels.cpu_routed_mlp import Form

form = Form("silu_glu", False, 1.702, float("inf"))
with compiling(90) as found:
    counts = []
    for tokens in range(33, 53):
        run_routed_mlp(tokens, torch.bfloat16, form, bias=False)
        counts.append(len(found))
print(*counts)
"""


@pytest.mark.slow
def test_another_number_of_tokens_compiles_nothing():
    environment = {**os.environ, "TRITON_INTERPRET": "0"}
    command = [sys.executable, "-c", COUNT]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    counts = done.stdout.split()
    assert len(counts) == 20
    assert len(set(counts)) == 1
