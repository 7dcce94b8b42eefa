"""Commands whose parameters are groups of options: dataclasses, unfolded for typer."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Collection, Iterable
from collections.abc import Set as AbstractSet
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, get_type_hints

import typer

Rivalry = Collection[Collection[str]]


def takes_groups(command: Callable[..., None]) -> Callable[..., None]:
    """``command(model: ModelOptions, ...)`` for typer, with every field as an option of its own.

    A group may have ``RIVALS``: per rivalry its sides, the names of the options of each. Where an option
    of one side is typed, those of the others that come from a file give way.
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

    rivalries = [r for group in groups.values() for r in getattr(group, "RIVALS", ())]

    @functools.wraps(command)
    def run(ctx: typer.Context, **given: Any) -> None:
        from_file = {name for name in given if _source(ctx, name) == "DEFAULT_MAP"}
        typed = {name for name in given if _source(ctx, name) == "COMMANDLINE"}
        given |= dict.fromkeys(from_file & outranked(rivalries, typed))
        folded = {
            name: group(**{f.name: given.pop(f.name) for f in fields(group)})
            for name, group in groups.items()
        }
        command(**given, **folded)

    run.rivalries = rivalries  # type: ignore[attr-defined]
    run.__signature__ = inspect.Signature(found)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in found}
    del run.__wrapped__  # typer would look at the command itself
    return run


def outranked(rivalries: Iterable[Rivalry], chosen: AbstractSet[str]) -> set[str]:
    """Options that give way where these were chosen: those of the other sides."""
    return {
        name
        for sides in rivalries
        if any(chosen & set(side) for side in sides)
        for side in sides
        if not chosen & set(side)
        for name in side
    }


def _source(ctx: typer.Context, name: str) -> str | None:
    source = ctx.get_parameter_source(name)
    return source and source.name
