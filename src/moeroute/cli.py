"""The command line: methods, doctor, inspect, bench."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    import torch
    from torch import nn

app = typer.Typer(
    help="Mixtures of experts and of LoRA: look at checkpoints, list methods, run benchmarks.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _fail(message: str) -> NoReturn:
    Console(stderr=True).print(f"[red]error:[/red] {message}", highlight=False)
    raise typer.Exit(code=1)


def _version(*, wanted: bool) -> None:
    if wanted:
        from moeroute.version import __version__

        Console().print(__version__, highlight=False)
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", help="Show the version and exit.", is_eager=True)
    ] = False,  # noqa: FBT002
) -> None:
    """Mixtures of experts and of LoRA: look at checkpoints, list methods, run benchmarks."""
    _version(wanted=version)


@app.command()
def methods() -> None:
    """List the methods that `moeroute.wrap_model` knows, with their defaults."""
    from moeroute.methods import get_method, list_methods

    table = Table("name", "method", "goes onto", "paper", "defaults")
    for name in list_methods():
        cls = get_method(name)
        defaults = ", ".join(f"{f.name}={f.default}" for f in fields(cls))  # type: ignore[arg-type]
        paper = f"{cls.paper.title} ({cls.paper.year}), arXiv {cls.paper.arxiv}"
        table.add_row(name, cls.__name__, cls.site_kind, paper, defaults)
    Console().print(table)


@app.command()
def doctor(
    checkpoint: Annotated[str, typer.Argument(help="A hub id, or a model or adapter folder.")],
    experts_implementation: Annotated[
        str | None, typer.Option(help="Load with this, such as moeroute.")
    ] = None,
) -> None:
    """Say what will silently not work with a checkpoint. Exits with 1 if anything is wrong."""
    import moeroute
    from moeroute.integration.loading import load_model

    try:
        model = load_model(checkpoint, experts_implementation=experts_implementation)
    except ValueError as error:
        _fail(str(error))
    findings = moeroute.doctor(model)
    console = Console()
    if not findings:
        console.print(f"{type(model).__name__}: nothing found")
        return
    table = Table("severity", "module", "problem", "mend")
    for finding in findings:
        table.add_row(finding.severity, finding.module, finding.problem, finding.mend)
    console.print(table)
    if any(finding.severity != "info" for finding in findings):
        raise typer.Exit(code=1)


@app.command()
def inspect(
    checkpoint: Annotated[str, typer.Argument(help="A hub id, or a model or adapter folder.")],
    text: Annotated[Path, typer.Option(help="A text file to route.")],
    plot: Annotated[Path | None, typer.Option(help="Write the load heat map here.")] = None,
    adapter: Annotated[str | None, typer.Option(help="An adapter folder for the model.")] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write all numbers here.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Tokens to read at most.", min=1)] = 8192,
    length: Annotated[int, typer.Option(help="Tokens a sequence.", min=1)] = 256,
) -> None:
    """Route a text through a checkpoint and show how its experts are used."""
    import torch

    import moeroute
    from moeroute.integration.loading import load_model, token_batches

    try:
        model = load_model(checkpoint, adapter=adapter)
        batches = token_batches(checkpoint, text, max_tokens=max_tokens, length=length)
        with moeroute.track_routing(model) as stats, torch.inference_mode():
            _run(model, batches)
    except ValueError as error:
        _fail(str(error))
    Console().print(stats.summary())
    if plot is not None:
        stats.plot(plot)
        Console().print(f"wrote {plot}", highlight=False)
    if json_file is not None:
        json_file.write_text(json.dumps(stats.to_dict(), indent=1))
        Console().print(f"wrote {json_file}", highlight=False)


@app.command(
    context_settings={
        "allow_extra_args": True,
        "ignore_unknown_options": True,
        "help_option_names": [],
    }
)
def bench(context: typer.Context) -> None:
    """Run the benchmarks of a clone; options are those of `python -m benchmarks.run`."""
    import moeroute

    root = Path(moeroute.__file__).resolve().parents[2]
    if not (root / "benchmarks" / "run.py").is_file():
        _fail(
            "the benchmarks lie in the repository, not in the installed package; clone it, install "
            "it with `pip install -e .`, and run `moeroute bench` again"
        )
    done = subprocess.run([sys.executable, "-m", "benchmarks.run", *context.args], cwd=root)
    raise typer.Exit(code=done.returncode)


def _run(model: nn.Module, batches: list[torch.Tensor]) -> None:
    from rich.progress import track

    for batch in track(batches, description="routing", console=Console(stderr=True)):
        model(input_ids=batch)
