"""What ``prune`` and ``compress`` leave behind: the model's files, and the content of the report."""

from __future__ import annotations

import platform
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

import singe
from singe.cli.data import first_batches
from singe.cli.inputs import Inputs
from singe.cli.output import Voice
from singe.comparison import compare
from singe.criteria import CRITERIA, as_criterion, takes
from singe.data import device_of, example_batch
from singe.errors import ExportError, first_line
from singe.export import export_onnx, export_pt2, save_pruned
from singe.integrand import along_the_path, telling_units
from singe.latency import Stopwatch, Timing
from singe.plan import Plan
from singe.rounds import Pruning
from singe.scores import Scores, ScoreTable
from singe.versions import versions

PICTURE_SAMPLES = 64  # the integrand of a few units is drawn from so many
BASELINES = ("taylor", "magnitude")  # one pass and none: a comparison that costs next to nothing


def write_model(inputs: Inputs, plan: Plan, folder: Path) -> dict[str, str]:
    """Safetensors and plan; kind -> path."""
    return {kind: str(path) for kind, path in save_pruned(inputs.model, folder, plan).items()}


def write_exports(
    inputs: Inputs, folder: Path, formats: Iterable[str], voice: Voice
) -> tuple[dict[str, str], list[str]]:
    """The other formats asked for, and what went wrong with some: not every model can be captured."""
    written, failed = {}, []
    for kind in formats:
        voice.step(f"exporting {kind}")
        path = folder / f"model.{kind}"
        try:
            if kind == "onnx":
                export_onnx(inputs.model, inputs.example, path)
            else:
                export_pt2(inputs.model, inputs.example, path)
        except ExportError as error:
            failed.append(f"{path} was not written: {first_line(error)}")
        else:
            written[kind] = str(path)
    return written, failed


def time_both(original: nn.Module, pruned: nn.Module, example: Any, timing: Timing) -> dict:
    """Medians and quartiles of both networks' forward and of their ratio, as a report wants them."""
    device = device_of(pruned)
    found = Stopwatch(original, example_batch(example, device), timing).compare(pruned)
    threads = f", {_threads(timing.threads)}" if device.type == "cpu" else ""
    return {
        "before": found.reference_ms,
        "before_quartiles": list(found.reference_quartiles),
        "after": found.ms,
        "after_quartiles": list(found.ms_quartiles),
        "ratio": found.share,
        "ratio_quartiles": list(found.share_quartiles),
        "batch_size": timing.batch_size,
        "runs": timing.runs,
        "device": f"{device}{threads}",
    }


def scored_groups(scores: Scores, plan: Plan) -> dict[str, dict[str, list[Any]]]:
    """Per group all scores, and which units the plan removes."""
    return {
        name: {"scores": values.tolist(), "removed": list(plan.get(name, []))}
        for name, values in scores.items()
    }


def explain(
    original: nn.Module,
    inputs: Inputs,
    scores: Scores,
    plan: Plan,
    max_memory: int | None,
    seed: int,
    voice: Voice,
) -> dict[str, Any]:
    """The parts of a report that need the original network: criteria compared, the integrand.

    Both are of the groups that ``scores`` have, and by the definition they were made with.

    Args:
        original: before pruning.
        inputs: its data are scored on; None of both parts without data.
    """
    made = scores.meta
    known = made.get("objective") in ("cross_entropy", "kl") and made.get("criterion") in CRITERIA
    if inputs.data is None or not plan or not known:
        return {}
    shared = {
        "objective": made["objective"], "p": made["p"], "norm": made["norm"],
        "layers": list(scores), "max_memory": max_memory,
    }  # fmt: skip
    voice.step("comparing criteria")
    named = {label(scores): scores}
    for criterion in BASELINES:
        if criterion != made["criterion"] and _suits(criterion, made["objective"]):
            named[criterion] = singe.score(
                original, inputs.data.calibrate, progress=voice.progress, seed=seed,
                **shared | with_criterion(criterion, made["p"]),
            )  # fmt: skip
    found: dict[str, Any] = {}
    if len(named) > 1:
        found["criteria"] = compare(named, min(0.95, max(0.05, plan.n_units / _units(scores))))
    voice.step("following a few channels along the path")
    batches = first_batches(inputs.data.calibrate, PICTURE_SAMPLES)
    found["integrand"] = along_the_path(
        original, batches, telling_units(scores, plan), plan, criterion=made["criterion"],
        path=made["path"], **shared,
    )  # fmt: skip
    return found


def with_criterion(criterion: str, p: object) -> dict[str, Any]:
    """Options for a criterion in a row of others; where ``p`` is not for it, the default is."""
    return {"criterion": criterion} | ({} if takes(as_criterion(criterion), p) else {"p": 1})


def _suits(criterion: str, objective: str) -> bool:
    """kl is flat at the network itself, where Taylor looks."""
    return not (as_criterion(criterion).endpoint and objective == "kl")


def _units(scores: Scores) -> int:
    return sum(len(values) for values in scores.values())


def made_by(options: Mapping[str, Any]) -> dict[str, Any]:
    """How units were scored, of the ``meta`` of scores or the fields of a request: what had a say."""
    name, read = options.get("criterion"), ["criterion"]
    if name in CRITERIA and as_criterion(name).needs_data:
        read += ["objective", "p"] + (["path", "norm"] if _has_path(name) else [])
    return {key: options.get(key) for key in read}


def _has_path(name: str) -> bool:
    known = as_criterion(name)
    return known.needs_data and not known.endpoint and known.integrand != "loss"


def limited_by(pruning: Pruning) -> dict[str, Any]:
    """How scores became a plan."""
    return {k: getattr(pruning, k) for k in ("ranking", "max_pruning_ratio", "round_to")}


def label(scores: ScoreTable) -> str:
    """``singe, layer path``; criteria without a path by their name."""
    name = str(scores.meta.get("criterion"))
    if name not in CRITERIA:  # made by other means
        return name
    return f"{name}, {scores.meta['path']} path" if _has_path(name) else name


def environment() -> dict[str, str]:
    return versions() | {
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {_threads()}",
    }


def _threads(count: int | None = None) -> str:
    count = count or torch.get_num_threads()
    return f"{count} thread{'s' if count > 1 else ''}"
