"""``singe score``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

import singe
from singe.cli import finish
from singe.cli.folders import require_place
from singe.cli.groups import takes_groups
from singe.cli.inputs import Inputs, load_inputs
from singe.cli.options import (
    CommonOptions,
    DataOptions,
    LongRunOptions,
    ModelOptions,
    ScoreOptions,
)
from singe.cli.output import Voice
from singe.criteria import as_criterion
from singe.request import power_for_pruning
from singe.scores import Scores, ScoreTable


@takes_groups
def score(
    model: ModelOptions,
    data: DataOptions,
    scoring: ScoreOptions,
    long_run: LongRunOptions,
    common: CommonOptions,
    out: Annotated[Path, typer.Option(help="File to write.", rich_help_panel="Output")] = Path(
        "scores.safetensors"
    ),
    granularity: Annotated[
        str,
        typer.Option(help="unit, or weight: every weight by itself.", rich_help_panel="Scoring"),
    ] = "unit",
) -> None:
    """Score every prunable channel of a model, or every weight: higher = keep."""
    voice = Voice(common)
    require_place(out)
    inputs = load_inputs(model, data, common.seed, voice)
    options = scoring.arguments() | long_run.arguments() | {"granularity": granularity}
    scores = run_score(inputs, options, common.seed, voice)
    scores.save(out)
    groups = summary(scores)
    rejected = scores.meta["rejected"]
    content = {"scores": str(out), "groups": groups, "meta": scores.meta}
    seconds = sum(scores.meta["seconds"].values())
    voice.result(
        content,
        _table(groups),
        f"{finish.label(scores)}, {scores.meta['samples']} samples, "
        f"{seconds:.1f} s. Scores: {out}"
        + (f". Left out: {len(rejected)} (--json says why)" if rejected else ""),
    )


def for_pruning(options: dict[str, Any]) -> dict[str, Any]:
    """Scoring options with the ``p`` that a network is pruned by, unless they have one."""
    return {"p": power_for_pruning(options)} | options


def run_score(inputs: Inputs, options: dict[str, Any], seed: int, voice: Voice) -> Any:
    """Scores, or WeightScores, of the inputs's data, or without where the criterion needs none."""
    batches: Any = [inputs.example]
    if as_criterion(options.get("criterion", "singe")).needs_data:
        batches = inputs.require_data("this criterion").calibrate
    return singe.score(inputs.model, batches, progress=voice.progress, seed=seed, **options)


def summary(scores: ScoreTable) -> dict[str, dict[str, float]]:
    """Per group its units, or per parameter its weights, and the spread of their scores."""
    entries = "units" if isinstance(scores, Scores) else "weights"
    return {
        name: {
            entries: values.numel(),
            "lowest": float(values.min()),
            "median": float(values.median()),
            "highest": float(values.max()),
        }
        for name, values in scores.items()
    }


def _table(groups: dict[str, dict[str, float]]) -> Table:
    names = list(next(iter(groups.values())))
    table = Table("group" if "units" in names else "parameter", *names, box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, row in groups.items():
        count, *spread = row.values()
        table.add_row(name, str(count), *(f"{value:.3g}" for value in spread))
    return table
