"""Leaderboards: a row for each method and budget, a column for each task, and what a careful reader needs.

`build_leaderboard(cells, samples)` only computes; `write(folder)` reads a run and writes
`leaderboard.{csv,md,tex,html}`.
The same run gives the same bytes. Everything is compared with the `full` row of the same run, backbone, task and
documents, never with another run's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd

from visionselector_eval.harness.report import stats
from visionselector_eval.harness.report.comparison import (
    CONTROLS,
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
from visionselector_eval.harness.report.render import Leaderboard, budget_text, display_rows
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

    tidy: list[dict[str, Any]] = []
    summary: list[dict[str, Any]] = []
    tasks: list[dict[str, Any]] = []
    for backbone in sorted({key[0] for key in entries}):
        own = {key: value for key, value in entries.items() if key[0] == backbone}
        names = sorted({task for row in own.values() for task in row})
        full = next((row for row in own.values() if method_of(row) == REFERENCE), {})
        if not full:
            notes.append(f"{backbone}: no `full` row in this run, so nothing is relative to it")
        for task in names:
            found = [row[task] for row in (full, *own.values()) if task in row]
            entry = next((entry for entry in found if len(entry.done)), found[0])
            tasks.append(
                {"backbone": backbone, "task": task}
                | {name: entry.first(name) for name in ("metric", "higher_is_better", "scale", "mean_of_documents")}
                | {"n_documents": int(entry.first("n_documents"))}
            )
        rows, lines = [], []
        for key, row in own.items():
            details = [_task_row(key, task, row, full.get(task)) for task in names]
            lines += details
            rows.append(_summary_row(key, row, details, full))
        summary += _ranked(rows, own, full)
        place = {(row["label"], row["budget"]): number for number, row in enumerate(summary)}
        tidy += sorted(lines, key=lambda line: (place[line["label"], line["budget"]], line["task"]))
        notes += _problems(backbone, own)
    tidy_frame = pd.DataFrame(tidy)
    summary_frame = pd.DataFrame(summary)
    task_frame = pd.DataFrame(tasks)
    display = display_rows(summary_frame, tidy_frame, task_frame)
    return Leaderboard(tidy_frame, summary_frame, display, task_frame, tuple(notes), dict(environment or {}), remarks)


def _told_apart(interval: stats.Interval) -> bool | None:
    """Whether two rows can be told apart; None where too few documents leave that open."""
    return stats.distinguishable(interval) if math.isfinite(interval.low) else None


def _findings(interval: stats.Interval) -> dict[str, Any]:
    """An interval's columns: its ends, or why there are none."""
    if not math.isfinite(interval.low):
        return {"interval_note": stats.TOO_FEW}
    return {"low": interval.low, "high": interval.high}


def _relative_points(entry: Entry, other: Entry, full: Entry) -> stats.Interval | None:
    """The paired difference of two entries in points of relative %, positive where `entry` is better."""
    interval = paired(entry, other)
    if interval is None or full.documents is None:
        return None
    base = float(full.documents["score"].mean())
    if not base > 0:
        return None
    return stats.scaled(interval, (100 if full.first("higher_is_better") else -100) / base)


def _task_row(key: tuple[str, str, str], task: str, row: Mapping[str, Entry], full: Entry | None) -> dict[str, Any]:
    backbone, label, budget = key
    out: dict[str, Any] = {
        "backbone": backbone,
        "method": method_of(row),
        "label": label,
        "kind": _kind(method_of(row)),
        "options": str(next(iter(row.values())).first("options")),
        "budget": budget,
        "task": task,
        "metric": "",
        "score": math.nan,
        "spread": math.nan,
        "seeds": 0,
        "seeds_expected": max(len(entry.done) + len(entry.failed) for entry in row.values()),
        "relative": math.nan,
        "difference": math.nan,
        "low": math.nan,
        "high": math.nan,
        "distinguishable": None,
        "interval_note": "",
        "n_documents": 0,
        "needs_submission": False,
        "kept_tokens": math.nan,
        "total_tokens": math.nan,
        "layer_tokens": math.nan,
        "status": "missing",
        "error": "",
        "note": "",
        "finished_at": "",
    }
    if task not in row:
        return out
    entry = row[task]
    out["metric"] = str(entry.first("metric"))
    out["finished_at"] = max(str(value) for value in (*entry.done["finished_at"], *entry.failed["finished_at"]))
    if len(entry.failed):
        out["error"] = str(entry.failed["error"].iloc[0])
    if not len(entry.done):
        return out | {"status": "failed"}
    out |= {
        "status": "done" if len(entry.done) == out["seeds_expected"] else "partial",
        "score": entry.score,
        "spread": stats.spread([float(value) for value in entry.done["score"]]),
        "seeds": len(entry.done),
        "n_documents": int(entry.first("n_documents")),
        "needs_submission": bool(entry.first("needs_submission")),
        "kept_tokens": entry.mean("kept_tokens"),
        "total_tokens": entry.mean("total_tokens"),
        "layer_tokens": entry.mean("layer_tokens"),
    }
    out["note"] = obstacle(entry, full)
    if out["note"]:
        return out
    assert full is not None
    out["relative"] = stats.relative(entry.score, full.score, bool(entry.first("higher_is_better")))
    if method_of(row) != REFERENCE and (interval := paired(entry, full)) is not None:
        out |= {"difference": interval.difference, **_findings(interval)}
        out["distinguishable"] = _told_apart(interval)
    return out


