"""``singe demo`` and ``singe info``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from singe.cli.folders import require_folder
from singe.cli.output import print_json
from singe.telling import progress_bar

Json = Annotated[bool, typer.Option("--json", help="Print JSON instead of tables.")]


def demo(
    out: Annotated[Path, typer.Option(help="Where singe-demo.png goes.")] = Path("."),
    seeds: Annotated[int, typer.Option(min=1, help="Networks to train and prune.")] = 3,
    macs: Annotated[float, typer.Option(help="Share of the MACs to keep.", max=1.0)] = 0.5,
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda, cuda:1, ... (default: cuda if there is one)")
    ] = None,
    as_json: Json = False,
) -> None:
    """Compare pruning criteria on a small network, all with the same budget: one to two minutes.

    Trains on scikit-learn's 8x8 digits, prunes in rounds with fine-tuning in between, prints what
    was measured and draws singe-demo.png. Needs scikit-learn and matplotlib.
    """
    from singe import demo as job
    from singe import demo_report

    settings = job.Settings(seeds=seeds, macs=macs)
    require_folder(out)
    out.mkdir(parents=True, exist_ok=True)
    with progress_bar("loading", job.count_steps(settings) + 1, wanted=True) as advance:
        result = job.run_demo(settings, device, lambda step: advance(title=step))
    picture = demo_report.write_picture(result, out)
    if as_json:
        print_json(result | {"picture": str(picture)})
        return
    console = Console()
    console.print(demo_report.summary_table(result), highlight=False)
    console.print(f"Picture: {picture}", highlight=False, soft_wrap=True)


def info(as_json: Json = False) -> None:
    """Show what is compiled and usable here, and why something is not."""
    from singe.info import collect, render

    found = collect()
    if as_json:
        print_json(found)
    else:
        Console().print(render(found), highlight=False)
