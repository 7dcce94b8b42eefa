"""The scalar whose change is integrated: cross-entropy, label-free divergence, or the user's own."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from singe.data import LABEL_KEYS, Batch
from singe.errors import DataError, NonFiniteError, OptionError, SingeError, first_line

PROBABILITY_TOLERANCE = 0.01  # of their sum; bfloat16 probabilities are off by a few thousandths
IGNORE_INDEX = -100  # torch.nn.functional.cross_entropy's default
NEXT_TOKEN = (
    'lambda outputs, batch: F.cross_entropy({logits}[:, :-1].mT, batch["labels"][:, 1:], '
    'reduction="none").mean(1)'
)

Loss = Callable[[Any, Any], Tensor]


def logits_of(outputs: Any) -> Tensor:
    """The logits in a model's output: a tensor, ``.logits``, ``["logits"]`` / ``["out"]``, or item 0."""
    if isinstance(outputs, Tensor):
        return outputs
    if hasattr(outputs, "logits"):
        return outputs.logits
    if isinstance(outputs, dict):
        for key in ("logits", "out"):
            if key in outputs:
                return outputs[key]
    elif isinstance(outputs, tuple | list) and outputs and isinstance(outputs[0], Tensor):
        return outputs[0]
    raise DataError(
        f"cannot find logits in a model output of type {type(outputs).__name__}; pass a callable "
        "objective(outputs, batch) that knows where they are"
    )


def class_dim(outputs: Any, labels: Any = None) -> int:
    """The dimension of the classes: 1 of [B, C, ...] as in torch, 2 of the [B, T, C] of token models.

    Class indices tell by their shape. Without them, or where there are as many tokens as classes, [B, T, C]
    is what comes under the name ``logits``: so language models return it.
    """
    logits = logits_of(outputs)
    named = hasattr(outputs, "logits") or (isinstance(outputs, dict) and "logits" in outputs)
    usual = 2 if named and logits.dim() == 3 else 1
    if isinstance(labels, Tensor) and not labels.is_floating_point():
        fit = [d for d in (1, logits.dim() - 1) if labels.shape == _without_dim(logits, d)]
        return usual if usual in fit or not fit else fit[0]
    return usual


def _without_dim(tensor: Tensor, dim: int) -> torch.Size:
    return tensor.shape[:dim] + tensor.shape[dim + 1 :]


def _widened(logits: Tensor) -> Tensor:
    """Half precision to float32: sums over samples would round the differences away."""
    return logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits


def _per_sample(loss: Tensor, valid: Tensor | None = None) -> Tensor:
    """Mean over all but the first dimension (over valid positions only) -> [B]."""
    if loss.dim() == 1:
        return loss
    loss = loss.flatten(1)
    if valid is None:
        return loss.mean(1)
    count = valid.flatten(1).sum(1).clamp(min=1)
    return loss.sum(1) / count


class Objective:
    """One objective with its checks. ``name`` is kept in ``scores.meta``.

    Attributes:
        argument: what it was given as, for messages.
        without_labels: the argument that does without labels.
    """

    name: str
    argument = "objective"
    without_labels = "objective='kl'"
    needs_reference = False
    stacks = False  # torch.vmap can run ``total`` over outputs [V, B, ...]

    def check(self, outputs: Any, batch: Batch) -> None:
        """Raise a DataError if this batch does not fit the objective."""

    def per_sample(self, outputs: Any, batch: Batch, reference: Any) -> Tensor:
        """Loss per sample [B], or a scalar mean over the batch."""
        raise NotImplementedError

    def of_each_sample(self, outputs: Any, batch: Batch, reference: Any, wanted_by: str) -> Tensor:
        """Loss per sample [B].

        Raises:
            OptionError: the objective gives a mean; ``wanted_by`` is the option that cannot do with one.
        """
        losses = _widened(self.per_sample(outputs, batch, reference))
        if losses.shape != (batch.size,):
            raise OptionError(
                f"{wanted_by} needs to know the loss of every sample, but objective {self.name!r} gives a "
                "mean; return one loss per sample"
            )
        return losses

    def total(self, outputs: Any, batch: Batch, reference: Any = None) -> Tensor:
        """Sum of the loss over the batch's samples (0-dim), so that totals add up over batches.

        Raises:
            NonFiniteError: NaN or infinite loss, with the batch's index.
        """
        loss = _widened(self.per_sample(outputs, batch, reference))
        if loss.dim() == 0:
            total = loss * batch.size
        elif loss.shape == (batch.size,):
            total = loss.sum()
        else:
            raise DataError(
                f"objective {self.name!r} returned shape {tuple(loss.shape)} for batch "
                f"{batch.index} of {batch.size} samples; expected a scalar mean or one loss per "
                f"sample, shape ({batch.size},)"
            )
        return total

    @staticmethod
    def require_finite(total: Tensor, batch: Batch) -> None:
        """Raise NonFiniteError naming the batch if a loss is NaN or infinite."""
        if not bool(torch.isfinite(total).all()):
            raise NonFiniteError(
                f"the loss of batch {batch.index} is NaN or infinite; check this batch's inputs "
                "and labels, and that the model's outputs are finite in evaluation mode, with all gates "
                "closed too (what divides by a sum of channels has nothing to divide by there)"
            )


def check_classes(labels: Tensor, classes: int, where: str) -> None:
    """Raise DataError for class indices that the model has no output for; -100 is ignored by all."""
    bad = ((labels < 0) | (labels >= classes)) & (labels != IGNORE_INDEX)
    if bool(bad.any()):
        values = sorted(set(labels[bad].tolist()))[:5]
        raise DataError(
            f"{where}: labels {values} are out of range for a model with {classes} outputs; labels "
            f"must lie in [0, {classes - 1}], or be {IGNORE_INDEX} where they shall not count"
        )


class CrossEntropy(Objective):
    name = "cross_entropy"
    stacks = True

    def __init__(self, label_smoothing: float = 0.0) -> None:
        self.label_smoothing = label_smoothing

    def check(self, outputs: Any, batch: Batch) -> None:
        logits, labels = logits_of(outputs), batch.labels
        if labels is not None and not isinstance(labels, Tensor):
            raise DataError(
                f"the labels of batch {batch.index} are a {type(labels).__name__}; make a tensor of them, "
                "torch.as_tensor(labels)"
            )
        if labels is None:
            raise DataError(
                f"objective 'cross_entropy' needs labels, batch {batch.index} has none; give "
                f"(inputs, labels) batches or use {self.without_labels}, which needs no labels"
            )
        if labels.is_floating_point():
            if labels.shape != logits.shape:
                raise DataError(
                    f"batch {batch.index}: floating-point labels are read as class probabilities "
                    f"and must have the logits' shape {tuple(logits.shape)}, got "
                    f"{tuple(labels.shape)}; pass integer class indices otherwise"
                )
            off = (labels.sum(1) - 1).abs().amax()
            if bool((labels < 0).any()) or not float(off) <= PROBABILITY_TOLERANCE:
                raise DataError(
                    f"batch {batch.index}: floating-point labels are read as class probabilities, and "
                    "these are negative or do not sum to 1; for regression or several labels per sample "
                    f"give {self.argument}=lambda outputs, batch: F.mse_loss(outputs, batch[1])"
                )
            return
        dim = class_dim(outputs, labels)
        expected = _without_dim(logits, dim)
        if labels.shape != expected:
            raise DataError(
                f"batch {batch.index}: labels have shape {tuple(labels.shape)}, the model's "
                f"outputs {tuple(logits.shape)} need {tuple(expected)}"
            )
        check_classes(labels, logits.shape[dim], f"batch {batch.index}")
        tokens = batch.kwargs.get("input_ids")
        if not isinstance(tokens, Tensor) or tokens.shape != labels.shape:
            return
        counted = labels != IGNORE_INDEX
        if bool(counted.any()) and torch.equal(tokens[counted], labels[counted].to(tokens)):
            where = "outputs.logits" if hasattr(outputs, "logits") else 'outputs["logits"]'
            offered = NEXT_TOKEN.format(logits="outputs" if outputs is logits else where)
            warnings.warn(
                "the labels are the input_ids, and every output is compared with the token that went in; for "
                f"a model that predicts the next one give {self.argument}={offered}",
                stacklevel=2,
            )

    def per_sample(self, outputs: Any, batch: Batch, reference: Any) -> Tensor:
        logits, labels = _widened(logits_of(outputs)), batch.labels
        if labels.is_floating_point():
            loss = F.cross_entropy(
                logits, labels, reduction="none", label_smoothing=self.label_smoothing
            )
            return _per_sample(loss)
        dim = class_dim(outputs, labels)
        if dim != 1:
            logits = logits.movedim(dim, 1)
        loss = F.cross_entropy(
            logits, labels.long(), reduction="none", ignore_index=IGNORE_INDEX,
            label_smoothing=self.label_smoothing,
        )  # fmt: skip
        return _per_sample(loss, labels != IGNORE_INDEX if loss.dim() > 1 else None)


