"""``singe prune``: one shot, no training."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import typer

import singe
from singe import recalibration
from singe.cli import finish
from singe.cli.folders import holds_run, remove_results, require_folder, require_other
from singe.cli.groups import takes_groups
from singe.cli.inputs import Inputs, given, load_inputs
from singe.cli.options import (
    BudgetOptions,
    CommonOptions,
    DataOptions,
    ExportOptions,
    ModelOptions,
    ScoreOptions,
)
from singe.cli.output import Voice
from singe.cli.score import for_pruning, run_score
from singe.errors import ExportError, OptionError
from singe.evaluation import accuracy
from singe.graph import separate_copy
from singe.plan import Plan
from singe.report import si, write_report
from singe.rounds import Pruning, pruning_of
from singe.scores import Scores


@dataclass
class SourceOptions:
    """Where the decision comes from; default: scores computed on the data, and the budget."""

    SCORING: ClassVar = tuple(f.name for f in fields(ScoreOptions))
    OUTRANKS: ClassVar = {
        "plan": ("scores", *SCORING, *BudgetOptions.DECIDING),
        "scores": ("plan", *(name for name in SCORING if name != "ignore")),
        "criterion": ("scores", "plan"),
        **dict.fromkeys(BudgetOptions.TARGETS, ("plan", *BudgetOptions.TARGETS)),
    }
    scores: Annotated[
        Path | None, typer.Option(help="Scores from singe score.", rich_help_panel="Budget")
    ] = None
    plan: Annotated[
        Path | None, typer.Option(help="Carry out this plan.", rich_help_panel="Budget")
    ] = None
    recalibrate: Annotated[
        bool,
        typer.Option(
            help="Set the BatchNorms' statistics again on the calibration samples of --data.",
            rich_help_panel="Budget",
        ),
    ] = True


@takes_groups
def prune(
    model: ModelOptions,
    data: DataOptions,
    scoring: ScoreOptions,
    budget: BudgetOptions,
    output: ExportOptions,
    source: SourceOptions,
    common: CommonOptions,
) -> None:
    """Remove the channels with the lowest scores, physically, down to a budget.

    The scores come from --scores, or are computed on --data. No training, but the BatchNorms'
    statistics, which removal makes wrong, are set again on that data. To train as well: compress.
    """
    voice = Voice(common)
    formats = output.formats()
    scores, plan = source.scores, source.plan
    if plan is not None and (budget.arguments() or scoring.arguments() or scores is not None):
        raise OptionError(
            "--plan says what goes: leave out --scores, scoring options and the budget"
        )
    chosen = scoring.arguments()
    if scores is not None and (late := sorted(chosen.keys() - {"ignore"})):
        raise OptionError(
            f"--scores are made already: leave out {', '.join(late)} (--ignore holds for the plan)"
        )
    if not output.dry_run:
        require_folder(output.out, data.data)
        require_other(output.out, model.weights)
        if holds_run(output.out):
            raise OptionError(
                f"--out {output.out} holds a run of compress, which prune would overwrite; give another"
            )
    pruning = None if plan is not None else pruning_of(**budget.arguments())  # before all scoring
    if data.data is None and data.input_shape is None and data.image_size == DataOptions.image_size:
        data = replace(data, input_shape=_scored_shape(scores))
        if data.input_shape is None:
            voice.notice(f"no data: inputs are taken to be 3 x {data.image_size} x {data.image_size}; "
                         "set --input-shape to change that")  # fmt: skip
    inputs = load_inputs(model, data, common.seed, voice)
    options = for_pruning(chosen)
    found = Scores.load(scores, inputs.model) if scores is not None else None
    if plan is not None:
        made = Plan.load(plan)
    else:
        found = found or run_score(inputs, options, common.seed, voice)
        made = make_plan(inputs, found, budget, chosen.get("ignore", ()) if scores else ())
    if output.dry_run:
        if plan is not None:  # that it can be carried out
            singe.prune(separate_copy(inputs.model), made, inputs.example)
        told = {"plan": dict(made), "meta": made.meta}
        voice.result(told, made.explain() if made.meta else f"{made!r}")
        return
    output.out.mkdir(parents=True, exist_ok=True)
    original = separate_copy(inputs.model)
    before = _accuracy(inputs)
    done = singe.prune(inputs.model, made, inputs.example)
    removed = _accuracy(inputs)
    recalibrated = source.recalibrate and made.n_units > 0 and set_statistics(inputs, common.seed)
    after = _accuracy(inputs) if recalibrated else removed
    latency = finish.time_both(original, inputs.model, inputs.example, budget.timing())
    remove_results(output.out)
    files = finish.write_model(inputs, made, output.out)
    content: dict[str, Any] = {
        "title": f"{model.model}, pruned",
        "before": {"macs": done.macs_before, "params": done.params_before, "metric": before},
        "after": {"macs": done.macs_after, "params": done.params_after, "metric": after},
        "metric_after_removal": removed,
        "recalibrated": recalibrated,
        "latency": latency,
        "settings": _decided(made, found, pruning)
        | given(inputs, model, data, scoring, budget, source, common),
        "versions": finish.environment(),
    }
    content["lead"] = _lead(content, str(done))
    if output.report and found is not None:
        content |= {
            "groups": finish.scored_groups(found, made),
            "score_name": finish.label(found),
            **finish.explain(
                original, inputs, found, made, options.get("max_memory"), common.seed, voice
            ),
        }
    elif rows := made.rows():  # a plan tells how much of every group goes, not by which scores
        content["sizes"] = {row["group"]: {k: row[k] for k in ("units", "kept")} for row in rows}
    if output.report:
        files["report"] = str(write_report(output.out, content))
    written, failed = finish.write_exports(inputs, output.out, formats, voice)
    files |= written
    keys = ("before", "after", "metric_after_removal", "recalibrated", "latency")
    summary: dict[str, Any] = {k: content[k] for k in keys} | {"files": files, "failed": failed}
    voice.result(summary, describe(summary))
    if failed:
        raise ExportError("; ".join(failed))


def _scored_shape(scores: Path | None) -> str | None:
    """The shape of one input that the scores were computed on, as --input-shape takes it."""
    shapes = [] if scores is None else Scores.load(scores).meta.get("input_shapes", [])
    return ",".join(map(str, shapes[0])) if len(shapes) == 1 else None


def make_plan(
    inputs: Inputs, scores: Scores, budget: BudgetOptions, ignore: Iterable[str] = ()
) -> Plan:
    """:func:`singe.plan` with the options of the command line."""
    options = budget.arguments() | {"ignore": ignore}
    if budget.latency is not None:
        options["timing"] = budget.timing()
    return singe.plan(inputs.model, scores, inputs.example, **options)


def _accuracy(inputs: Inputs) -> float | None:
    """None where there is nothing to measure it on."""
    if inputs.data is None or inputs.data.evaluate is None:
        return None
    return accuracy(inputs.model, inputs.data.evaluate)


def set_statistics(inputs: Inputs, seed: int) -> bool:
    """As the first round of compress does it; whether there was anything to set."""
    if inputs.data is None:
        return False
    return recalibration.set_statistics(inputs.model, inputs.data.calibrate, seed, round=1)


def _decided(plan: Plan, scores: Scores | None, pruning: Pruning | None) -> dict[str, Any]:
    """By what the units were chosen, defaults included; of a plan that was given, what it tells."""
    if scores is None or pruning is None:
        told = {k: plan.meta.get(k) for k in ("criterion", "ranking")}
    else:
        told = finish.made_by(scores.meta) | finish.limited_by(pruning)
    return {k: v for k, v in told.items() if v is not None}


def _lead(content: dict[str, Any], done: str) -> str:
    text = f"One shot, no training. {done}."
    if content["recalibrated"]:
        text += " The BatchNorms' statistics were set again on the calibration samples"
        removed, after = content["metric_after_removal"], content["after"]["metric"]
        text += "." if after is None else f": accuracy {removed:.1%} -> {after:.1%}."
    return text


def describe(summary: dict[str, Any]) -> str:
    """A few lines: cost and accuracy before and after, and where everything is."""
    before, after = summary["before"], summary["after"]
    lines = [
        f"{name:<11} {si(before[key])} -> {si(after[key])} ({after[key] / before[key]:.1%})"
        for key, name in (("macs", "MACs"), ("params", "parameters"))
    ]
    if before["metric"] is not None and after["metric"] is not None:
        steps, remark = [before["metric"], after["metric"]], ""
        if summary.get("recalibrated"):
            steps.insert(1, summary["metric_after_removal"])
            remark = " (BatchNorm statistics set again)"
        lines.append(f"{'accuracy':<11} " + " -> ".join(f"{m:.1%}" for m in steps) + remark)
    if summary.get("stopped"):
        lines.append(f"{'stopped':<11} {summary['stopped']}")
    lines.append(f"{'latency':<11} {_describe_latency(summary['latency'])}")
    lines += [f"{kind:<11} {path}" for kind, path in summary["files"].items()]
    return "\n".join(lines)


def _describe_latency(latency: dict[str, Any]) -> str:
    before, after, ratio = (
        "{:.3g} ({:.3g}-{:.3g})".format(latency[key], *latency[f"{key}_quartiles"])
        for key in ("before", "after", "ratio")
    )
    return (
        f"{before} -> {after} ms, ratio {ratio}: median (quartiles) of {latency['runs']} runs in turn, "
        f"batch {latency['batch_size']}, {latency['device']}"
    )
