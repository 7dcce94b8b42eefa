"""``singe.compress``: score, prune a share, fine-tune a little, and again, until a target is met."""

from __future__ import annotations

import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from singe.cost import count
from singe.data import as_batch, check_reiterable, device_of, first_batch, read_batches
from singe.errors import DataError, ModelError, NonFiniteError, OptionError
from singe.graph import ModelGraph
from singe.objectives import Loss, Objective, as_objective, logits_of
from singe.plan import (
    MAX_PRUNING_RATIO,
    absolute,
    check_ratio,
    floors_of,
    make_plan,
    target_of,
)
from singe.removal import remove_units
from singe.scoring import score
from singe.snapshot import Snapshot
from singe.units import find_groups, small

CALIBRATION_SAMPLES = 256  # taken from the training data when no calibration data is given

OptimizerFactory = Callable[[Iterable[nn.Parameter]], Optimizer]
SchedulerFactory = Callable[[Optimizer, int], LRScheduler]
Evaluate = Callable[[nn.Module], float]


@dataclass
class Round:
    """One round of the loop. Metrics are what ``evaluate`` gave, or None."""

    macs: float
    params: int
    units_removed: int
    metric_pruned: float | None
    metric_finetuned: float | None
    finetune_loss: float | None
    seconds_pruning: float
    seconds_finetuning: float


@dataclass
class CompressReport:
    """What the loop did, round by round. MACs are per sample, as Torch-Pruning counts them."""

    macs_before: float
    params_before: int
    metric_before: float | None
    rounds: list[Round] = field(default_factory=list)

    @property
    def macs_after(self) -> float:
        return self.rounds[-1].macs if self.rounds else self.macs_before

    @property
    def params_after(self) -> int:
        return self.rounds[-1].params if self.rounds else self.params_before

    @property
    def metric_after(self) -> float | None:
        return self.rounds[-1].metric_finetuned if self.rounds else self.metric_before

    def to_dict(self) -> dict[str, Any]:
        """Plain data, ready for JSON."""
        return asdict(self)


def compress(
    model: nn.Module,
    *,
    train: Iterable[Any],
    calibrate: Iterable[Any] | None = None,
    evaluate: Evaluate | Iterable[Any] | None = None,
    macs: float | None = None,
    params: float | None = None,
    channels: float | None = None,
    rounds: int = 5,
    finetune_steps: int = 200,
    optimizer: OptimizerFactory | None = None,
    scheduler: SchedulerFactory | None = None,
    lr: float = 0.01,
    objective: str | Loss | Objective = "cross_entropy",
    finetune_objective: str | Loss | Objective = "cross_entropy",
    ranking: str = "global",
    max_pruning_ratio: float = MAX_PRUNING_RATIO,
    progress: bool = True,
    **score_options: Any,
) -> CompressReport:
    """Prune ``model`` in place to a target, in rounds, with fine-tuning in between.

    Every round scores the network as it is by then, removes the share that brings it one equal step
    closer to the target, and fine-tunes what is left with a new optimizer (the old one's state
    belongs to parameters that no longer exist). If anything fails, the model is put back exactly as it
    was, the same parameter objects included.

    Args:
        model: in and out as an ordinary module, in the mode it came in.
        train: re-iterable of ``(x, y)`` batches, cycled through during fine-tuning.
        calibrate: re-iterable of batches to score on; default the first batches of ``train`` that hold
            256 samples.
        evaluate: ``callable(model) -> float``, or batches whose top-1 accuracy (0..1) is measured.
        macs: target, a share of the model's (<= 1) or an absolute number.
        params: the same in parameters. Exactly one of ``macs``, ``params``, ``channels`` is given.
        channels: the same in units of the scored groups.
        rounds: how many times to score, prune and fine-tune.
        finetune_steps: optimizer steps per round.
        optimizer: ``callable(parameters) -> Optimizer``; default SGD with Nesterov momentum 0.9 and
            weight decay 5e-4 at ``lr``.
        scheduler: ``callable(optimizer, steps) -> LRScheduler``, stepped after every step; default a
            cosine from ``lr`` to 0 in every round.
        objective: what is scored; see :func:`singe.score`.
        finetune_objective: what is trained.
        ranking: see :func:`singe.plan`.
        max_pruning_ratio: see :func:`singe.plan`; a share of the units of the *original* groups.
        score_options: ``criterion``, ``path``, ``quadrature``, ``p``, ``norm``, ``layers``, ``ignore``,
            ``engine``, ``max_memory``, ``seed`` of :func:`singe.score`.

    Returns:
        A :class:`CompressReport`.

    Raises:
        SingeError: as :func:`singe.score` and :func:`singe.plan`; the model is unchanged then.
    """
    if rounds < 1 or finetune_steps < 0:
        raise OptionError(
            f"rounds must be >= 1 and finetune_steps >= 0, got {rounds} and {finetune_steps}"
        )
    check_reiterable(train, "train")
    if calibrate is None:
        calibrate = _first_samples(train, CALIBRATION_SAMPLES)
    check_reiterable(calibrate, "calibrate")
    measure = _as_evaluate(evaluate)
    kind, value = target_of(macs=macs, params=params, channels=channels)
    check_ratio(max_pruning_ratio)
    trained = as_objective(finetune_objective)
    if trained.needs_reference:
        raise OptionError(f"finetune_objective={trained.name!r} compares with the original model")
    tune = partial(
        finetune,
        batches=_endless(train),
        steps=finetune_steps,
        optimizer=optimizer or _default_optimizer(lr),
        scheduler=scheduler or _cosine,
        objective=trained,
    )
    score_options |= {"objective": objective, "progress": progress}
    console = Console(stderr=True, quiet=not progress)
    with Snapshot(model) as snapshot:
        batch = small(first_batch(calibrate, device_of(model)))
        report = CompressReport(*count(model, batch), measure(model) if measure else None)
        schedule: Schedule | None = None
        for index in range(1, rounds + 1):
            began = time.perf_counter()
            scores = score(model, calibrate, **score_options)
            graph = find_groups(model, batch, layers=list(scores))
            schedule = schedule or Schedule.start(report, graph, kind, value, max_pruning_ratio)
            plan = make_plan(
                model, graph, scores, batch, kind, schedule.target(index / rounds),
                ranking=ranking, floors=schedule.floors, last=schedule.last,
            )  # fmt: skip
            remove_units(model, batch, [(g, plan[g.name]) for g in graph.groups if g.name in plan])
            pruned = time.perf_counter()
            metric_pruned = measure(model) if measure else None
            tuning = time.perf_counter()
            loss = tune(model)
            tuned = time.perf_counter()
            done = Round(
                *count(model, batch), plan.n_units, metric_pruned,
                measure(model) if measure else None, loss, pruned - began, tuned - tuning,
            )  # fmt: skip
            report.rounds.append(done)
            console.print(f"round {index}/{rounds}: {_describe(done, report)}", highlight=False)
        snapshot.discard()
    return report


