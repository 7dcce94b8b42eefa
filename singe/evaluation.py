"""Top-1 accuracy, and whatever else a user calls his metric."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from singe.data import check_reiterable, device_of, outputs_on, read_batches
from singe.errors import DataError, OptionError
from singe.modes import in_mode
from singe.objectives import IGNORE_INDEX, check_classes, class_dim, logits_of

Evaluate = Callable[[nn.Module], float]


def as_evaluate(evaluate: Evaluate | Iterable[Any] | None) -> Evaluate | None:
    """A callable as it is, batches as their accuracy."""
    if evaluate is None:
        return None
    if callable(evaluate):
        return lambda model: _number(evaluate(model))
    check_reiterable(evaluate, "evaluate")
    return lambda model: accuracy(model, evaluate)


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError) as error:
        raise OptionError(
            f"evaluate must return a number (higher is better), got {type(value).__name__}"
        ) from error


@torch.no_grad()
def accuracy(model: nn.Module, batches: Iterable[Any]) -> float:
    """Top-1 accuracy (0..1) of class-index labels, in evaluation mode; the modes are put back.

    Labels of -100 are ignored, as the loss ignores them.

    Raises:
        DataError: labels that are missing, of another shape, outside the classes, or all ignored.
    """
    right = total = 0
    with in_mode(model, training=False):
        for batch in read_batches(batches, device_of(model), "evaluation"):
            outputs = outputs_on(model, batch, "evaluation")
            logits, dim = logits_of(outputs), class_dim(outputs, batch.labels)
            predicted = logits.argmax(dim)
            if not isinstance(batch.labels, Tensor):
                raise DataError(f"evaluation batch {batch.index} has no labels")
            if batch.labels.shape != predicted.shape:
                raise DataError(
                    f"evaluation batch {batch.index} has labels of shape {tuple(batch.labels.shape)}, "
                    f"the model's outputs need class indices of shape {tuple(predicted.shape)}; give "
                    "evaluate=callable(model) for another metric"
                )
            check_classes(batch.labels, logits.shape[dim], f"evaluation batch {batch.index}")
            counted = batch.labels != IGNORE_INDEX
            right += int((counted & (predicted == batch.labels)).sum())
            total += int(counted.sum())
    if not total:
        raise DataError(
            f"every label of the evaluation data is {IGNORE_INDEX}: nothing to evaluate"
        )
    return right / total
