"""What the commands print: results on standard output, everything else on standard error."""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, TextIO

import typer
from rich.console import Console

if TYPE_CHECKING:
    from singe.cli.options import CommonOptions

_results: ContextVar[TextIO | None] = ContextVar("_results", default=None)  # where --json goes


@contextmanager
def undisturbed(common: CommonOptions) -> Iterator[None]:
    """While a command runs: warnings are notices, each told once; what a user's file prints is no result."""
    told = set[str]()

    def tell(message: Warning | str, *_: Any, **__: Any) -> None:
        text = " ".join(str(message).split())
        if text not in told:
            told.add(text)
            Voice(common).notice(f"warning: {text}")

    with warnings.catch_warnings():
        warnings.showwarning = tell
        if not common.as_json:
            yield
            return
        token = _results.set(sys.stdout)
        try:
            with redirect_stdout(sys.stderr):
                yield
        finally:
            _results.reset(token)


class Voice:
    """Speaks as the user asked: tables or JSON, notices or none, progress on a terminal only."""

    def __init__(self, common: CommonOptions) -> None:
        self._json, self._quiet = common.as_json, common.quiet
        self._errors = Console(stderr=True, soft_wrap=True, highlight=False)

    @property
    def progress(self) -> bool:
        """Whether progress is shown."""
        return not self._quiet and self._errors.is_terminal

    def notice(self, line: str) -> None:
        """A sentence the user should know, on standard error."""
        if not self._quiet:
            self._errors.print(line, markup=False)

    def error(self, line: str) -> None:
        """What went wrong, on standard error, whatever was asked for."""
        print_error(line)

    def step(self, line: str) -> None:
        """What is being done now; on a terminal only."""
        if self.progress:
            self._errors.print(line, style="dim", markup=False)

    def result(self, content: dict[str, Any], *shown: Any) -> None:
        """``content`` as JSON, or what was made of it for people."""
        if self._json:
            print_json(content)
            return
        console = Console()
        for part in shown:
            console.print(part, highlight=False, markup=False, soft_wrap=isinstance(part, str))


def print_error(line: str) -> None:
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    console.print(f"error: {' '.join(line.split())}", style="red", markup=False)


def print_json(content: dict[str, Any]) -> None:
    typer.echo(json.dumps(content, indent=2), file=_results.get())
