"""Small sweeps on the embedded checkpoint, run in this process, and what they answered."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from visionselector_eval.harness.store.run import Run
from visionselector_eval.harness.sweep.engines import engine
from visionselector_eval.harness.sweep.run import Existing, Progress, SweepResult, run_sweep
from visionselector_eval.harness.sweep.spec import SweepSpec
from visionselector_eval.harness.sweep.worker import Answered, Event, WorkUnit, answer_unit

SMALL: dict[str, Any] = {
    "methods": ["divprune", "downsample"],
    "budgets": [0.2],
    "tasks": ["tiny_chartqa", "tiny_pope"],
    "limit": 4,
    "batch_size": 2,
    "device": "cpu",
}


class Answering:
    """`answer_unit` that remembers what it was asked and what it answered."""

    def __init__(self) -> None:
        self.units: list[WorkUnit] = []
        self.answers: list[tuple[str, str, int]] = []  # digest, task, document

    def __call__(self, unit: WorkUnit) -> Iterator[Event]:
        self.units.append(unit)
        for event in answer_unit(unit):
            if isinstance(event, Answered):
                self.answers += [(event.digest, a["task"], a["doc_id"]) for a in event.answers]
            yield event


def small(folder: Path, **fields: Any) -> SweepSpec:
    """A spec of a few cells that is written to `folder`."""
    return SweepSpec.make({**SMALL, "output": str(folder), **fields})


def sweep(
    folder: Path,
    *,
    existing: Existing = "keep",
    answer: Any = answer_unit,
    progress: Progress | None = None,
    **fields: Any,
) -> tuple[Run, SweepResult]:
    """Run a small sweep in this process."""
    return run_sweep(
        small(folder, **fields),
        engine=engine("local"),
        existing=existing,
        answer=answer,
        progress=progress,
    )


def records(folder: Path) -> dict[str, dict[str, Any]]:
    """Every `cell.json` of a run by digest, without what differs from run to run."""
    found = {}
    for file in sorted(folder.glob("cells/*/cell.json")):
        record = json.loads(file.read_text())
        assert record.pop("seconds") >= 0
        assert record.pop("finished_at")
        found[file.parent.name] = record
    return found


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below the cells of a run, but for the records."""
    cells = folder / "cells"
    return {
        str(file.relative_to(cells)): file.read_bytes()
        for file in sorted(cells.rglob("*"))
        if file.is_file() and file.name != "cell.json"
    }
