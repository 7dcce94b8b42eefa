"""Commands whose parameters are groups of options: dataclasses, unfolded for typer."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, get_type_hints

import typer


def takes_groups(command: Callable[..., None]) -> Callable[..., None]:
    """``command(model: ModelOptions, ...)`` for typer, with every field as an option of its own.

    A group may have ``RIVALS``, names of options of which one is meant.
    """
    hints = get_type_hints(command, include_extras=True)
    groups = {n: h for n, h in hints.items() if inspect.isclass(h) and is_dataclass(h)}
    own = [p for n, p in inspect.signature(command, eval_str=True).parameters.items()
           if n not in groups]  # fmt: skip
    found = [*own]
    for group in groups.values():
        types = get_type_hints(group, include_extras=True)
        found += [
            inspect.Parameter(
                f.name,
                inspect.Parameter.KEYWORD_ONLY,
                default=inspect.Parameter.empty if f.default is MISSING else f.default,
                annotation=types[f.name],
            )
            for f in fields(group)
        ]
    found.append(inspect.Parameter("ctx", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context))
    found = [p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in found]

    @functools.wraps(command)
    def run(ctx: typer.Context, **given: Any) -> None:
        for group in groups.values():
            given |= _without_rivals(ctx, getattr(group, "RIVALS", ()))
        folded = {
            name: group(**{f.name: given.pop(f.name) for f in fields(group)})
            for name, group in groups.items()
        }
        command(**given, **folded)

    run.__signature__ = inspect.Signature(found)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in found}
    del run.__wrapped__  # typer would look at the command itself
    return run


def _without_rivals(ctx: typer.Context, rivals: Sequence[str]) -> dict[str, None]:
    """Of options that exclude each other, those in the file give way to one on the command line."""
    typed = {name for name in rivals if _source(ctx, name) == "COMMANDLINE"}
    return {name: None for name in rivals if typed and _source(ctx, name) == "DEFAULT_MAP"}


def _source(ctx: typer.Context, name: str) -> str | None:
    source = ctx.get_parameter_source(name)
    return source and source.name
