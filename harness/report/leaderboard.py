"""Leaderboards: a row for each method and budget, a column for each task, and what a careful reader needs.

`build_leaderboard(cells, samples)` only computes; `write(folder)` reads a run and writes `leaderboard.*`, one file for
each format of `render.RENDERERS`.
The same run gives the same bytes. Everything is compared with the `full` row of the same run, backbone, task and
documents, never with another run's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from visionselector_eval.baselines.contract.errors import one_line
from visionselector_eval.harness.report import stats
from visionselector_eval.harness.report.comparison import (
    REFERENCE,
    Entry,
    backbone_remarks,
    budget_order,
    entries_of,
    method_of,
    obstacle,
    paired,
    prepared,
)
from visionselector_eval.harness.report.render import RENDERERS, budget_text
from visionselector_eval.harness.report.rows import Key, Leaderboard, SummaryRow, TaskInfo, TaskRow
from visionselector_eval.harness.store.files import write_atomic
from visionselector_eval.harness.store.run import Run, load_run


def build_leaderboard(
    cells: pd.DataFrame, samples: pd.DataFrame, environment: Mapping[str, Any] | None = None
) -> Leaderboard:
    """Compute a leaderboard from the two tables of `load_run`.

    Args:
        cells: one row a cell; needs at least backbone, method, budget, task, score.
        samples: one row a document; without it (or with no rows) there are no intervals.
        environment: what the run ran on, for the footer.
    """
    notes: list[str] = []
    cells = prepared(cells, notes)
    remarks = backbone_remarks(cells)
    entries = entries_of(cells, samples)

    summary: list[SummaryRow] = []
    tasks: list[TaskInfo] = []
    for backbone in sorted({key[0] for key in entries}):
        own = {key: value for key, value in entries.items() if key[0] == backbone}
        names = sorted({task for row in own.values() for task in row})
        full = next((row for row in own.values() if method_of(row) == REFERENCE), {})
        if not full:
            notes.append(f"{backbone}: no `full` row in this run, so nothing is relative to it")
        for task in names:
            found = [row[task] for row in (full, *own.values()) if task in row]
            tasks.append(_task_info(backbone, task, next((entry for entry in found if len(entry.done)), found[0])))
        rows = []
        for key, row in own.items():
            lines = [_task_row(key, task, row, full.get(task)) for task in names]
            rows.append(_summary_row(row, lines, full))
        summary += _ranked(rows, own, full)
        notes += _problems(backbone, own)
    return Leaderboard(tuple(summary), tuple(tasks), tuple(notes), dict(environment or {}), remarks)


def _task_info(backbone: str, task: str, entry: Entry) -> TaskInfo:
    return TaskInfo(
        backbone=backbone,
        task=task,
        metric=str(entry.first("metric")),
        higher_is_better=bool(entry.first("higher_is_better")),
        scale=float(entry.first("scale")),
        mean_of_documents=bool(entry.first("mean_of_documents")),
        n_documents=int(entry.first("n_documents")),
    )


def _told_apart(interval: stats.Interval) -> bool | None:
    """Whether two rows can be told apart; None where too few documents leave that open."""
    return stats.distinguishable(interval) if math.isfinite(interval.low) else None


def _set_interval(row: TaskRow | SummaryRow, interval: stats.Interval) -> None:
    """Set a row's interval, or why it has none."""
    if math.isfinite(interval.low):
        row.low, row.high = interval.low, interval.high
    else:
        row.interval_note = stats.TOO_FEW


def _relative_points(entry: Entry, other: Entry, full: Entry) -> stats.Interval | None:
    """The paired difference of two entries in points of relative %, positive where `entry` is better."""
    interval = paired(entry, other)
    if interval is None or full.documents is None:
        return None
    base = float(full.documents["score"].mean())
    if not base > 0:
        return None
    return stats.scaled(interval, (100 if full.first("higher_is_better") else -100) / base)


def _task_row(key: Key, task: str, row: Mapping[str, Entry], full: Entry | None) -> TaskRow:
    backbone, label, budget = key
    out = TaskRow(
        backbone=backbone,
        method=method_of(row),
        label=label,
        options=str(next(iter(row.values())).first("options")),
        budget=budget,
        task=task,
        seeds_expected=max(len(entry.done) + len(entry.failed) for entry in row.values()),
    )
    if task not in row:
        return out
    entry = row[task]
    out.metric = str(entry.first("metric"))
    out.finished_at = max(str(value) for value in (*entry.done["finished_at"], *entry.failed["finished_at"]))
    if len(entry.failed):
        out.error = str(entry.failed["error"].iloc[0])
    if not len(entry.done):
        out.status = "failed"
        return out
    out.seeds = len(entry.done)
    out.status = "done" if out.seeds == out.seeds_expected else "partial"
    out.score = entry.score
    out.spread = stats.spread([float(value) for value in entry.done["score"]])
    out.n_documents = int(entry.first("n_documents"))
    out.needs_submission = bool(entry.first("needs_submission"))
    out.kept_tokens = entry.mean("kept_tokens")
    out.total_tokens = entry.mean("total_tokens")
    out.layer_tokens = entry.mean("layer_tokens")
    out.note = obstacle(entry, full)
    if out.note or full is None:
        return out
    out.relative = stats.relative(entry.score, full.score, bool(entry.first("higher_is_better")))
    if out.method != REFERENCE and (interval := paired(entry, full)) is not None:
        out.difference = interval.difference
        _set_interval(out, interval)
        out.distinguishable = _told_apart(interval)
    return out


