"""The command line: ``singe demo`` and ``singe info``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

from singe import __version__
from singe.errors import SingeError

app = typer.Typer(
    help="Channel pruning by integrated gradient variation.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"singe {__version__}")
        raise typer.Exit()


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where singe-demo.png goes.")] = Path("."),
    seeds: Annotated[int, typer.Option(min=1, help="Networks to train and prune.")] = 3,
    macs: Annotated[float, typer.Option(help="Share of the MACs to keep.", max=1.0)] = 0.5,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1, ...  [default: cuda if there is one]")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare pruning criteria on a small network, all with the same budget: one to two minutes.

    Trains on scikit-learn's 8x8 digits, prunes in rounds with fine-tuning in between, prints what
    was measured and draws singe-demo.png. Needs pip install 'singe[demo]'.
    """
    from singe import demo as job
    from singe import demo_report

    settings = job.Settings(seeds=seeds, macs=macs)
    out.mkdir(parents=True, exist_ok=True)  # fails before the work, not after it
    errors = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(
        *columns, console=errors, transient=True, disable=not errors.is_terminal
    ) as progress:
        task = progress.add_task("loading", total=job.count_steps(settings) + 1)
        result = job.run_demo(
            settings, device, lambda step: progress.update(task, description=step, advance=1)
        )
    picture = demo_report.write_picture(result, out)
    if as_json:
        _print_json(result | {"picture": str(picture)})
        return
    console = Console()
    console.print(demo_report.summary_table(result), highlight=False)
    console.print(f"Picture: {picture}", highlight=False, soft_wrap=True)


@app.command()
def info(as_json: Json = False) -> None:
    """Show what is compiled and usable here, and why something is not."""
    from singe.info import collect, render

    found = collect()
    if as_json:
        _print_json(found)
    else:
        Console().print(render(found), highlight=False)


def _print_json(content: dict[str, Any]) -> None:
    typer.echo(json.dumps(content, indent=2))


def main() -> None:
    """Run the command line; an error the user can repair is one line and exit status 2."""
    try:
        app(prog_name="singe")
    except (SingeError, OSError) as error:
        console = Console(stderr=True, soft_wrap=True, highlight=False)
        console.print("error: " + " ".join(str(error).split()), style="red", markup=False)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
