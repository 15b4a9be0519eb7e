"""One measurement is one row; rows are appended to a CSV file and never edited."""

from __future__ import annotations

import csv
import json
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

__all__ = ["COLUMNS", "Record", "Stamp", "append_csv", "read_csv", "stamp", "write_json"]

ROOT = Path(__file__).resolve().parents[1]
FAILED = "failed: "
"""How the note of a provider begins that raised."""


@dataclass(frozen=True, slots=True)
class Stamp:
    """Where, with what and when a run was made.

    Attributes:
        device: Model of the processor or GPU.
        threads: Of torch's CPU pool.
        torch: Version.
        triton: Version, or "" without it.
        transformers: Version.
        commit: Of this repository, or "".
        dirty: Whether measured code differed from that commit.
        date: UTC, to the second.
    """

    device: str
    threads: int
    torch: str
    triton: str
    transformers: str
    commit: str
    dirty: bool
    date: str


@dataclass(frozen=True, slots=True)
class Record:
    """One provider in one case; what was not measured is None.

    Attributes:
        op: Name of the benchmark.
        provider: Who computed it; "moeroute (again)" is ours timed a second time.
        mode: See `benchmarks.cases.Case`.
        shape_name: See `benchmarks.shapes`.
        tokens: T.
        dtype: Key of `benchmarks.shapes.DTYPES`.
        routing: How tokens chose their experts.
        clock: Key of `benchmarks.measure.CLOCKS`.
        rounds: How often it was timed.
        p20_ms: 20 % of the rounds were faster, in milliseconds.
        p50_ms: The median.
        p80_ms: 80 % of the rounds were faster.
        ours_over_it: Median over the rounds of our time / its time in the same round.
        error: Greatest relative Frobenius error of an output or gradient against the definition.
        saved_bytes: Kept alive for backward, beyond the weights.
        peak_bytes: Most bytes held at once in forward + backward, beyond the inputs.
        count: Launches of one call, or kernels that were compiled again for another T.
        note: Why it was not run, or what is wrong with it.
    """

    op: str
    provider: str
    mode: str
    shape_name: str
    tokens: int
    dtype: str
    routing: str
    clock: str = "wall"
    rounds: int = 0
    p20_ms: float | None = None
    p50_ms: float | None = None
    p80_ms: float | None = None
    ours_over_it: float | None = None
    error: float | None = None
    saved_bytes: int | None = None
    peak_bytes: int | None = None
    count: int | None = None
    note: str = ""

    @property
    def failed(self) -> bool:
        """Whether it was called and raised."""
        return self.note.startswith(FAILED)

    @property
    def row(self) -> tuple[str, str, str, int, str, str]:
        """What all providers of one row of the table share."""
        return (self.op, self.mode, self.shape_name, self.tokens, self.dtype, self.routing)


COLUMNS = tuple(field.name for kind in (Record, Stamp) for field in fields(kind))


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True, timeout=30
        )
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def stamp(device: str) -> Stamp:
    """Describe this run; names of machines and folders are no part of it.

    Args:
        device: The torch device that is measured.
    """
    cuda = torch.device(device).type == "cuda"
    changed = _git(
        "status", "--porcelain", "--untracked-files=no", "--", "kernels", "src", "benchmarks/*.py"
    )
    return Stamp(
        device=torch.cuda.get_device_name() if cuda else _processor(),
        threads=torch.get_num_threads(),
        torch=str(torch.__version__),
        triton=_version("triton"),
        transformers=_version("transformers"),
        commit=_git("rev-parse", "--short=10", "HEAD"),
        dirty=bool(changed),
        date=datetime.now(UTC).isoformat(timespec="seconds"),
    )


def _flat(record: Record, made: Stamp) -> dict[str, object]:
    return {**asdict(record), **asdict(made)}


def _short(value: object) -> object:
    return f"{value:.4g}" if isinstance(value, float) else value


def append_csv(path: Path, records: Sequence[Record], made: Stamp) -> None:
    """Append one line per record, with a header where the file is new.

    Args:
        path: Of the file; its folder exists.
        records: What was measured.
        made: The run.

    Raises:
        ValueError: the file has other columns.
    """
    fresh = not path.exists() or path.stat().st_size == 0
    if not fresh:
        with path.open(newline="") as file:
            header = tuple(next(csv.reader(file)))
        if header != COLUMNS:
            raise ValueError(f"{path.name} has the columns {header}, not {COLUMNS}; use a new file")
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        if fresh:
            writer.writeheader()
        for record in records:
            row = _flat(record, made)
            writer.writerow({key: _short(value) for key, value in row.items()})


def read_csv(path: Path) -> list[dict[str, str]]:
    """The rows of a results file, as text by column."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def write_json(path: Path, records: Sequence[Record], made: Stamp, verdicts: Sequence[str]) -> None:
    """Write one run as JSON: the stamp, the records in full precision, the verdict lines."""
    together = {
        "run": asdict(made),
        "records": [asdict(record) for record in records],
        "verdicts": list(verdicts),
    }
    path.write_text(json.dumps(together, indent=1) + "\n")