def _summary_row(
    key: tuple[str, str, str],
    row: Mapping[str, Entry],
    details: Sequence[Mapping[str, Any]],
    full: Mapping[str, Entry],
) -> dict[str, Any]:
    backbone, label, budget = key
    method = method_of(row)
    counted = [line for line in details if math.isfinite(line["relative"])]
    kept = [line for line in details if math.isfinite(line["kept_tokens"]) and math.isfinite(line["total_tokens"])]
    kept_tokens, total_tokens, layer_tokens = (
        math.fsum(line[name] for line in kept) / len(kept) if kept else math.nan
        for name in ("kept_tokens", "total_tokens", "layer_tokens")
    )
    out: dict[str, Any] = {
        "backbone": backbone,
        "label": label,
        "budget": budget,
        "method": method,
        "kind": _kind(method),
        "options": details[0]["options"],
        "seeds": max(int(line["seeds"]) for line in details),
        "mean_relative": math.fsum(line["relative"] for line in counted) / len(counted) if counted else math.nan,
        "tasks_counted": len(counted),
        "tasks": len(details),
        "complete": len(counted) == len(details),
        "low": math.nan,
        "high": math.nan,
        "distinguishable_from_full": None,
        "best_of_budget": False,
        "distinguishable_from_best": None,
        "interval_note": "",
        "kept_tokens": kept_tokens,
        "total_tokens": total_tokens,
        "layer_tokens": layer_tokens,
        "share_kept": kept_tokens / total_tokens if total_tokens > 0 else math.nan,
        "failed_tasks": sum(line["status"] == "failed" for line in details),
    }
    names = [str(line["task"]) for line in counted]
    if method != REFERENCE and (interval := _row_interval(row, full, full, names)) is not None:
        out |= _findings(interval)
        out["distinguishable_from_full"] = _told_apart(interval)
    return out


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
    rows: list[dict[str, Any]],
    own: Mapping[tuple[str, str, str], Mapping[str, Entry]],
    full: Mapping[str, Entry],
) -> list[dict[str, Any]]:
    """Rows in the order shown, with the best of each budget found and the others compared with it."""
    # What the full row itself cannot give (a score of 0, a failure) is missing for all alike; means over the
    # rest compare.
    attainable = max((int(row["tasks_counted"]) for row in rows if row["method"] == REFERENCE), default=0)
    for row in rows:
        row["_comparable"] = 0 < attainable == row["tasks_counted"]

    def order(row: dict[str, Any]) -> tuple[Any, ...]:
        mean = row["mean_relative"]
        return (
            row["method"] != REFERENCE,
            *budget_order(row["budget"]),
            not row["_comparable"],
            -mean if math.isfinite(mean) else math.inf,
            row["label"],
        )

    rows = sorted(rows, key=order)
    best: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["method"] == REFERENCE or not row["_comparable"]:
            continue
        if row["budget"] not in best:
            best[row["budget"]] = row
            row["best_of_budget"] = True
            continue
        top = best[row["budget"]]
        entries = own[row["backbone"], row["label"], row["budget"]]
        leader = own[top["backbone"], top["label"], top["budget"]]
        names = [
            task
            for task in sorted(full)
            if task in entries and task in leader and math.isfinite(stats.relative(full[task].score, full[task].score))
        ]
        if (interval := _row_interval(entries, leader, full, names)) is not None:
            row["distinguishable_from_best"] = _told_apart(interval)
    for row in rows:
        if row["best_of_budget"] and sum(other["budget"] == row["budget"] for other in rows if other is not row) == 0:
            row["best_of_budget"] = False  # alone in its budget: nothing to be best of
        del row["_comparable"]
    return rows


def _kind(method: str) -> str:
    return "full" if method == REFERENCE else "control" if method in CONTROLS else "method"


def _problems(backbone: str, own: Mapping[tuple[str, str, str], Mapping[str, Entry]]) -> list[str]:
    lines, reasons = [], set()
    for (_, label, budget), row in own.items():
        for task, entry in row.items():
            for cell in entry.failed.itertuples():
                reason = " ".join(str(cell.error).split())[:300]
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
    """Build the leaderboard of a run and write `leaderboard.{csv,md,tex,html}` into its folder.

    Raises:
        InputError: no run there, no recorded cell in it, or the folder cannot be written to.
    """
    cells, samples = load_run(run_folder)
    run = Run.open(run_folder, create=True)
    board = build_leaderboard(cells, samples, run.environment())
    for ending, text in (
        ("csv", board.to_csv()),
        ("md", board.to_markdown()),
        ("tex", board.to_latex()),
        ("html", board.to_html()),
    ):
        write_atomic(run.folder / f"leaderboard.{ending}", text)
    return board