@dataclass(frozen=True)
class Schedule:
    """Equal steps from the cost of the original model to the target.

    Attributes:
        full: cost of the original model.
        last: the target, in the same unit.
        floors: units that every group keeps at least, from its original number.
    """

    full: float
    last: float
    floors: dict[str, int]

    @classmethod
    def start(
        cls, report: CompressReport, graph: ModelGraph, kind: str, value: float, ratio: float
    ) -> Schedule:
        units = {g.name: g.n_units for g in graph.groups}
        full = {
            "macs": report.macs_before,
            "params": float(report.params_before),
            "channels": float(sum(units.values())),
        }[kind]
        return cls(full, absolute(value, full), floors_of(units, ratio))

    def target(self, share: float) -> float:
        """The absolute target once ``share`` of the way is done."""
        return self.full + (self.last - self.full) * share


def _describe(done: Round, report: CompressReport) -> str:
    text = (
        f"{done.units_removed} units, {done.macs / report.macs_before:.1%} MACs, "
        f"{done.params / report.params_before:.1%} parameters"
    )
    if done.metric_finetuned is None:
        return text
    return f"{text}, metric {done.metric_pruned:.4f} -> {done.metric_finetuned:.4f}"


@contextmanager
def in_mode(model: nn.Module, training: bool) -> Iterator[None]:
    """Training or evaluation mode in here; every module's own mode is put back afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.train(training)
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def finetune(
    model: nn.Module,
    batches: Iterator[Any],
    steps: int,
    optimizer: OptimizerFactory,
    scheduler: SchedulerFactory,
    objective: Objective,
) -> float | None:
    """``steps`` optimizer steps in training mode; the modules' modes are put back afterwards.

    Returns:
        Mean loss of the last tenth of the steps, or None without any step.

    Raises:
        NonFiniteError: the loss diverged.
    """
    if steps == 0:
        return None
    device = device_of(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    if not parameters:
        raise ModelError("no parameter requires a gradient, so there is nothing to fine-tune")
    optim = optimizer(parameters)
    schedule = scheduler(optim, steps)
    tail: list[Tensor] = []
    try:
        with in_mode(model, training=True):
            for step in range(steps):
                batch = as_batch(next(batches), step, device)
                outputs = batch.call(model)
                objective.check(outputs, batch)
                loss = objective.total(outputs, batch) / batch.size
                if not bool(torch.isfinite(loss)):
                    raise NonFiniteError(
                        f"fine-tuning diverged: the loss of step {step} is {loss.item()}; lower `lr`"
                    )
                optim.zero_grad(set_to_none=True)
                loss.backward()
                optim.step()
                schedule.step()
                if step >= steps - max(1, steps // 10):
                    tail.append(loss.detach())
    finally:
        optim.zero_grad(set_to_none=True)
    return float(torch.stack(tail).mean())


def _default_optimizer(lr: float) -> OptimizerFactory:
    return lambda parameters: torch.optim.SGD(
        parameters, lr=lr, momentum=0.9, nesterov=True, weight_decay=5e-4
    )


def _cosine(optimizer: Optimizer, steps: int) -> LRScheduler:
    return LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps)))


def _first_samples(batches: Iterable[Any], samples: int) -> list[Any]:
    kept, seen = [], 0
    for index, raw in enumerate(batches):
        kept.append(raw)
        seen += as_batch(raw, index, torch.device("cpu")).size
        if seen >= samples:
            break
    return kept


def _endless(batches: Iterable[Any]) -> Iterator[Any]:
    for _ in itertools.count():
        empty = True
        for batch in batches:
            empty = False
            yield batch
        if empty:
            raise DataError("the training data is empty: it gave no batch")


def _as_evaluate(evaluate: Evaluate | Iterable[Any] | None) -> Evaluate | None:
    if evaluate is None or callable(evaluate):
        return evaluate
    check_reiterable(evaluate, "evaluate")
    return lambda model: accuracy(model, evaluate)


@torch.no_grad()
def accuracy(model: nn.Module, batches: Iterable[Any]) -> float:
    """Top-1 accuracy (0..1) of class-index labels, in evaluation mode; the modes are put back."""
    right = total = 0
    with in_mode(model, training=False):
        for batch in read_batches(batches, device_of(model)):
            predicted = logits_of(batch.call(model)).argmax(1)
            if not isinstance(batch.labels, Tensor):
                raise DataError(f"evaluation batch {batch.index} has no labels")
            right += int((predicted == batch.labels).sum())
            total += batch.labels.numel()
    return right / total
