"""The command line: `moeroute methods | doctor | inspect | depth | convert | bench`.

What needs transformers, PEFT or matplotlib is imported inside the commands, so that help is quick.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from moeroute.methods.registry import get_method, list_methods, method_fields
from moeroute.version import __version__

app = typer.Typer(
    help="Mixture-of-experts and mixture-of-LoRA layers: methods, checks and routing statistics.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
)

STYLES = {"error": "bold red", "warning": "yellow", "info": "cyan"}
LOSS_SHOWN = 50.0
"""Loss from which its exponential is not told apart."""
CLONE = (
    "the benchmarks are in the source repository, not in the installed package: clone it and run "
    "`make bench` there"
)

Checkpoint = Annotated[
    str, typer.Argument(metavar="CKPT", help="Folder or hub id of a model or an adapter.")
]
Adapter = Annotated[
    str | None, typer.Option("--adapter", help="Folder or hub id of an adapter to put on CKPT.")
]


def _show_version(*, wanted: bool) -> None:
    if wanted:
        typer.echo(f"moeroute {__version__}")
        raise typer.Exit


@app.callback()
def main(
    *,
    version: Annotated[
        bool,
        typer.Option(
            "--version",
            help="Show the version and exit.",
            is_eager=True,
            callback=lambda value: _show_version(wanted=bool(value)),
        ),
    ] = False,
) -> None:
    """Mixture-of-experts and mixture-of-LoRA layers: methods, checks and routing statistics."""


@app.command()
def methods() -> None:
    """List the methods that moeroute.wrap_model knows."""
    table = Table(title="Methods", title_justify="left")
    for heading in ("name", "paper", "stands at", "fields and defaults"):
        table.add_column(heading, no_wrap=heading == "name")
    for name in list_methods():
        method = get_method(name)
        paper = method.paper
        table.add_row(
            name,
            f"{paper.title} ({paper.year}), arXiv {paper.arxiv}",
            method.site_kind,
            ", ".join(f"{name}={value!r}" for name, value in method_fields(method()).items()),
        )
    Console().print(table)


@app.command()
def doctor(checkpoint: Checkpoint, adapter: Adapter = None) -> None:
    """Say what will silently not work with a checkpoint; exit code 1 if something is an error."""
    with _user_errors():
        from moeroute.integration.checkpoint import load_model
        from moeroute.integration.doctor import doctor as find

        model = load_model(checkpoint, adapter)
        if adapter is None and not _has_adapter(checkpoint):
            model.train()
        findings = find(model)
    console = Console()
    for found in findings:
        console.print(f"[{STYLES[found.severity]}]{found.severity}[/] {found.module or 'model'}")
        console.print(f"  {found.problem}", highlight=False, markup=False)
        console.print(f"  -> {found.mend}", highlight=False, markup=False)
    if not findings:
        console.print(f"{type(model).__name__}: nothing found")
    if any(found.severity == "error" for found in findings):
        raise typer.Exit(1)


@app.command()
def inspect(
    checkpoint: Checkpoint,
    *,
    text: Annotated[
        Path,
        typer.Option(exists=True, dir_okay=False, readable=True, help="UTF-8 text to route."),
    ],
    plot: Annotated[
        Path | None, typer.Option(help="Heat map to write: .png, .svg or .pdf.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Statistics to write, as JSON.")
    ] = None,
    adapter: Adapter = None,
    max_tokens: Annotated[
        int, typer.Option(min=1, help="Tokens of the text to route, at most.")
    ] = 16384,
    length: Annotated[int, typer.Option(min=1, help="Tokens a sequence, at most.")] = 1024,
) -> None:
    """Run a text through a checkpoint and show which experts its tokens go to."""
    with _user_errors():
        if plot is not None:
            from moeroute.integration.plot import check_plot

            check_plot(plot)
        from moeroute.integration.checkpoint import load_model, load_tokenizer, token_batches
        from moeroute.integration.track import track_routing

        model = load_model(checkpoint, adapter)
        tokenizer = load_tokenizer(checkpoint)
        batches = token_batches(model, tokenizer, text, max_tokens=max_tokens, length=length)
        with track_routing(model) as stats:
            _run(model, batches)
        Console().print(stats.summary())
        if plot is not None:
            stats.plot(plot, title=f"Expert load of {Path(checkpoint).name} on {text.name}")
            typer.echo(f"wrote {plot}")
        if json_file is not None:
            json_file.parent.mkdir(parents=True, exist_ok=True)
            origin = {"checkpoint": checkpoint, "adapter": adapter, "text": str(text)}
            json_file.write_text(json.dumps({**origin, **stats.to_dict()}, indent=1) + "\n")
            typer.echo(f"wrote {json_file}")


@app.command()
def depth(
    checkpoint: Checkpoint,
    *,
    text: Annotated[
        Path,
        typer.Option(exists=True, dir_okay=False, readable=True, help="UTF-8 text to measure on."),
    ],
    skip: Annotated[
        int | None, typer.Option(min=0, help="Layers to leave out at most; half by default.")
    ] = None,
    max_tokens: Annotated[
        int, typer.Option(min=2, help="Tokens of the text to use, at most.")
    ] = 4096,
    length: Annotated[int, typer.Option(min=2, help="Tokens a sequence, at most.")] = 512,
) -> None:
    """Show what a text's loss costs with fewer layers, those of least influence left out first."""
    with _user_errors():
        from moeroute.integration.checkpoint import load_model, load_tokenizer, token_batches
        from moeroute.integration.depth.curve import depth_curve

        model = load_model(checkpoint, None).eval()
        tokenizer = load_tokenizer(checkpoint)
        batches = token_batches(model, tokenizer, text, max_tokens=max_tokens, length=length)
        points = depth_curve(model, batches, most_skipped=skip)
    table = Table(title=f"{Path(checkpoint).name} on {text.name}", title_justify="left")
    for heading in ("layers", "loss, nats", "perplexity", "time", "FLOPs", "left out"):
        table.add_column(heading, justify="left" if heading == "left out" else "right")
    for point in points:
        table.add_row(
            str(point.layers),
            f"{point.loss:.4f}",
            f"{math.exp(min(point.loss, LOSS_SHOWN)):.4g}",
            f"{point.seconds / points[0].seconds:.2f}",
            f"{point.flops / points[0].flops:.2f}",
            " ".join(map(str, point.skipped)),
        )
    Console().print(table)


