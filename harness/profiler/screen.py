"""What people see while a profile runs."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress import Progress as Bar

from visionselector_eval.harness.profiler.rounds import Progress
from visionselector_eval.harness.profiler.spec import ProfileCell


class ProfileScreen(Progress):
    """A progress bar on stderr; cells that can't be measured are named as they fail.

    The bar is drawn between samples, by the thread that measures: a thread of its own would disturb what is timed.
    """

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._bar = Bar(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("samples"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            auto_refresh=False,
        )
        self._task = self._bar.add_task("warming up", total=None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar.live.is_started:
            self._bar.stop()

    def start(self, samples: int) -> None:
        if self._console.is_terminal:
            self._bar.start()
        self._bar.update(self._task, total=samples)

    def workload(self, name: str) -> None:
        self._bar.update(self._task, description=name, refresh=True)

    def measured(self, count: int) -> None:
        self._bar.update(self._task, advance=count, refresh=True)

    def failed(self, workload: str, cell: ProfileCell, reason: str) -> None:
        self._console.print(
            f"failed: {cell.title} on {workload}: {reason}", markup=False, highlight=False, soft_wrap=True
        )
