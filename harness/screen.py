"""Progress on standard error: a bar where that is a terminal, and lines that must be seen anyway."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn


class Screen:
    """A bar with the remaining time; without a terminal only what is said.

    Args:
        what: what is counted, such as "answers".
        title: shown before the bar, until `describe` says more.
        steady: draw the bar when it moves, by the thread that moves it, instead of by a thread of its own, which would
            disturb what is timed.
    """

    def __init__(self, what: str, title: str = "", *, steady: bool = False) -> None:
        self._console = Console(stderr=True)
        self._steady = steady
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn(what),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            auto_refresh=not steady,
            transient=True,  # until `begin`: a mistake that shows before that is one line, without a bar
        )
        self._task = self._bar.add_task(title, total=None)

    @property
    def is_terminal(self) -> bool:
        """Whether somebody may be watching a bar."""
        return self._console.is_terminal

    def __enter__(self) -> Self:
        if self.is_terminal and not self._steady:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar.live.is_started:
            self._bar.stop()

    def begin(self, total: int, completed: int = 0) -> None:
        """From now on the bar stays, and counts to `total`."""
        self._bar.live.transient = False
        if self.is_terminal:
            self._bar.start()
        self._bar.update(self._task, total=total, completed=completed)

    def stage(self, title: str, done: int, total: int) -> None:
        """How far a stage of several has come; each has a bar of its own, below those before it."""
        task = self._bar.tasks[self._task]
        if task.total is None:
            self.begin(total, done)
        elif task.description != title:
            self._task = self._bar.add_task(title, total=total)
        self._bar.update(self._task, description=title, completed=done)

    def describe(self, title: str) -> None:
        """Show this before the bar."""
        self._bar.update(self._task, description=title, refresh=self._steady)

    def advance(self, count: int = 1) -> None:
        """So many more are done."""
        self._bar.update(self._task, advance=count, refresh=self._steady)

    def reach(self, completed: int) -> None:
        """So many are done in all."""
        self._bar.update(self._task, completed=completed, refresh=self._steady)

    def say(self, line: str) -> None:
        """Print a line, above the bar where there is one."""
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)
