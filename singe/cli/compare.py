"""``singe compare``: how far criteria agree, and what they are worth at equal MACs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

import singe
from singe.cli import finish
from singe.cli.folders import holds_result, require_folder
from singe.cli.groups import takes_groups
from singe.cli.inputs import Inputs, changed, given, load_inputs
from singe.cli.options import (
    BudgetOptions,
    CommonOptions,
    DataOptions,
    OptionalModelOptions,
    SharedScoreOptions,
)
from singe.cli.output import Voice
from singe.cli.prune import make_plan, set_statistics
from singe.comparison import compare as agreement
from singe.comparison import require_two
from singe.criteria import PATHS, as_criterion, choose
from singe.errors import OptionError
from singe.evaluation import accuracy
from singe.finetune import LR
from singe.graph import separate_copy
from singe.plain import POSITIVE, plain_number
from singe.report import write_report
from singe.rounds import pruning_of
from singe.scores import Scores

DEFAULT_CRITERIA = "singe:layer,singe:network,taylor,magnitude,random"


@takes_groups
def compare(
    model: OptionalModelOptions,
    data: DataOptions,
    scoring: SharedScoreOptions,
    budget: BudgetOptions,
    common: CommonOptions,
    scores: Annotated[
        list[Path] | None, typer.Argument(help="Files of singe score, all of one model.")
    ] = None,
    criteria: Annotated[
        str | None,
        typer.Option(
            help="With --model: score these now, criterion or criterion:path, with commas between."
            f"  (default, without files: {DEFAULT_CRITERIA})",
            rich_help_panel="Scoring",
        ),
    ] = None,
    share: Annotated[float, typer.Option(help="Overlap of the lowest share of all units.")] = 0.3,
    finetune_steps: Annotated[
        int, typer.Option(help="Before accuracy is measured at equal budgets.", min=0)
    ] = 0,
    lr: Annotated[float, typer.Option(help="Of that fine-tuning.")] = LR,
    out: Annotated[
        Path | None, typer.Option(help="Folder for report.html and its pictures.")
    ] = None,
) -> None:
    """Compare criteria: rank correlation, overlap of what would go, accuracy at equal budgets.

    Of score files, of criteria scored now (--model, --data), or of both. With a budget (--macs 0.5)
    each prunes its own copy of the model, and the accuracies are compared.
    """
    voice = Voice(common)
    if out is not None:
        require_folder(out, data.data)
        if holds_result(out):
            raise OptionError(
                f"--out {out} holds a pruned model or a run, whose report this would replace; give another"
            )
    plain_number("--share", share, "(0, 1)")
    plain_number("--lr", lr, POSITIVE)
    if budget.arguments():
        pruning_of(**budget.arguments())
    if finetune_steps and not budget.target():
        raise OptionError("--finetune-steps needs a budget, e.g. --macs 0.5")
    named = {path.stem: Scores.load(path) for path in scores or []}
    if len(named) < len(scores or []):
        raise OptionError("the score files need different names: they are the labels")
    inputs = None
    if model.model is not None:
        wanted = _wanted(DEFAULT_CRITERIA if criteria is None and not named else criteria or "")
        require_two(len(named) + len(wanted))
        inputs = load_inputs(model, data, common.seed, voice)
        for found in named.values():
            found.check(inputs.model)
        named |= _score_all(inputs, wanted, scoring, common, voice)
    elif criteria is not None or budget.arguments() or scoring.arguments():
        raise OptionError("--criteria, scoring options and budgets need --model")
    elif idle := [*changed(model), *changed(data)]:
        voice.notice(f"{', '.join(idle)}: no say without --model")
    if lr != LR and not finetune_steps:
        voice.notice("--lr: no say without --finetune-steps")
    result = agreement(named, share)
    if budget.target():
        assert inputs is not None
        result |= _accuracies(inputs, named, budget, finetune_steps, lr, common, voice)
    files = {}
    if out is not None:
        content = {
            "title": "Criteria compared",
            "lead": f"{result['units']} units in {len(next(iter(named.values())))} groups.",
            "criteria": result,
            "settings": given(inputs, model, data, scoring, budget, common)
            | {"criteria": ", ".join(named), "share": share}
            | ({"finetune_steps": finetune_steps, "lr": lr} if finetune_steps else {}),
            "versions": finish.environment(),
        }
        files["report"] = str(write_report(out, content))
    shown = [*_table(result, "spearman", "Rank correlation (Spearman), all units")]
    if result["spearman_groups"] is not None:
        shown += _table(result, "spearman_groups", "Rank correlation within groups, mean")
    shown += _table(result, "overlap", f"Overlap of the lowest {share:.0%}")
    if "accuracy" in result:
        shown += _accuracy_table(result)
    voice.result(result | {"files": files}, *shown, *(f"{k} {v}" for k, v in files.items()))


def _wanted(criteria: str) -> dict[str, tuple[str, str]]:
    """``criterion:path`` -> both; an empty path is the default."""
    found = {}
    for text in filter(None, (part.strip() for part in criteria.split(","))):
        criterion, _, path = text.partition(":")
        as_criterion(criterion)
        if path:
            choose("path", path, PATHS)
        found[text] = criterion, path
    return found


def _score_all(
    inputs: Inputs,
    wanted: Mapping[str, tuple[str, str]],
    scoring: SharedScoreOptions,
    common: CommonOptions,
    voice: Voice,
) -> dict[str, Scores]:
    found: dict[str, Scores] = {}
    batches: Any = [inputs.example] if inputs.data is None else inputs.data.calibrate
    for text, (criterion, path) in wanted.items():
        options = scoring.arguments()
        own = finish.with_criterion(criterion, options.get("p"))
        options |= own | ({"path": path} if path else {})
        voice.step(f"scoring by {text}")
        name = f"{text} (p={own['p']})" if "p" in own else text
        found[name] = singe.score(
            inputs.model, batches, progress=voice.progress, seed=common.seed, **options
        )
    return found


def _accuracies(
    inputs: Inputs,
    named: dict[str, Scores],
    budget: BudgetOptions,
    steps: int,
    lr: float,
    common: CommonOptions,
    voice: Voice,
) -> dict[str, Any]:
    """Every scoring prunes a copy of its own to the same budget; BatchNorm set again, fine-tuned if asked."""
    data = inputs.require_data("accuracy at equal budgets")
    if data.evaluate is None:
        raise OptionError("accuracy at equal budgets needs held-out data")
    found, costs = {}, {}
    for name, scores in named.items():
        voice.step(f"pruning by {name}")
        twin = Inputs(separate_copy(inputs.model), data, inputs.example)
        plan = make_plan(twin, scores, budget)
        done = singe.prune(twin.model, plan, twin.example)
        set_statistics(twin, common.seed)
        if steps:
            if data.train is None:
                raise OptionError("--finetune-steps needs training data")
            singe.compress(
                twin.model, train=data.train, calibrate=data.calibrate, channels=1.0, rounds=1,
                finetune_steps=steps, lr=lr, criterion="random", progress=False, seed=common.seed,
            )  # fmt: skip
        found[name] = accuracy(twin.model, data.evaluate)
        costs[name] = {"macs": done.macs_after, "params": done.params_after}
    (kind, value), *_ = budget.target().items()
    after = f"after {steps} steps" if steps else "not fine-tuned"
    return {
        "accuracy": found,
        "cost": costs,
        "accuracy_title": f"accuracy at {kind} {value:g}, {after}",
        "accuracy_unpruned": accuracy(inputs.model, data.evaluate),
    }


def _table(result: dict[str, Any], key: str, title: str) -> list[Any]:
    table = Table("", *result["names"], box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, row in zip(result["names"], result[key], strict=True):
        table.add_row(name, *(f"{value:.2f}" for value in row))
    return [f"\n{title}", table]


def _accuracy_table(result: dict[str, Any]) -> list[Any]:
    title = f"\n{result['accuracy_title']} (unpruned {result['accuracy_unpruned']:.1%})"
    table = Table("", "accuracy", "MACs", "parameters", box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    for name, value in result["accuracy"].items():
        cost = result["cost"][name]
        table.add_row(name, f"{value:.1%}", f"{cost['macs']:,.0f}", f"{cost['params']:,}")
    return [title, table]
