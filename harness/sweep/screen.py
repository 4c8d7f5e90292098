"""What people see of a sweep: the plan, and the progress with the time that is left."""

from __future__ import annotations

from tabulate import tabulate

from visionselector_eval.harness.screen import Screen
from visionselector_eval.harness.store.record import CellRecord
from visionselector_eval.harness.sweep.plan import CellGroup, PlannedCell, SweepPlan
from visionselector_eval.harness.sweep.run import Progress


def render_plan(plan: SweepPlan) -> str:
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


class SweepScreen(Screen, Progress):
    """A progress bar with the remaining time; failed cells are named as they fail."""

    def __init__(self) -> None:
        super().__init__("answers", "loading")
        self.total_cells = 0

    def start(self, documents: int) -> None:
        self.begin(documents)

    def group(self, group: CellGroup) -> None:
        self.describe(f"{group.backbone.pretrained} · {group.task}")

    def answered(self, cell: PlannedCell, documents: int) -> None:
        self.advance(documents)

    def finished(self, cell: PlannedCell, record: CellRecord) -> None:
        self.total_cells += 1
        if record.status == "failed":
            self.say(f"failed: {cell.spec.title}: {record.error}")
        elif not self.is_terminal:
            none = "needs submission" if record.needs_submission else "-"
            score = none if record.score is None else f"{record.score:.4g}"
            self.say(
                f"done: {cell.spec.title}: {record.metric} {score}, "
                f"{record.kept_tokens or 0:.1f} of {record.total_tokens or 0:.1f} visual tokens"
            )
