"""What a run was asked for as JSON, so that the process that continues it can tell a different request."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import is_dataclass
from typing import Any

from torch import nn

from singe.graph import unwrapped
from singe.plain import plain


def as_json(value: Any, model: nn.Module) -> Any:
    """An argument as JSON: modules and functions by their names, all that can be compared of them."""
    if isinstance(value, nn.Module):
        return next((n for n, m in unwrapped(model).named_modules() if m is value), repr(value))
    if _is_json(value):
        return value
    if hasattr(value, "tolist"):  # NumPy's numbers and arrays, tensors
        one = plain(value)
        return value.tolist() if one is value else one
    if isinstance(value, Mapping):
        return {str(k): as_json(v, model) for k, v in value.items()}
    if isinstance(value, set | frozenset):
        return sorted(as_json(v, model) for v in value)
    if isinstance(value, Iterable):
        return [as_json(v, model) for v in value]
    return _name_of(value) if callable(value) else repr(value)


def _name_of(function: Callable[..., Any]) -> str:
    if isinstance(function, functools.partial):
        given = [_name_or_value(v) for v in function.args]
        named = [f"{k}={_name_or_value(v)}" for k, v in sorted(function.keywords.items())]
        return f"{_name_of(function.func)}({', '.join([*given, *named])}, ...)"
    if is_dataclass(function):
        return repr(function)
    return getattr(function, "__qualname__", type(function).__qualname__)


def _name_or_value(value: Any) -> str:
    """Other objects by their type: what they print as may differ from process to process."""
    if callable(value):
        return _name_of(value)
    return repr(value) if _is_json(value) else type(value).__qualname__


def _is_json(value: Any) -> bool:
    return value is None or isinstance(value, bool | int | float | str)
