"""What a run says on standard error while it goes on, where that is wanted: lines, and a bar."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


class Advance(Protocol):
    def __call__(self, count: float = 1, title: str | None = None) -> None: ...


def say(line: str, wanted: bool) -> None:
    """One line, as it is."""
    Console(stderr=True, quiet=not wanted).print(
        line, highlight=False, markup=False, soft_wrap=True
    )


@contextmanager
def progress_bar(title: str, total: int | None, wanted: bool, done: int = 0) -> Iterator[Advance]:
    """Gives what to call after every step; shown on a terminal only, and gone afterwards.

    Args:
        total: of all steps; None where it is not known.
        done: steps that are over already.
    """
    console = Console(stderr=True)
    if not (wanted and console.is_terminal):  # rich < 15 prints an empty line for a disabled bar
        yield lambda count=1, title=None: None
        return
    columns = (TextColumn("{task.description}", markup=False), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(title, total=total, completed=done)

        def advance(count: float = 1, title: str | None = None) -> None:
            bar.update(task, advance=count, description=title)

        yield advance