class KL(Objective):
    """KL(original || gated): ``sum_c p0_c (log p0_c - log p_c)``; zero, with zero gradient, at mu = 1."""

    name = "kl"
    stacks = True
    needs_reference = True

    def per_sample(self, outputs: Any, batch: Batch, reference: Any) -> Tensor:
        logits = _widened(logits_of(outputs))
        dim = class_dim(outputs, batch.labels)
        log_p = logits.log_softmax(dim)
        log_p0 = _widened(logits_of(reference)).log_softmax(dim)
        return _per_sample((log_p0.exp() * (log_p0 - log_p)).sum(dim))


class UserObjective(Objective):
    """A user's ``objective(outputs, batch)``: per sample [B] or a scalar mean over the batch."""

    def __init__(self, function: Loss) -> None:
        self.function = function
        self.name = getattr(function, "__qualname__", type(function).__name__)

    def per_sample(self, outputs: Any, batch: Batch, reference: Any) -> Tensor:
        try:
            loss = self.function(outputs, batch.raw)
        except SingeError:
            raise
        except (TypeError, AttributeError, LookupError, ValueError) as error:
            # A torch loss as it is gets (outputs, (x, y)).
            raise DataError(
                f"objective {self.name!r} failed on batch {batch.index} ({type(error).__name__}: "
                f"{first_line(error)}). It is called with the model's outputs and the whole batch as the "
                f"data gives it; {self._example(batch)}"
            ) from error
        if not isinstance(loss, Tensor):
            raise DataError(
                f"objective {self.name!r} returned {type(loss).__name__}; expected a tensor: one "
                f"loss per sample or their mean; {self._example(batch)}"
            )
        return loss

    @staticmethod
    def _example(batch: Batch) -> str:
        key = isinstance(batch.raw, Mapping) and next(
            (k for k in LABEL_KEYS if k in batch.raw), None
        )
        if not key:
            return "for (x, y): lambda outputs, batch: F.cross_entropy(outputs, batch[1])"
        return (
            f"the model is not given batch[{key!r}], so it has no loss of its own: lambda outputs, batch: "
            f"F.cross_entropy(outputs.logits, batch[{key!r}])"
        )


def as_objective(value: str | Loss | Objective) -> Objective:
    """``"cross_entropy"``, ``"kl"`` or a callable ``(outputs, batch) -> Tensor``.

    Raises:
        OptionError: anything else.
    """
    if isinstance(value, Objective):
        return value
    if value == "cross_entropy":
        return CrossEntropy()
    if value == "kl":
        return KL()
    if callable(value):
        return UserObjective(value)
    raise OptionError(
        f"unknown objective {value!r}; use 'cross_entropy', 'kl' or a callable(outputs, batch)"
    )
