"""Numbers as they are given (Python's, NumPy's, tensors of one element), checked, as Python's own."""

from __future__ import annotations

import operator
from contextlib import suppress
from typing import Any

from singe.errors import OptionError

POSITIVE, NOT_NEGATIVE = "(0, inf)", "[0, inf)"
_WORDS = {POSITIVE: "be positive", NOT_NEGATIVE: "not be negative"}


def plain_count(name: str, value: Any, least: int | None = None) -> int:
    """A whole number of at least ``least``.

    Raises:
        OptionError: something else, ``True`` and ``2.0`` included.
    """
    with suppress(TypeError):
        if not isinstance(value, bool) and (least is None or operator.index(value) >= least):
            return operator.index(value)
    bound = "" if least is None else f" >= {least}"
    raise OptionError(f"{name} must be a whole number{bound}, got {value!r}")


def plain_number(name: str, value: Any, within: str, meaning: str = "") -> float:
    """A number inside an interval, written as in mathematics: ``"(0, 1]"`` leaves out 0.

    Args:
        meaning: what the number is, for the message.

    Raises:
        OptionError: something else, NaN and ``"0.5"`` included.
    """
    low, high = map(float, within[1:-1].split(","))
    with suppress(TypeError, ValueError, RuntimeError):
        number = low - 1.0 if isinstance(value, str | bool) else float(value)
        above = low < number or (within[0] == "[" and low == number)
        below = number < high or (within[-1] == "]" and number == high)
        if above and below:
            return number
    wanted = _WORDS.get(within, f"lie in {within}") + (meaning and f": {meaning}")
    raise OptionError(f"{name} must {wanted}, got {value!r}")
