"""``singe compress``: prune and fine-tune in rounds, down to a budget; export and report."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import typer
from torch.optim import Optimizer

import singe
from singe.budget import left_out
from singe.choice import ROUNDS
from singe.cli import finish
from singe.cli.folders import (
    CHECKPOINT,
    WARMUP,
    holds_run,
    remove_results,
    require_folder,
    require_other,
)
from singe.cli.groups import takes_groups
from singe.cli.inputs import Inputs, given, load_inputs
from singe.cli.options import (
    BudgetOptions,
    CommonOptions,
    DataOptions,
    ExportOptions,
    ModelOptions,
    ScoreOptions,
    TuningOptions,
)
from singe.cli.output import Voice
from singe.cli.prune import describe, make_plan
from singe.cli.score import for_pruning, run_score
from singe.compress import FINETUNE_STEPS, CompressReport
from singe.criteria import choose
from singe.data import as_batch, device_of
from singe.errors import ExportError, OptionError
from singe.finetune import OptimizerFactory, sgd, training_of
from singe.graph import private_copy, separate_copy
from singe.objectives import logits_of
from singe.plain import NOT_NEGATIVE, POSITIVE, plain_number
from singe.report import write_report
from singe.request import Request
from singe.rounds import pruning_of
from singe.scores import Scores

EXIT_STOPPED = 3
OPTIMIZERS: dict[str, Callable[..., Optimizer]] = {"sgd": sgd, "adamw": torch.optim.AdamW}
ORDER = ("rounds", "order", "visit", "schedule")
TRAINING = ("clip_grad_norm", "label_smoothing", "distill", "temperature", "ema")
WARMUP_TOO = ("clip_grad_norm", "label_smoothing", "checkpoint_every")
# Options that singe.compress takes under the same name.
PASSED = (
    "rounds", "finetune_steps", "final_steps", "schedule", "order", "visit", "clip_grad_norm",
    "label_smoothing", "distill", "temperature", "ema", "accuracy_floor", "checkpoint_every",
)  # fmt: skip


@takes_groups
def compress(
    model: ModelOptions,
    data: DataOptions,
    scoring: ScoreOptions,
    budget: BudgetOptions,
    tuning: TuningOptions,
    output: ExportOptions,
    common: CommonOptions,
) -> None:
    """Prune and fine-tune in rounds, down to a budget; then export and report.

    Everything goes to --out, a checkpoint after every round included: --resume goes on from there.
    """
    voice = Voice(common)
    formats = output.formats()
    if not output.dry_run:
        require_folder(output.out, data.data)
        require_other(output.out, model.weights)
        if not tuning.resume and holds_run(output.out):
            raise OptionError(
                f"--out {output.out} holds a run: --resume continues it if this command made it, or "
                "give another"
            )
    inputs = load_inputs(model, data, common.seed, voice)
    options = for_pruning(scoring.arguments())
    if tuning.accuracy_floor is not None:
        plain_number("--accuracy-floor", tuning.accuracy_floor, "[0, 1]", "a share")
    found = inputs.require_data("compress")
    if found.train is None:
        raise OptionError("compress needs training data: the loader gave no `train` part")
    chosen = {n: getattr(tuning, n) for n in PASSED if getattr(tuning, n) is not None}
    of_warmup = {name: value for name, value in chosen.items() if name in WARMUP_TOO}
    if tuning.warmup_steps and tuning.distill == 1.0:  # only the warm-up reads the labels
        chosen.pop("label_smoothing", None)
    limits = budget.arguments()
    # What singe.compress would refuse, before a warm-up is trained or a plan is shown.
    pruning = pruning_of(**limits, **{n: chosen[n] for n in ORDER if n in chosen})
    training_of(**{n: chosen[n] for n in TRAINING if n in chosen})
    request = Request(**options)
    optimizer, autocast = _optimizer(tuning), tuning.autocast()
    if tuning.accuracy_floor is not None and found.evaluate is None:
        raise OptionError("--accuracy-floor needs held-out data to measure accuracy on")
    if output.dry_run:
        _show_plan(inputs, options, budget, tuning, common, voice)
        return
    output.out.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    shared: dict[str, Any] = {
        "train": found.train,
        "calibrate": found.calibrate,
        "evaluate": found.evaluate,
        "optimizer": optimizer,
        "autocast": autocast,
        "seed": common.seed,
        "resume": tuning.resume,
        "recalibrate": tuning.recalibrate,
        "progress": voice.progress,
    }
    if tuning.warmup_steps:
        voice.step(f"training for {tuning.warmup_steps} steps before pruning")
        singe.compress(
            inputs.model, **shared, channels=1.0, rounds=1, finetune_steps=tuning.warmup_steps,
            criterion="random", checkpoint=output.out / WARMUP, **of_warmup,
        )  # fmt: skip
    original = separate_copy(inputs.model)
    if budget.latency is not None:
        limits["timing"] = budget.timing()
    checkpoint = output.out / CHECKPOINT
    done = singe.compress(
        inputs.model, **shared, **chosen, **limits, **options, checkpoint=checkpoint
    )
    remove_results(output.out)
    files = finish.write_model(inputs, done.plan, output.out)
    latency = finish.time_both(original, inputs.model, inputs.example, budget.timing())
    usual = finish.made_by(vars(request)) | finish.limited_by(pruning)
    usual |= {"order": pruning.order, "finetune_steps": FINETUNE_STEPS}
    if pruning.order == "global":
        usual |= {"schedule": pruning.schedule, "rounds": ROUNDS}
    content = _content(done, latency) | {
        "title": f"{model.model}, compressed",
        "settings": usual | given(inputs, model, data, scoring, budget, tuning, common),
        "versions": finish.environment(),
        "accuracy_floor": tuning.accuracy_floor,
    }
    number = 0 if tuning.order == "layerwise" else 1  # of the first scoring of all groups
    first = checkpoint / f"round-{number:02d}.scores.safetensors"
    if output.report and first.exists():
        scores = Scores.load(first, original)
        content |= {
            "groups": finish.scored_groups(scores, done.plan),
            "score_name": finish.label(scores),
            **finish.explain(
                original, inputs, scores, done.plan, options.get("max_memory"), common.seed, voice
            ),
        }
    # Of a run that was continued the rounds took longer than this process.
    rounds = sum(r.seconds_pruning + r.seconds_finetuning for r in done.rounds)
    seconds = max(time.perf_counter() - start, rounds)
    content["lead"] = (
        f"{len(done.rounds)} rounds of score, prune and fine-tune; samples: "
        + ", ".join(f"{k} {v}" for k, v in found.describe().items())
        + f"; {seconds / 60:.1f} minutes."
    )
    if output.report:
        files["report"] = str(write_report(output.out, content))
    written, failed = finish.write_exports(inputs, output.out, formats, voice)
    files |= written
    keys = ("before", "after", "rounds", "abandoned", "latency", "stopped")
    summary = {k: content[k] for k in keys}
    summary |= {"files": files, "failed": failed, "seconds": seconds}
    voice.result(summary, describe(summary))
    if done.stopped:  # `describe` and the JSON say why
        for line in failed:
            voice.error(line)
        raise typer.Exit(EXIT_STOPPED)
    if failed:
        raise ExportError("; ".join(failed))


def _optimizer(tuning: TuningOptions) -> OptimizerFactory:
    choose("--optimizer", tuning.optimizer, tuple(OPTIMIZERS))
    return partial(
        OPTIMIZERS[tuning.optimizer],
        lr=plain_number("--lr", tuning.lr, POSITIVE),
        weight_decay=plain_number("--weight-decay", tuning.weight_decay, NOT_NEGATIVE),
    )


def _content(done: CompressReport, latency: dict[str, Any]) -> dict[str, Any]:
    plain = done.to_dict()
    stopped = f"Stopped early: {done.stopped}." if done.stopped else ""
    if (given_up := done.abandoned) is not None:
        stopped += (
            f" The round that was given up had {given_up.macs / done.macs_before:.1%} of the MACs and "
            f"{given_up.params / done.params_before:.1%} of the parameters."
        )
    return {
        "before": {
            "macs": done.macs_before, "params": done.params_before, "metric": done.metric_before,
        },
        "after": {
            "macs": done.macs_after, "params": done.params_after, "metric": done.metric_after,
        },
        "rounds": plain["rounds"],
        "abandoned": plain["abandoned"],
        "latency": latency,
        "stopped": done.stopped,
        "notes": [*filter(None, (stopped, left_out(done.plan.meta["rejected"])))],
    }  # fmt: skip


def _show_plan(
    inputs: Inputs,
    options: dict[str, Any],
    budget: BudgetOptions,
    tuning: TuningOptions,
    common: CommonOptions,
    voice: Voice,
) -> None:
    """The whole budget in one shot: what would go by the first scores, and how long a run takes."""
    scores = run_score(inputs, options, common.seed, voice)
    plan = make_plan(inputs, scores, budget)
    rounds = tuning.rounds or ROUNDS
    if tuning.order == "layerwise":  # a round at most for every group that loses something
        rounds = min(tuning.rounds or len(plan), len(plan))
    per_round = FINETUNE_STEPS if tuning.finetune_steps is None else tuning.finetune_steps
    steps = tuning.warmup_steps + rounds * per_round + (tuning.final_steps or 0)
    seconds = steps * seconds_per_step(inputs) + rounds * sum(scores.meta["seconds"].values())
    cost = {"rounds": rounds, "training_steps": steps, "estimated_seconds": seconds}
    voice.result(
        {"plan": dict(plan), "meta": plan.meta, "cost": cost},
        plan.explain(),
        f"\nThe run scores again in each of {rounds} rounds, so it may choose otherwise. It trains "
        f"for {steps} steps: about {seconds / 60:.1f} minutes here, loading data and measuring "
        "accuracy not counted. Nothing was changed.",
    )


def seconds_per_step(inputs: Inputs) -> float:
    """The faster of two training steps on a copy, the loss being the mean of the outputs."""
    assert inputs.data is not None
    raw = next(iter(inputs.data.train or inputs.data.calibrate))
    batch = as_batch(raw, 0, device_of(inputs.model))
    twin = private_copy(inputs.model, trainable=True).train()
    taken = []
    for _ in range(2):
        start = time.perf_counter()
        logits_of(batch.call(twin)).mean().backward()
        taken.append(time.perf_counter() - start)
    return min(taken)