def _summary_row(row: Mapping[str, Entry], lines: Sequence[TaskRow], full: Mapping[str, Entry]) -> SummaryRow:
    counted = [line for line in lines if math.isfinite(line.relative)]
    kept = [line for line in lines if math.isfinite(line.kept_tokens) and math.isfinite(line.total_tokens)]
    first = lines[0]
    out = SummaryRow(
        backbone=first.backbone,
        label=first.label,
        budget=first.budget,
        method=first.method,
        options=first.options,
        seeds=max(line.seeds for line in lines),
        mean_relative=_mean([line.relative for line in counted]),
        tasks_counted=len(counted),
        tasks=len(lines),
        kept_tokens=_mean([line.kept_tokens for line in kept]),
        total_tokens=_mean([line.total_tokens for line in kept]),
        layer_tokens=_mean([line.layer_tokens for line in kept]),
        failed_tasks=sum(line.status == "failed" for line in lines),
        by_task={line.task: line for line in lines},
    )
    tasks = [line.task for line in counted]
    if out.method != REFERENCE and (interval := _row_interval(row, full, full, tasks)) is not None:
        _set_interval(out, interval)
        out.distinguishable_from_full = _told_apart(interval)
    return out


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def _row_interval(
    row: Mapping[str, Entry], other: Mapping[str, Entry], full: Mapping[str, Entry], tasks: Sequence[str]
) -> stats.Interval | None:
    """The difference of two rows' mean relative % over `tasks`.

    Without an interval where one of them has too few documents, None unless the documents of every one have scores.
    """
    parts = [_relative_points(row[task], other[task], full[task]) for task in tasks]
    if not parts or any(part is None for part in parts):
        return None
    return stats.mean_of_differences([part for part in parts if part is not None])


def _ranked(
    rows: Sequence[SummaryRow], own: Mapping[Key, Mapping[str, Entry]], full: Mapping[str, Entry]
) -> list[SummaryRow]:
    """Rows in the order shown, with the best of each budget found and the others compared with it."""
    # What the full row itself cannot give (a score of 0, a failure) is missing for all alike; means over the
    # rest compare.
    attainable = max((row.tasks_counted for row in rows if row.method == REFERENCE), default=0)
    for row in rows:
        row.comparable = 0 < attainable == row.tasks_counted

    def order(row: SummaryRow) -> tuple[Any, ...]:
        mean = row.mean_relative
        return (
            row.method != REFERENCE,
            *budget_order(row.budget),
            not row.comparable,
            -mean if math.isfinite(mean) else math.inf,
            row.label,
        )

    ranked = sorted(rows, key=order)
    best: dict[str, SummaryRow] = {}
    for row in ranked:
        if row.method == REFERENCE or not row.comparable:
            continue
        if row.budget not in best:
            best[row.budget] = row
            # alone in its budget it is best of nothing
            row.best_of_budget = sum(other.budget == row.budget for other in rows) > 1
            continue
        entries, leader = own[row.key], own[best[row.budget].key]
        tasks = [
            task
            for task in sorted(full)
            if task in entries and task in leader and math.isfinite(stats.relative(full[task].score, full[task].score))
        ]
        if (interval := _row_interval(entries, leader, full, tasks)) is not None:
            row.distinguishable_from_best = _told_apart(interval)
    return ranked


def _problems(backbone: str, own: Mapping[Key, Mapping[str, Entry]]) -> list[str]:
    lines, reasons = [], set()
    for (_, label, budget), row in own.items():
        for task, entry in row.items():
            for cell in entry.failed.itertuples():
                reason = one_line(str(cell.error))
                reasons.add(reason)
                lines.append(f"failed: {backbone}, {label}, {budget_text(budget)}, {task}, seed {cell.seed}: {reason}")
    if len(lines) > 1 and len(reasons) == 1 and not any(len(e.done) for row in own.values() for e in row.values()):
        # It could not be loaded, say: one line, not one for each cell.
        lines = [f"failed: {backbone}, all {len(lines)} cells: {reasons.pop()}"]
    skipped: dict[str, int] = {}
    for row in own.values():
        for task, entry in row.items():
            if len(entry.done) and "n_skipped" in entry.done:
                skipped[task] = max(skipped.get(task, 0), int(entry.done["n_skipped"].max()))
    lines += [
        f"skipped: {backbone}, {task}: {number} document{'s' if number > 1 else ''} could not be read, counted as "
        "unanswered"
        for task, number in sorted(skipped.items())
        if number
    ]
    return lines


def write(run_folder: str | Path) -> Leaderboard:
    """Build the leaderboard of a run and write it into its folder in every format of `RENDERERS`.

    Raises:
        InputError: no run there, no recorded cell in it, or the folder cannot be written to.
    """
    cells, samples = load_run(run_folder)
    run = Run.open(run_folder, create=True)
    board = build_leaderboard(cells, samples, run.environment())
    for ending, render in RENDERERS.items():
        write_atomic(run.folder / f"leaderboard.{ending}", render(board))
    return board
