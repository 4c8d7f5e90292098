"""What people see of a sweep: the plan, and the progress with the time that is left."""

from __future__ import annotations

from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from tabulate import tabulate

from visionselector_eval.harness.store.record import CellRecord
from visionselector_eval.harness.sweep.plan import Group, Plan, PlannedCell
from visionselector_eval.harness.sweep.run import Progress as SweepProgress


def render_plan(plan: Plan) -> str:
    """The cells of a sweep as a table, the groups that share work, and what is done already."""
    rows = []
    for group in plan.groups:
        for cell in group.cells:
            if cell.error:
                state = f"can't run: {cell.error}"
            elif cell.done:
                state = "done"
            elif cell.answered:
                state = f"begun: {cell.answered} of {group.n_documents} answered"
            else:
                state = "to do"
            spec = cell.spec
            rows.append(
                [spec.backbone.pretrained, spec.task, spec.label, str(spec.budget), spec.seed, cell.digest, state]
            )
    head = ["backbone", "task", "method", "budget", "seed", "cell", "state"]
    cells = plan.cells
    documents = sum(group.n_documents for group in plan.groups if group.missing)
    answers = sum(group.n_documents * len(group.missing) for group in plan.groups)
    answers -= sum(cell.answered for cell in cells if not cell.done and not cell.error)
    shared = [
        [group.backbone.pretrained, group.task, group.n_documents, len(group.cells), len(group.missing)]
        for group in plan.groups
    ]
    return "\n".join(
        [
            tabulate(rows, head, disable_numparse=True),
            "",
            "groups (one loaded model, one image decode and one vision pass for each document):",
            tabulate(shared, ["backbone", "task", "documents", "cells", "to do"]),
            "",
            f"{len(cells)} cells, {sum(c.done for c in cells)} done; "
            f"{answers} answers to give, from {documents} vision passes",
        ]
    )


class SweepScreen(SweepProgress):
    """A progress bar on stderr with the remaining time; failed cells are named as they fail."""

    def __init__(self) -> None:
        self._console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("answers"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
            transient=True,  # until the sweep begins: a mistake that shows while loading is one line, without a bar
        )
        self._task = self._bar.add_task("loading", total=None)
        self.total_cells = 0

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar.live.is_started:
            self._bar.stop()

    def start(self, documents: int) -> None:
        self._bar.live.transient = False
        self._bar.start()
        self._bar.update(self._task, total=documents)

    def group(self, group: Group) -> None:
        self._bar.update(self._task, description=f"{group.backbone.pretrained} · {group.task}")

    def answered(self, cell: PlannedCell, documents: int) -> None:
        self._bar.advance(self._task, documents)

    def finished(self, cell: PlannedCell, record: CellRecord) -> None:
        self.total_cells += 1
        if record.status == "failed":
            self._console.print(
                f"failed: {cell.spec.title}: {record.error}", markup=False, highlight=False, soft_wrap=True
            )
        elif not self._console.is_terminal:
            none = "needs submission" if record.needs_submission else "-"
            score = none if record.score is None else f"{record.score:.4g}"
            self._console.print(
                f"done: {cell.spec.title}: {record.metric} {score}, "
                f"{record.kept_tokens or 0:.1f} of {record.total_tokens or 0:.1f} visual tokens",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )
