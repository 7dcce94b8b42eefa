"""``--config file.toml``: any option from a file; what the command line says wins."""

from __future__ import annotations

import difflib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from singe.cli.groups import TABLE
from singe.errors import OptionError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


def read_config(ctx: typer.Context, path: Path | None) -> Path | None:
    """Make the file's values the defaults of this command.

    Keys are option names, with ``-`` or ``_``. At the top level stands what all commands share;
    options that only other commands have are passed over there. A table named after a command holds
    its own, which go before those of the top level. The other commands' tables are checked as well:
    a slip is found by the first command.

    Raises:
        OptionError: no TOML, an option that no command (in a table: that command) has, or a table
            that belongs to none.
    """
    if path is None or ctx.resilient_parsing:
        return path
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise OptionError(f"cannot read the configuration {path}: {error}") from error
    if any("config" in table for table in (content, *content.values()) if isinstance(table, dict)):
        raise OptionError(f"{path}: a configuration cannot name another; give its options here")
    root: Any = ctx.find_root().command
    commands = {name: _names(command) for name, command in root.commands.items()}
    commands = {name: known for name, known in commands.items() if "config" in known}
    everybody = {name: option for names in commands.values() for name, option in names.items()}
    tables = {name: content.pop(name, {}) for name in commands}
    for name, value in content.items():
        if isinstance(value, dict) and not _repeatable(everybody.get(name.replace("_", "-"))):
            raise OptionError(
                f"{path}: there is no table [{name}]; the commands' tables are "
                + ", ".join(f"[{command}]" for command in commands)
            )
    values = _resolve(content, everybody | commands[str(ctx.command.name)], path, "")
    for name, table in tables.items():
        if not isinstance(table, dict):
            raise OptionError(f"{path}: {name} must be a table, [{name}]")
        found = _resolve(table, commands[name], path, f"[{name}] ")
        if name == ctx.command.name:
            values |= found
            ctx.meta[TABLE] = set(found)
    ctx.default_map = {**(ctx.default_map or {}), **values}
    return path


def _names(command: Any) -> dict[str, Any]:
    """Every name of an option, without dashes at the front -> typer's parameter."""
    found = {}
    for parameter in command.params:
        for name in (parameter.name, *parameter.opts):
            found[name.lstrip("-").replace("_", "-")] = parameter
    return found


def _resolve(
    table: dict[str, Any], known: dict[str, Any], path: Path, where: str
) -> dict[str, Any]:
    values = {}
    for key, value in table.items():
        name = key.replace("_", "-")
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise OptionError(f"{path}: {where}there is no option {key!r}{hint}")
        if isinstance(value, dict) and not _repeatable(known[name]):
            raise OptionError(f"{path}: {where}{key} is one value, not a table")
        if isinstance(value, bool) and not getattr(known[name], "is_flag", False):
            raise OptionError(f"{path}: {where}{key} takes a value, not {str(value).lower()}")
        values[known[name].name] = _as_typed(value, _repeatable(known[name]))
    return values


def _repeatable(parameter: Any) -> bool:
    return getattr(parameter, "multiple", False) or getattr(parameter, "nargs", 1) == -1


def _flat(table: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """TOML takes the dots of ``layer1.0.conv1 = 0.5`` for tables in tables."""
    for name, value in table.items():
        if isinstance(value, dict):
            yield from ((f"{name}.{rest}", share) for rest, share in _flat(value))
        else:
            yield name, value


def _as_typed(value: Any, repeatable: bool) -> Any:
    """TOML's own forms as the command line has them: one value of several, a list, ``layer1 = 0.5``."""
    if isinstance(value, dict):
        value = [f"{name}={share}" for name, share in _flat(value)]
    if repeatable:
        return [str(part) for part in value] if isinstance(value, list) else [str(value)]
    return ",".join(map(str, value)) if isinstance(value, list) else value
