"""Compile every kernel ahead of time for a GPU that need not be there, and say what it takes.

    python -m benchmarks.aot                 # every shipped layout for sm_90
    python -m benchmarks.aot --arch 80

The launchers run as always, but a driver of our own names the device and every launch ends with the
compiler. The table shows registers, spilled bytes, shared memory, and tensor core instructions.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import triton
from rich.console import Console
from rich.table import Table
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from benchmarks.shapes import (
    COMPILED_RANK,
    COMPILED_SHAPE,
    COMPILED_SLOTS,
    COMPILED_TOKENS,
    DTYPES,
    EXPERT_SHAPES,
    WARP_THREADS,
)
from moeroute_kernels._triton import grouped_mm, lora, routed_mlp, sort
from moeroute_kernels._triton.config import SHARED_MEMORY
from moeroute_kernels.cpu_routed_mlp import Form, Weights
from moeroute_kernels.cpu_routed_mlp_backward import Needs

WIDTH = 150
SHAPE = EXPERT_SHAPES[COMPILED_SHAPE]
NUM_EXPERTS, HIDDEN, INNER = SHAPE.num_experts, SHAPE.hidden_size, SHAPE.intermediate_size


@dataclass(frozen=True, slots=True)
class Compiled:
    """One compiled kernel.

    Attributes:
        kernel: Its name.
        case: What was computed.
        constants: Its compile-time arguments.
        registers: Per thread.
        spilled: Bytes of registers that went to memory, stores and loads.
        shared: Bytes of shared memory.
        tensor_cores: "wgmma", "mma" or nothing.
        has_product: Whether it multiplies tiles.
        tma: Whether it reads a weight through the tensor memory accelerator.
    """

    kernel: str
    case: str
    constants: dict[str, Any]
    registers: int
    spilled: int
    shared: int
    tensor_cores: str
    has_product: bool
    tma: bool


class AbsentDevice:
    """As much of a Triton driver as the compiler asks for."""

    def __init__(self, arch: int) -> None:
        self._target = GPUTarget("cuda", arch, WARP_THREADS)

    def get_current_target(self) -> GPUTarget:
        """The device to compile for."""
        return self._target

    def get_current_device(self) -> int:
        """The first device."""
        return 0

    def get_current_stream(self, device: int) -> int:
        """The default stream."""
        return device


@contextmanager
def compiling(arch: int) -> Iterator[dict[str, Any]]:
    """Let launches end with the compiler; yields what was compiled, by name and key."""
    found: dict[str, Any] = {}
    inner = JITFunction.run

    def run(self: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernel = inner(self, *args, grid=grid, warmup=True, **options)
        found.setdefault(kernel.hash, kernel)
        return kernel

    driver.set_active(AbsentDevice(arch))  # type: ignore[arg-type]
    # nothing runs, so nothing is written: what is allocated must hold indices that exist
    with (
        patch.object(JITFunction, "run", run),
        patch.object(torch, "empty", torch.zeros),
        patch.object(torch, "empty_like", torch.zeros_like),
    ):
        yield found


def run_routed_mlp(tokens: int, dtype: torch.dtype, form: Form, *, bias: bool) -> None:
    """Forward with and without what backward needs, and backward with every gradient."""
    width = INNER if form.activation == "relu2" else 2 * INNER
    x = torch.zeros(tokens, HIDDEN, dtype=dtype)
    gate_up = torch.zeros(NUM_EXPERTS, width, HIDDEN, dtype=dtype)
    down = torch.zeros(NUM_EXPERTS, HIDDEN, INNER, dtype=dtype)
    biases = (gate_up[:, :, 0].contiguous(), down[:, :, 0].contiguous()) if bias else (None, None)
    weights = Weights(gate_up, down, *biases)
    ids = torch.zeros(tokens, SHAPE.top_k, dtype=torch.int64)
    scale = torch.zeros(tokens, SHAPE.top_k)
    routed_mlp.infer(x, weights, ids, scale, form)
    _, saved = routed_mlp.forward(x, weights, ids, scale, form)
    needs = Needs(True, True, True, True, bias, bias)
    routed_mlp.backward(x, x, weights, scale, saved, form, needs)


def run_grouped_mm(tokens: int, dtype: torch.dtype, *, transposed: bool) -> None:
    """Forward and backward with a bias."""
    x = torch.zeros(tokens * SHAPE.top_k, HIDDEN, dtype=dtype)
    weight = torch.zeros(NUM_EXPERTS, HIDDEN, HIDDEN, dtype=dtype)
    weight = weight.transpose(1, 2) if transposed else weight
    ends = torch.zeros(NUM_EXPERTS, dtype=torch.int32)
    bias = torch.zeros(NUM_EXPERTS, HIDDEN, dtype=dtype)
    grouped_mm.forward(x, weight, ends, bias)
    grouped_mm.backward(x, x, weight, ends, bias, [True, True, True])


def run_lora(tokens: int, dtype: torch.dtype) -> None:
    """The sorted form of a mixture of LoRA, forward and backward."""
    rank = COMPILED_RANK
    x = torch.zeros(tokens, HIDDEN, dtype=dtype)
    lora_a = torch.zeros(NUM_EXPERTS, rank, HIDDEN, dtype=dtype)
    lora_b = torch.zeros(HIDDEN, NUM_EXPERTS, rank, dtype=dtype)
    ids = torch.zeros(tokens, SHAPE.top_k, dtype=torch.int64)
    scale = torch.zeros(tokens, SHAPE.top_k)
    inputs = (x, x, lora_a, lora_b, ids, scale, 2.0, dtype)
    _, middle, order = lora.forward(*inputs)
    needs = [True, True, True, True]
    lora.backward(x, x, middle, order, lora_a, lora_b, ids, scale, 2.0, needs)


def cases() -> Iterator[tuple[str, Callable[[], object]]]:
    """Every kind of launch, by name."""
    forms = {
        "silu_glu": (Form("silu_glu", False, 1.702, float("inf")), False),
        "gpt_oss_glu interleaved bias": (Form("gpt_oss_glu", True, 1.702, 7.0), True),
        "relu2": (Form("relu2", False, 1.702, float("inf")), False),
    }
    dtypes = {**DTYPES, "fp16": torch.float16}
    for (kind, tokens), (word, dtype) in product(COMPILED_TOKENS.items(), dtypes.items()):
        for name, (form, bias) in forms.items():
            launch = partial(run_routed_mlp, tokens, dtype, form, bias=bias)
            yield f"routed_mlp {name}, {kind} rows, {word}", launch
        for layout in ("plain", "transposed"):
            launch = partial(run_grouped_mm, tokens, dtype, transposed=layout == "transposed")
            yield f"grouped_mm {layout}, {kind} rows, {word}", launch
        yield f"gated_lora, {kind} rows, {word}", partial(run_lora, tokens, dtype)
    for (name, (form, bias)), (word, dtype) in product(forms.items(), dtypes.items()):
        launch = partial(run_routed_mlp, 1, dtype, form, bias=bias)
        yield f"routed_mlp {name}, one token, {word}", launch
    for tokens in COMPILED_SLOTS:
        ids = torch.zeros(tokens, SHAPE.top_k, dtype=torch.int64)
        yield f"expert_sort, {ids.numel()} slots", partial(sort.sort_slots, ids, NUM_EXPERTS)


def compile_all(arch: int) -> list[Compiled]:
    """Compile every case for an architecture such as 90; each kernel is listed once."""
    results = []
    with compiling(arch) as found:
        done: set[str] = set()
        for case, launch in cases():
            launch()
            for key in found.keys() - done:
                results.append(_describe(found[key], case))
            done = set(found)
    return results


def _describe(kernel: Any, case: str) -> Compiled:
    registers, spilled = _assemble(kernel.asm["ptx"])
    ptx = kernel.asm["ptx"]
    tensor_cores = "wgmma" if "wgmma.mma_async" in ptx else "mma" if "mma.sync" in ptx else ""
    constants = {
        kernel.src.fn.arg_names[path[0]]: value for path, value in kernel.src.constants.items()
    }
    shared = kernel.metadata.shared
    has_product = "tt.dot" in kernel.asm["ttir"]
    name = kernel.metadata.name
    tma = "cp.async.bulk.tensor" in ptx
    return Compiled(
        name, case, constants, registers, spilled, shared, tensor_cores, has_product, tma
    )


def _assemble(ptx: str) -> tuple[int, int]:
    """Registers, and bytes of spill stores and loads, as ptxas counts them."""
    target = re.search(r"\.target (\w+)", ptx)
    assert target is not None
    folder = Path(triton.__file__).parent / "backends/nvidia/bin"
    with tempfile.TemporaryDirectory() as scratch:
        source = Path(scratch) / "kernel.ptx"
        source.write_text(ptx)
        for tool in ("ptxas", "ptxas-blackwell"):
            command = [folder / tool, "-v", f"--gpu-name={target[1]}", source]
            done = subprocess.run(
                [*command, "-o", Path(scratch) / "kernel.cubin"], capture_output=True, text=True
            )
            if done.returncode == 0:
                break
        else:
            raise RuntimeError(f"ptxas refused the kernel: {done.stderr}")
    registers = re.search(r"Used (\d+) registers", done.stderr)
    spills = re.findall(r"(\d+) bytes spill (?:stores|loads)", done.stderr)
    assert registers is not None
    return int(registers[1]), sum(map(int, spills))


def table_of(results: list[Compiled], arch: int) -> Table:
    """One row a kernel, those with products first."""
    table = Table(title=f"Compiled for sm_{arch}, unmeasured")
    for heading in ("kernel", "first seen in", "tile"):
        table.add_column(heading)
    for heading in ("registers", "spilled B", "shared B", "products"):
        table.add_column(heading, justify="right")
    for row in sorted(results, key=lambda row: (not row.has_product, row.kernel, row.case)):
        sizes = ("OUT_TILE", "IN_TILE", "ROWS", "COLUMNS", "INNER")
        tile = "x".join(str(row.constants[s]) for s in sizes if s in row.constants)
        swapped = " swapped" if row.constants.get("SWAPPED") else ""
        table.add_row(
            row.kernel,
            row.case,
            tile + swapped,
            str(row.registers),
            str(row.spilled),
            f"{row.shared:,}",
            " ".join(filter(None, (row.tensor_cores, "TMA" if row.tma else ""))),
        )
    return table


def main() -> None:
    """Print the table; exit with 1 if a kernel spills or wants more than there is."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", type=int, default=90, choices=sorted(SHARED_MEMORY))
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    options = parser.parse_args()
    results = compile_all(options.arch)
    Console(width=WIDTH).print(table_of(results, options.arch))
    if options.json:
        rows = [asdict(row) | {"constants": _printable(row.constants)} for row in results]
        options.json.write_text(json.dumps(rows, indent=1))
    most = SHARED_MEMORY[options.arch]
    if unfit := [row for row in results if row.spilled or row.shared > most]:
        names = ", ".join(sorted({f"{row.kernel} ({row.case})" for row in unfit}))
        sys.exit(
            f"these spill registers or want more than {most:,} bytes of shared memory: {names}"
        )


def _printable(constants: dict[str, Any]) -> dict[str, Any]:
    return {name: getattr(value, "value", value) for name, value in constants.items()}


if __name__ == "__main__":
    main()