@app.command()
def convert(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="Folder of a saved adapter.")],
    directory: Annotated[
        Path, typer.Argument(metavar="DIR", help="Folder to write; must be new or empty.")
    ],
    *,
    to: Annotated[
        str,
        typer.Option(
            help="peft: a plain LoRA for each expert (or task) of a mixture over linears. vllm: a "
            "LoRA on stacked experts (target_parameters) as LoRA on each expert's own modules."
        ),
    ] = "peft",
    base: Annotated[
        str | None, typer.Option(help="Folder or hub id of the base; default: what ADAPTER names.")
    ] = None,
) -> None:
    """Write an adapter as plain LoRA that serves elsewhere; the base's weights are not needed."""
    with _user_errors():
        from moeroute.integration.adapters.convert import convert_adapter

        for folder in convert_adapter(adapter, directory, to=to, base=base):
            typer.echo(f"wrote {folder}")


@app.command(
    context_settings={
        "allow_extra_args": True,
        "ignore_unknown_options": True,
        "help_option_names": [],
    }
)
def bench(context: typer.Context) -> None:
    """Run the repository's benchmarks; every argument is passed on to `benchmarks.run`."""
    root = next((folder for folder in _repositories() if _has_benchmarks(folder)), None)
    if root is None:
        _fail(CLONE)
    # The user's folder stays the working one, for files that are written; the clone is found first.
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-P", "-m", "benchmarks.run", *context.args]
    raise typer.Exit(subprocess.run(command, env=environment, check=False).returncode)


def _run(model: Any, batches: list[Any]) -> None:
    """Forward every batch without a gradient, with a bar that counts tokens."""
    import torch

    columns = (
        TextColumn("routing"),
        BarColumn(bar_width=30),
        MofNCompleteColumn(),
        TextColumn("tokens"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    total = sum(batch.numel() for batch in batches)
    with Progress(*columns, console=Console(stderr=True)) as progress, torch.no_grad():
        task = progress.add_task("routing", total=total)
        for batch in batches:
            model(input_ids=batch.to(model.device), use_cache=False)
            progress.advance(task, batch.numel())


def _has_adapter(checkpoint: str) -> bool:
    return (Path(checkpoint) / "adapter_config.json").is_file()


def _repositories() -> list[Path]:
    """Where a clone may be: around this file, or around the working directory."""
    return [Path(__file__).resolve().parents[2], Path.cwd(), *Path.cwd().parents]


def _has_benchmarks(folder: Path) -> bool:
    return (folder / "benchmarks" / "run.py").is_file() and (folder / "src" / "moeroute").is_dir()


@contextmanager
def _user_errors() -> Iterator[None]:
    """Turn what a user can mend into one line and exit code 1."""
    try:
        yield
    except (ValueError, OSError, ImportError) as error:
        _fail(str(error))


def _fail(message: str) -> NoReturn:
    Console(stderr=True).print("[bold red]error:[/]", end=" ")
    Console(stderr=True, soft_wrap=True).print(message, highlight=False, markup=False)
    raise typer.Exit(1)
