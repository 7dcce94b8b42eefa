"""Every error a user can cause: what was wrong, where, and what to do."""

from __future__ import annotations


class SingeError(Exception):
    """Base class of all errors this package raises on purpose."""


class DataError(SingeError, ValueError):
    """The calibration data is empty, one-shot, malformed, or does not fit the objective."""


class NonFiniteError(SingeError, ArithmeticError):
    """A batch, a loss or a score is NaN or infinite."""


class ModelError(SingeError, ValueError):
    """The model cannot be traced, has nothing to prune, or has no layer of that name."""


class OptionError(SingeError, ValueError):
    """An argument has a value that is not offered; the message lists what is."""


class ScoresError(SingeError, ValueError):
    """Scores or a plan do not belong to this model, or a file of them is damaged."""


class BudgetError(SingeError, ValueError):
    """A pruning target cannot be met; the message names the smallest one that can."""


class CheckpointError(SingeError, RuntimeError):
    """A checkpoint cannot be written, is damaged, or belongs to another run, which may be at work there."""


class KernelError(SingeError, RuntimeError):
    """A kernel was asked for a device, dtype, shape or build that it does not have."""


class ExportError(SingeError, RuntimeError):
    """A model cannot be exported, or its exported form computes something else."""


def expect(argument: str, value: object, kind: type, wanted: str) -> None:
    """Raise OptionError where an argument is something else altogether."""
    if not isinstance(value, kind):
        raise OptionError(f"{argument} must be {wanted}, got {type(value).__name__}")


def expect_callable(argument: str, value: object, wanted: str) -> None:
    """Raise OptionError where an argument is given and cannot be called."""
    if value is not None and not callable(value):
        raise OptionError(f"{argument} must be a callable, {wanted}; got {type(value).__name__}")


def first_line(error: BaseException) -> str:
    """The first line of what an exception says; empty where it says nothing."""
    return next(iter(str(error).strip().splitlines()), "")
