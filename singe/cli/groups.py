"""Commands whose parameters are groups of options: dataclasses, unfolded for typer."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, get_type_hints

import typer

from singe.cli.output import undisturbed

TABLE = "singe: options of the command's own table"


def takes_groups(command: Callable[..., None]) -> Callable[..., None]:
    """``command(model: ModelOptions, ..., common)`` for typer, with every field as an option of its own.

    A group may have ``OUTRANKS``: option, or ``option=value`` -> those that give way where it is chosen
    nearer by, the command line before the command's table in the file, that before the file's top level.
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

    rules: dict[str, Sequence[str]] = {}
    for group in groups.values():
        rules |= getattr(group, "OUTRANKS", {})
    defaults = {p.name: p.default for p in found}

    @functools.wraps(command)
    def run(ctx: typer.Context, **given: Any) -> None:
        chosen = {name for name in given if _source(ctx, name) == "COMMANDLINE"}
        from_file = {name for name in given if _source(ctx, name) == "DEFAULT_MAP"}
        table = from_file & ctx.meta.get(TABLE, set())
        for level in (table, from_file - table):
            choices = [key for name in chosen for key in (name, f"{name}={given[name]}")]
            late = {loser for key in choices for loser in rules.get(key, ())} & level
            given |= {name: defaults[name] for name in late}
            chosen |= level - late
        folded = {
            name: group(**{f.name: given.pop(f.name) for f in fields(group)})
            for name, group in groups.items()
        }
        common: Any = folded["common"]
        with undisturbed(common):
            command(**given, **folded)

    run.__signature__ = inspect.Signature(found)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in found}
    del run.__wrapped__  # typer would look at the command itself
    return run


def _source(ctx: typer.Context, name: str) -> str | None:
    source = ctx.get_parameter_source(name)
    return source and source.name
