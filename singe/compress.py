"""``singe.compress``: score, prune a share, fine-tune a little, and again, until a target is met."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, fields, replace
from os import PathLike
from typing import Any

import torch
from torch import nn

from singe.checkpoint import Folder, digest_of
from singe.choice import ROUNDS
from singe.data import as_batch, check_reiterable, device_of
from singe.errors import CheckpointError, OptionError, expect_callable
from singe.evaluation import Evaluate, as_evaluate
from singe.finetune import (
    LR,
    TEMPERATURE,
    FinetuneFunction,
    OptimizerFactory,
    SchedulerFactory,
    training_of,
)
from singe.gradients import check_changeable, gradients_on
from singe.graph import expect_model, separate_copy, unwrapped
from singe.latency import Timing
from singe.limits import MAX_PRUNING_RATIO, Share
from singe.loop import Loop
from singe.memory import usual_budget
from singe.objectives import Loss, Objective
from singe.plain import plain_count, plain_number
from singe.plan import Plan
from singe.request import Request, check_float32, power_for_pruning
from singe.rounds import CompressReport, Round, Schedule, pruning_of
from singe.scores import Scores
from singe.seeding import Stream, derive, random_state_kept
from singe.settings import as_json
from singe.snapshot import Snapshot
from singe.tuner import Tuner

CALIBRATION_SAMPLES = 256  # taken from the training data when no calibration data is given
FINETUNE_STEPS = 200  # per round
CHECKPOINT_EVERY = 100  # steps
# Of a request: what decides the scores, and is not remembered under another name.
REMEMBERED = {f.name for f in fields(Request)} - {"objective", "progress", "seed", "checkpoint"}
LEAST_MEMORY = 64 << 20  # bytes for scoring, even where the system reports none free


@gradients_on()
def compress(
    model: nn.Module,
    *,
    train: Iterable[Any],
    calibrate: Iterable[Any] | None = None,
    evaluate: Evaluate | Iterable[Any] | None = None,
    macs: float | None = None,
    params: float | None = None,
    channels: float | None = None,
    latency: float | None = None,
    timing: Timing | None = None,
    rounds: int | None = None,
    schedule: Schedule = "linear",
    order: str = "global",
    visit: str = "forward",
    ranking: str = "cost",
    round_to: int = 1,
    min_keep: Share | None = None,
    max_keep: Share | None = None,
    max_pruning_ratio: float = MAX_PRUNING_RATIO,
    finetune_steps: int = FINETUNE_STEPS,
    final_steps: int = 0,
    finetune: FinetuneFunction | None = None,
    optimizer: OptimizerFactory | None = None,
    scheduler: SchedulerFactory | None = None,
    lr: float = LR,
    clip_grad_norm: float | None = None,
    autocast: torch.dtype | None = None,
    label_smoothing: float = 0.0,
    distill: float = 0.0,
    temperature: float = TEMPERATURE,
    ema: float | None = None,
    recalibrate: bool = True,
    objective: str | Loss | Objective = "cross_entropy",
    finetune_objective: str | Loss | Objective = "cross_entropy",
    accuracy_floor: float | None = None,
    checkpoint: str | PathLike[str] | None = None,
    checkpoint_every: int | None = None,
    resume: bool = False,
    on_round: Callable[[Round, Scores, Plan], None] | None = None,
    progress: bool = True,
    seed: int = 0,
    **score_options: Any,
) -> CompressReport:
    """Prune ``model`` in place to a target, in rounds, with fine-tuning in between.

    Every round scores the network as it is by then, removes the share that brings it one step closer
    to the target, and fine-tunes what is left. If anything fails, the model is put back exactly as it
    was, the same parameter objects included.

    Args:
        model: in and out as an ordinary module, in the mode it came in. Where it comes in training mode,
            parts of it that are in evaluation mode (frozen norms) are trained in that.
        train: re-iterable of ``(x, y)`` batches, cycled through during fine-tuning. Every epoch and
            batch is seeded; see :class:`singe.seeding.Stream`.
        calibrate: re-iterable of batches to score on; default the first batches of ``train`` that hold
            256 samples.
        evaluate: ``callable(model) -> float``, or batches whose top-1 accuracy (0..1) is measured.
        macs: target, a share of the model's (<= 1) or an absolute number.
        params: the same in parameters.
        channels: the same in units of the scored groups.
        latency: the same in measured time, a share or milliseconds (> 1). Exactly one of the four
            targets is given.
        timing: how ``latency`` is measured; not to be given with another target.
        rounds: how many times to score, prune and fine-tune; default 5, or one per group layerwise.
        schedule: what the rounds take: ``"linear"``, ``"cubic"``, ``"geometric"``, or a callable from
            the share of the rounds to the share of the way; see :func:`singe.rounds.target_after`.
        order: ``"global"``: every round takes from the whole network. ``"layerwise"``: a first scoring
            settles how many units each group loses, then the groups are scored, pruned and followed
            by fine-tuning one after the other.
        visit: layerwise only: ``"forward"`` (front to back, as called) or ``"damage"`` (least score lost
            first).
        ranking: see :func:`singe.plan`, like the next three.
        round_to: kept channels are a multiple of this.
        min_keep: shares of the units of the *original* groups, like the next two.
        max_keep: share that a group keeps at most, from the first round on.
        max_pruning_ratio: no group loses more than this share.
        finetune_steps: optimizer steps per round.
        final_steps: further steps in the last round.
        finetune: ``callable(model, stage) -> loss or None`` in place of the built-in training and its
            options; see :class:`singe.Stage`. It trains the model in place and leaves its shapes alone.
        optimizer: ``callable(parameters) -> Optimizer``, called in every round; what the last one had
            gathered per parameter is cut as the parameters were, and goes on. Default SGD with
            Nesterov momentum 0.9 and weight decay 5e-4 at ``lr``.
        scheduler: ``callable(optimizer, steps) -> LRScheduler``, stepped after every step; default a
            cosine from ``lr`` to 0 in every round.
        lr: of the default optimizer.
        clip_grad_norm: largest norm of the gradient of all parameters together.
        autocast: ``torch.bfloat16`` or ``torch.float16`` for mixed precision; the latter scales the loss
            (``torch.amp.GradScaler``) and passes over steps whose gradients overflow.
        label_smoothing: of ``finetune_objective="cross_entropy"``.
        distill: weight in [0, 1] of the divergence from the original network's logits; the objective
            has the rest. At 1 no labels are needed.
        temperature: of the distillation.
        ema: decay of a moving average of the weights, in float32 at least; it is what is evaluated, and what
            comes back.
        recalibrate: set the BatchNorms' statistics on the calibration data after each removal, those of
            frozen norms included.
        objective: what is scored; see :func:`singe.score`.
        finetune_objective: what is trained.
        accuracy_floor: once the metric after a round is below this, the last good round comes back.
        checkpoint: folder for checkpoints, one after every removal, every round, and every
            ``checkpoint_every`` steps; see ``docs/pruning.md``.
        checkpoint_every: steps of the built-in training, default 100.
        resume: continue from the newest checkpoint there, if there is one. ``model`` is the original.
        on_round: called after every round, a rolled back one included, with what it did, its scores
            and its plan.
        progress: print a line per round, and show progress when standard error is a terminal.
        seed: of everything random, scoring with ``criterion="random"`` included.
        score_options: ``criterion``, ``path``, ``quadrature``, ``p``, ``norm``, ``layers``, ``ignore``,
            ``engine``, ``max_memory`` of :func:`singe.score`. ``p`` is ``"fisher"`` by default on the layer
            path, with the objectives "cross_entropy" and "kl"; else 1.

    Returns:
        A :class:`CompressReport`.

    Raises:
        CheckpointError: a checkpoint cannot be written, none can be continued from, or another process works
            in the folder.
        SingeError: as :func:`singe.score` and :func:`singe.plan`; the model is unchanged then. A target that
            comes out of reach after the first round (a latency; any, once a group fails its check) is no
            error: the run stops, see ``stopped``.
    """
    finetune_steps = plain_count("finetune_steps", finetune_steps, 0)
    final_steps = plain_count("final_steps", final_steps, 0)
    if checkpoint_every is not None:
        checkpoint_every = plain_count("checkpoint_every", checkpoint_every, 1)
        if checkpoint is None:
            raise OptionError("checkpoint_every needs checkpoint=, the folder for the checkpoints")
        if finetune is not None:
            raise OptionError(
                "checkpoint_every counts steps of the built-in training; around every call of a finetune "
                "function there are checkpoints anyway, inside it there are none"
            )
    seed = plain_count("seed", seed)
    if resume and checkpoint is None:
        raise OptionError("resume=True needs checkpoint=, the folder to continue from")
    unknown = score_options.keys() - {f.name for f in fields(Request)}
    if unknown:
        raise TypeError(f"compress() got an unexpected keyword argument {min(unknown)!r}")
    score_options.setdefault("p", power_for_pruning({"objective": objective} | score_options))
    request = Request(objective=objective, progress=progress, seed=seed, **score_options)
    if request.granularity != "unit" or request.compile:
        raise OptionError(
            "compress ranks units on a network that changes its shapes every round: granularity must "
            "be 'unit' and compile False"
        )
    expect_model(model)
    check_changeable(model)
    expect_callable("finetune", finetune, "lambda model, stage: the loss or None")
    expect_callable("on_round", on_round, "lambda round, scores, plan: None")
    check_reiterable(train, "train")
    if calibrate is not None:
        check_reiterable(calibrate, "calibrate")
    measure = as_evaluate(evaluate)
    if accuracy_floor is not None:
        if measure is None:
            raise OptionError(
                "accuracy_floor needs evaluate=, the metric that shall not fall below it"
            )
        accuracy_floor = plain_number("accuracy_floor", accuracy_floor, "[-inf, inf]")
    tuning: dict[str, Any] = {
        "optimizer": optimizer, "scheduler": scheduler, "lr": lr, "clip_grad_norm": clip_grad_norm,
        "autocast": autocast, "label_smoothing": label_smoothing, "distill": distill,
        "temperature": temperature, "ema": ema,
    }  # fmt: skip
    training = training_of(finetune, objective=finetune_objective, **tuning)
    if autocast is not None:
        check_float32(model, "autocast")
    pruning = pruning_of(
        macs=macs, params=params, channels=channels, latency=latency, rounds=rounds,
        schedule=schedule, order=order, visit=visit, ranking=ranking, round_to=round_to,
        min_keep=min_keep, max_keep=max_keep, max_pruning_ratio=max_pruning_ratio, timing=timing,
    )  # fmt: skip
    settings = as_json(
        {
            **vars(pruning), "timing": asdict(pruning.timing), **tuning, "recalibrate": recalibrate,
            "rounds": pruning.rounds or (ROUNDS if order == "global" else None),
            "frozen": [n for n, p in unwrapped(model).named_parameters() if not p.requires_grad],
            "in_evaluation": [
                n for n, m in unwrapped(model).named_modules() if model.training and not m.training
            ],
            "finetune_steps": finetune_steps, "final_steps": final_steps, "finetune": finetune,
            "objective": request.definition.objective.name,
            "finetune_objective": training.objective.name, "accuracy_floor": accuracy_floor,
            "seed": seed, "score": {k: v for k, v in vars(request).items() if k in REMEMBERED},
        },
        model,
    )  # fmt: skip
    device = device_of(model)
    with (
        random_state_kept(train, calibrate, evaluate),
        Snapshot(model) as snapshot,
        _open(checkpoint, settings, model, resume) as folder,
    ):
        if calibrate is None:
            calibrate = _first_samples(train, CALIBRATION_SAMPLES, seed)
        if request.max_memory is None:
            request = replace(request, max_memory=max(LEAST_MEMORY, usual_budget(device)))
        teacher = separate_copy(model).eval() if training.distill > 0 else None
        tuner = Tuner(model, training, Stream(train, derive(seed, "train")), seed, teacher)
        if finetune is None and finetune_steps + final_steps > 0:
            tuner.check()  # now, not after the first removal
        loop = Loop(
            model=model, snapshot=snapshot, pruning=pruning, request=request, tuner=tuner,
            calibrate=calibrate, train=train, measure=measure, floor=accuracy_floor,
            finetune=finetune, finetune_steps=finetune_steps, final_steps=final_steps,
            recalibrate=recalibrate, folder=folder, checkpoint_every=checkpoint_every or CHECKPOINT_EVERY,
            on_round=on_round, progress=progress, seed=seed,
        )  # fmt: skip
        report = loop.run(folder.newest() if folder and resume else None)
        snapshot.discard()
    return report


@contextmanager
def _open(
    path: str | PathLike[str] | None, settings: Mapping[str, Any], model: nn.Module, resume: bool
) -> Iterator[Folder | None]:
    if path is None:
        yield None
        return
    folder = Folder(path, {**settings, "model": digest_of(model)})
    with folder.held():
        if folder.files() and not resume:
            raise CheckpointError(
                f"{folder.path} holds a run already; continue it with resume=True, or use another folder"
            )
        yield folder


def _first_samples(batches: Iterable[Any], samples: int, seed: int) -> list[Any]:
    """The first batches of one epoch that hold so many samples, or all of it."""
    stream = Stream(batches, derive(seed, "calibrate"))
    kept, seen = [], 0
    while seen < samples:
        raw = stream.next()
        if stream.state()["epoch"] > 0:
            break
        kept.append(raw)
        seen += as_batch(raw, len(kept) - 1, torch.device("cpu")).size
    return kept
