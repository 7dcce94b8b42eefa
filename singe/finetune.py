"""How what pruning left is fine-tuned: options, defaults, a user's own function."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from singe.criteria import choose
from singe.errors import ModelError, OptionError, expect_callable
from singe.modes import in_mode
from singe.objectives import CrossEntropy, Loss, Objective, as_objective
from singe.plain import POSITIVE, plain_number
from singe.precision import OFFERED as LOWER
from singe.scores import fingerprint

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


LR, WEIGHT_DECAY, TEMPERATURE = 0.01, 5e-4, 2.0
# Usual value and range of every number; None where it is only used when given.
NUMBERS: dict[str, tuple[float | None, str]] = {
    "lr": (LR, POSITIVE), "label_smoothing": (0.0, "[0, 1)"), "clip_grad_norm": (None, "(0, inf]"),
    "distill": (0.0, "[0, 1]"), "temperature": (TEMPERATURE, POSITIVE), "ema": (None, "(0, 1)"),
}  # fmt: skip

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
    temperature: float = TEMPERATURE
    ema: float | None = None

    def __post_init__(self) -> None:
        if self.objective.needs_reference:
            raise OptionError(
                f"finetune_objective={self.objective.name!r} compares with the original model; "
                "use distill=1.0 for that"
            )
        choose("autocast", self.autocast, (None, *LOWER))


def call_finetune(finetune: FinetuneFunction, model: nn.Module, stage: Stage) -> float | None:
    """Let a function of the user's train, in training mode; gradients do not stay.

    Raises:
        ModelError: it left other parameters, shapes, dtypes or devices.
    """
    before, kinds = fingerprint(model), _kinds(model)
    with in_mode(model, training=True):
        loss = finetune(model, stage)
    for parameter in model.parameters():
        parameter.grad = None
    if fingerprint(model) != before:
        raise ModelError(
            "the finetune function changed names or shapes of the model's parameters; it must train the "
            "given model in place"
        )
    if (now := _kinds(model)) != kinds:
        raise ModelError(
            f"the finetune function left the model in {', '.join(now)}, and it came in {', '.join(kinds)}; "
            "put it back before returning (autocast leaves it as it is)"
        )
    if loss is model:  # `return model` is a habit
        return None
    if isinstance(loss, Tensor):
        loss = loss.detach()
    try:
        return None if loss is None else float(loss)
    except (TypeError, ValueError, RuntimeError):
        raise OptionError(
            f"the finetune function must return a loss as one number, or None; got {_told(loss)}"
        ) from None


def _kinds(model: nn.Module) -> list[str]:
    return sorted({f"{p.dtype} on {p.device}" for p in model.parameters()})


def _told(value: Any) -> str:
    """A value in a message; a module would print all its layers."""
    text = repr(value)
    return text if len(text) <= 60 and "\n" not in text else f"a {type(value).__name__}"


def _plain(name: str, given: Mapping[str, Any]) -> Any:
    usual, within = NUMBERS[name]
    value = given.get(name, usual)
    return None if value is usual is None else plain_number(name, value, within)


def training_of(
    finetune: FinetuneFunction | None = None,
    *,
    objective: str | Loss | Objective = "cross_entropy",
    optimizer: OptimizerFactory | None = None,
    scheduler: SchedulerFactory | None = None,
    autocast: torch.dtype | None = None,
    **numbers: Any,
) -> Training:
    """The training that :func:`singe.compress` was asked for.

    Args:
        numbers: those of :data:`NUMBERS`.

    Raises:
        OptionError: a value out of range, or one that would not have a say.
    """
    found = {name: _plain(name, numbers) for name in NUMBERS}
    changed = {name for name, value in found.items() if value != NUMBERS[name][0]}
    if finetune is not None:
        others = {"optimizer": optimizer, "scheduler": scheduler, "autocast": autocast}
        given = changed - {"distill"} | {
            name for name, value in others.items() if value is not None
        }
        if objective != "cross_entropy":
            given.add("finetune_objective")
        if given:
            raise OptionError(
                f"{', '.join(sorted(given))} belong to the built-in training; do that inside your finetune "
                "function"
            )
    elif "temperature" in changed and not found["distill"]:
        raise OptionError("temperature is of the distillation: give distill=, its weight, as well")
    if found["distill"] == 1.0 and (objective != "cross_entropy" or found["label_smoothing"]):
        idle = "label_smoothing" if found["label_smoothing"] else "finetune_objective"
        raise OptionError(
            f"with distill=1.0 the original's outputs are all that is trained for, so {idle} has no say; "
            "give distill less weight or leave the other out"
        )
    lr, label_smoothing = found.pop("lr"), found.pop("label_smoothing")
    if optimizer is not None and "lr" in changed:
        raise OptionError(
            f"lr is of the default optimizer; yours has its own: optimizer=lambda parameters: "
            f"torch.optim.AdamW(parameters, {lr!r})"
        )
    expect_callable(
        "optimizer", optimizer, "e.g. lambda parameters: torch.optim.SGD(parameters, 0.01)"
    )
    expect_callable("scheduler", scheduler, "lambda optimizer, steps: an LRScheduler")
    return Training(
        optimizer or default_optimizer(lr),
        scheduler or cosine,
        smoothed(trained(objective), label_smoothing),
        autocast=autocast,
        **found,
    )


def trained(objective: str | Loss | Objective) -> Objective:
    """An objective whose messages name the arguments of fine-tuning."""
    found = copy.copy(as_objective(objective))
    found.argument, found.without_labels = "finetune_objective", "distill=1.0"
    return found


def smoothed(objective: Objective, label_smoothing: float) -> Objective:
    """Cross-entropy with smoothed labels.

    Raises:
        OptionError: another objective.
    """
    if label_smoothing == 0.0:
        return objective
    if not isinstance(objective, CrossEntropy):
        raise OptionError(
            f"label_smoothing needs finetune_objective='cross_entropy', not {objective.name!r}"
        )
    found = copy.copy(objective)
    found.label_smoothing = label_smoothing
    return found


def default_optimizer(lr: float) -> OptimizerFactory:
    """SGD with Nesterov momentum 0.9 and weight decay 5e-4."""
    return partial(sgd, lr=lr)


def sgd(
    parameters: Iterable[nn.Parameter], lr: float, weight_decay: float = WEIGHT_DECAY
) -> Optimizer:
    """With Nesterov momentum 0.9."""
    return torch.optim.SGD(
        parameters, lr=lr, momentum=0.9, nesterov=True, weight_decay=weight_decay
    )


def cosine(optimizer: Optimizer, steps: int) -> LRScheduler:
    """From the optimizer's own rate to 0 within ``steps``."""
    return LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps)))
