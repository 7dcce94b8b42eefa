"""What the loop says while it runs: a line per round, a bar while it trains."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn


class Teller:
    """Speaks on standard error, or not at all.

    Args:
        progress: False for silence; the bar is for terminals only.
    """

    def __init__(self, progress: bool) -> None:
        self._console = Console(stderr=True, quiet=not progress)
        self._bar = progress and self._console.is_terminal

    def line(self, text: str) -> None:
        self._console.print(text, highlight=False, soft_wrap=True)

    @contextmanager
    def bar(self, title: str, total: int, done: int) -> Iterator[Callable[[], None]]:
        """Gives a function to call after every step."""
        columns = (TextColumn("{task.description}"), BarColumn(), TimeRemainingColumn())
        with Progress(
            *columns, console=self._console, transient=True, disable=not self._bar
        ) as bar:
            task = bar.add_task(title, total=total, completed=done)
            yield lambda: bar.advance(task)
