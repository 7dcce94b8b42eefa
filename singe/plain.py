"""Numbers as they are given (Python's, NumPy's, tensors of one element), checked, as Python's own."""

from __future__ import annotations

import math
import operator
from contextlib import suppress
from numbers import Real
from typing import Any

import numpy as np

from singe.errors import OptionError

POSITIVE, NOT_NEGATIVE = "(0, inf)", "[0, inf)"
_WORDS = {
    POSITIVE: "be positive and finite", NOT_NEGATIVE: "be finite and not negative", "(0, inf]": "be positive",
}  # fmt: skip
_NARROW = {"float16": np.float16, "float32": np.float32}
_NOT_ONE = (
    TypeError,
    ValueError,
    OverflowError,
    RuntimeError,
)  # of several elements, without values


def plain(value: Any) -> Any:
    """What has one element as Python's own; narrow floats by their shortest decimal, 0.1 as 0.1."""
    with suppress(*_NOT_ONE):
        if hasattr(value, "item"):
            narrow = _NARROW.get(str(value.dtype).removeprefix("torch."))
            return value.item() if narrow is None else float(str(narrow(value.item())))
    return value


def finite(value: Any) -> Any:
    """JSON knows no NaN and no infinity: None in their place."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def plain_count(name: str, value: Any, least: int | None = None) -> int:
    """A whole number of at least ``least``.

    Raises:
        OptionError: something else, ``True`` and ``2.0`` included.
    """
    found = plain(value)
    with suppress(TypeError):
        if not isinstance(found, bool) and (least is None or operator.index(found) >= least):
            return operator.index(found)
    bound = "" if least is None else f" >= {least}"
    raise OptionError(f"{name} must be a whole number{bound}, got {_told(value)}")


def plain_number(name: str, value: Any, within: str, meaning: str = "") -> float:
    """A number inside an interval, written as in mathematics: ``"(0, 1]"`` leaves out 0.

    Args:
        meaning: what the number is, for the message.

    Raises:
        OptionError: something else, NaN and ``"0.5"`` included.
    """
    found = plain(value)
    if _is_number(found):
        with suppress(OverflowError):
            if _is_within(float(found), within):
                return float(found)
    wanted = _WORDS.get(within, f"lie in {within}") + (meaning and f": {meaning}")
    raise OptionError(f"{name} must {wanted}, got {_told(value)}")


def _is_within(number: float, interval: str) -> bool:
    low, high = map(float, interval[1:-1].split(","))
    above = low <= number if interval[0] == "[" else low < number
    return above and (number <= high if interval[-1] == "]" else number < high)


def _is_number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _told(value: Any) -> str:
    """With the type of what is no number at all."""
    clear = value is None or _is_number(plain(value))
    return repr(value) if clear else f"{value!r}, a {type(value).__name__}"
