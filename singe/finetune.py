"""How what pruning left is fine-tuned: options, defaults, a user's own function, recalibration."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from singe.criteria import choose
from singe.data import Batch, device_of, read_batches
from singe.errors import OptionError
from singe.graph import BATCH_NORMS
from singe.objectives import CrossEntropy, Objective
from singe.precision import OFFERED as LOWER
from singe.seeding import seed_all

OptimizerFactory = Callable[[Iterable[nn.Parameter]], Optimizer]
SchedulerFactory = Callable[[Optimizer, int], LRScheduler]


@dataclass(frozen=True)
class Stage:
    """What a ``finetune`` function of the user's is told.

    Attributes:
        round: 1 for the first.
        rounds: how many there are.
        steps: optimizer steps that this stage is meant to take.
        seed: differs from stage to stage, the same in a run that is continued.
        train: the training data as it was given.
        teacher: the original network if ``distill`` is not 0, else None.
    """

    round: int
    rounds: int
    steps: int
    seed: int
    train: Iterable[Any]
    teacher: nn.Module | None


FinetuneFunction = Callable[[nn.Module, Stage], float | None]


@dataclass(frozen=True)
class Training:
    """How a stage is trained; see :func:`singe.compress` for the meaning of each."""

    optimizer: OptimizerFactory
    scheduler: SchedulerFactory
    objective: Objective
    clip_grad_norm: float | None = None
    autocast: torch.dtype | None = None
    distill: float = 0.0
    temperature: float = 2.0
    ema: float | None = None

    def __post_init__(self) -> None:
        if self.objective.needs_reference:
            raise OptionError(
                f"finetune_objective={self.objective.name!r} compares with the original model; "
                "use distill=1.0 for that"
            )
        if self.clip_grad_norm is not None and not self.clip_grad_norm > 0:
            raise OptionError(f"clip_grad_norm must be positive, got {self.clip_grad_norm!r}")
        choose("autocast", self.autocast, (None, *LOWER))
        if not 0.0 <= self.distill <= 1.0:
            raise OptionError(f"distill must lie in [0, 1], got {self.distill!r}")
        if not self.temperature > 0:
            raise OptionError(f"temperature must be positive, got {self.temperature!r}")
        if self.ema is not None and not 0.0 < self.ema < 1.0:
            raise OptionError(f"ema must lie in (0, 1), got {self.ema!r}")


def smoothed(objective: Objective, label_smoothing: float) -> Objective:
    """Cross-entropy with smoothed labels.

    Raises:
        OptionError: out of range, or another objective.
    """
    if not 0.0 <= label_smoothing < 1.0:
        raise OptionError(f"label_smoothing must lie in [0, 1), got {label_smoothing!r}")
    if label_smoothing == 0.0:
        return objective
    if not isinstance(objective, CrossEntropy):
        raise OptionError(
            f"label_smoothing needs finetune_objective='cross_entropy', not {objective.name!r}"
        )
    return CrossEntropy(label_smoothing)


def default_optimizer(lr: float) -> OptimizerFactory:
    """SGD with Nesterov momentum 0.9 and weight decay 5e-4.

    Raises:
        OptionError: ``lr`` is no positive number.
    """
    if not isinstance(lr, int | float) or not 0.0 < lr < math.inf:
        raise OptionError(f"lr must be a positive number, got {lr!r}")
    return lambda parameters: torch.optim.SGD(
        parameters, lr=lr, momentum=0.9, nesterov=True, weight_decay=5e-4
    )


def cosine(optimizer: Optimizer, steps: int) -> LRScheduler:
    """From the optimizer's own rate to 0 within ``steps``."""
    return LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps)))


@contextmanager
def in_mode(model: nn.Module, training: bool | None) -> Iterator[None]:
    """Training or evaluation mode in here (None: as it is); every module's own comes back afterwards.

    A model that is in training mode already stays as it is: what was set to ``eval()`` inside it, a frozen
    norm say, is not trained.
    """
    modes = {module: module.training for module in model.modules()}
    if training is not None and not (training and model.training):
        model.train(training)
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def set_statistics(model: nn.Module, data: Iterable[Any], seed: int, round: int) -> bool:
    """:func:`recalibrate` on what a round of a run with this seed draws from ``data``."""
    seed_all(seed, "recalibrate", round, loader=data)
    return recalibrate(model, read_batches(data, device_of(model)))


@torch.no_grad()
def recalibrate(model: nn.Module, batches: Iterable[Batch]) -> bool:
    """Set the BatchNorms' running statistics to the mean over ``batches``; nothing else moves.

    Batches of a single sample are passed over where there are others. Where there are none they count,
    unless a norm sees a single value per channel, whose variance is not defined: then a warning says that
    all stays as it is.

    Returns:
        Whether anything was set.
    """
    norms: list[Any] = [
        m for m in model.modules() if isinstance(m, BATCH_NORMS) and m.running_mean is not None
    ]
    if not norms:
        return False
    given = list(batches)
    usable = [batch for batch in given if batch.size > 1] or given
    if not usable:
        return False
    before = [{k: t.clone() for k, t in norm.named_buffers()} for norm in norms]
    momenta = [norm.momentum for norm in norms]
    with in_mode(model, training=False):
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # a plain mean over the batches
            norm.train()
        try:
            for batch in usable:
                batch.call(model)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            for norm, buffers in zip(norms, before, strict=True):
                for name, tensor in norm.named_buffers():
                    tensor.copy_(buffers[name])
            warnings.warn(
                "the BatchNorms keep the statistics of the larger network: calibration batches of one sample "
                "have no variance; give them two samples or more",
                stacklevel=2,
            )
            return False
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
    return True
