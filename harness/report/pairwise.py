"""Every row of a run compared with one row of it: differences in points with paired intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import pandas as pd
from tabulate import tabulate

from visionselector_eval.baselines.contract.budget import parse_budget
from visionselector_eval.baselines.contract.errors import InputError, unknown
from visionselector_eval.harness.report import stats
from visionselector_eval.harness.report.comparison import (
    REFERENCE,
    Entry,
    backbone_remarks,
    budget_order,
    entries_of,
    obstacle,
    paired,
    prepared,
)
from visionselector_eval.harness.report.render import budget_text
from visionselector_eval.harness.report.rows import titled
from visionselector_eval.harness.store.files import write_atomic
from visionselector_eval.harness.store.run import Run, load_run

MEAN = "mean"
COLUMNS = ("backbone", "label", "budget", "task", "difference", "low", "high", "distinguishable", "units", "note")

_LEGEND = (
    "Row minus the row named above, in points (100 = the largest score; where the metric is no mean over documents, "
    "100 = all of them right), positive where the row is the better one.",
    "In brackets the 95 % paired t interval over the same documents (over clusters of them where a task has any), with "
    "no correction for the number of comparisons; ≈ where it holds 0. Fewer than "
    f"{stats.MINIMUM_UNITS} documents (clusters) give none: {stats.TOO_FEW}. mean: plain mean over the benchmarks; it "
    "is left out where one of them can't be compared, and has no interval where one of them has none.",
)


def against(
    cells: pd.DataFrame, samples: pd.DataFrame, reference: str, reference_backbone: str | None = None
) -> pd.DataFrame:
    """The difference of every row of a run to one of its rows.

    Args:
        cells, samples: the two tables of `load_run`.
        reference: `LABEL` as in the leaderboard, for the row of that label at each budget, or `LABEL@BUDGET`, for one
            row that all budgets are compared with. `full` needs no budget.
        reference_backbone: whose row, where rows of one backbone are to be compared with one of another. Where not
            given, each backbone's own.

    Returns:
        One row for each (backbone, label, budget, task) and one more with task "mean"; columns `COLUMNS`, differences
        in points (nan where two entries can't be compared, and `note` says why), units the documents or clusters of
        them, and `backbone_remark`.

    Raises:
        InputError: no such row, or a budget that can't be read.
    """
    cells = prepared(cells, [])
    remarks = backbone_remarks(cells)
    entries = entries_of(cells, samples)
    expected = _wanted(entries, reference, reference_backbone)
    rows = []
    for backbone, label, budget in sorted(entries, key=lambda key: (key[0], *budget_order(key[2]), key[1])):
        other = expected.get((reference_backbone or backbone, budget))
        if other is None or other == (backbone, label, budget):
            continue
        own, base = entries[backbone, label, budget], entries[other]
        parts = []
        for task in sorted(own):
            interval, note = _points(own[task], base.get(task), other[1])
            parts.append(interval)
            rows.append(_row((backbone, label, budget, task), interval, note))
        together = None
        if all(part is not None for part in parts) and set(own) == set(base):
            together = stats.mean_of_differences([part for part in parts if part is not None])
        missing = stats.TOO_FEW if together else "not every task has one"
        complete = together is not None and math.isfinite(together.low)
        rows.append(_row((backbone, label, budget, MEAN), together, "" if complete else missing))
    if not rows:
        raise InputError(f"this run holds nothing beside '{reference}' that could be compared with it")
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    return table.assign(backbone_remark=[remarks.get(backbone, "") for backbone in table["backbone"]])


def _wanted(
    entries: Mapping[tuple[str, str, str], Mapping[str, Entry]], reference: str, reference_backbone: str | None
) -> dict[tuple[str, str], tuple[str, str, str]]:
    """The row that the rows of a (backbone, budget) are compared with."""
    backbones, budgets = {key[0] for key in entries}, {key[2] for key in entries}
    if reference_backbone is not None and reference_backbone not in backbones:
        raise unknown("backbone of this run", reference_backbone, sorted(backbones))
    labels = {key[1] for key in entries}
    label, _, given = reference.rpartition("@") if reference not in labels and "@" in reference else (reference, "", "")
    if label not in labels:
        raise unknown("row of this run", label, sorted(labels))
    if label == REFERENCE:
        given = "1"
    only = str(parse_budget(given)) if given else None
    found = {
        (key[0], budget): key
        for key in entries
        for budget in budgets
        if key[1] == label and key[2] == (only or budget) and reference_backbone in (None, key[0])
    }
    if not found:
        has = sorted({key[2] for key in entries if key[1] == label}, key=budget_order)
        where = f" of {reference_backbone}" if reference_backbone else ""
        raise InputError(f"this run has no row '{reference}'{where}: '{label}' was run at {', '.join(has)}")
    return found


def _points(entry: Entry, other: Entry | None, name: str) -> tuple[stats.Interval | None, str]:
    if not len(entry.done):
        return None, "failed"
    if other is None:
        return None, f"no {name} row"
    if note := obstacle(entry, other, name):
        return None, note
    scale = float(entry.first("scale")) if bool(entry.first("mean_of_documents")) else 1.0
    interval = paired(entry, other) if scale > 0 else None  # nan, too, is not above 0
    if interval is None:
        return None, "no score for each document" if scale > 0 else "the largest score is not known"
    note = "" if math.isfinite(interval.low) else stats.TOO_FEW
    return stats.scaled(interval, (100 if entry.first("higher_is_better") else -100) / scale), note


def _row(key: tuple[str, str, str, str], interval: stats.Interval | None, note: str) -> dict[str, object]:
    known = interval is not None and math.isfinite(interval.low)
    return {
        **dict(zip(("backbone", "label", "budget", "task"), key, strict=True)),
        "difference": interval.difference if interval else math.nan,
        "low": interval.low if interval else math.nan,
        "high": interval.high if interval else math.nan,
        "distinguishable": stats.distinguishable(interval) if interval and known else None,
        "units": interval.units if interval else 0,
        "note": note,
    }


def write(folder: str | Path, reference: str, reference_backbone: str | None = None) -> str:
    """Write `against.md` and `against.csv` into a run folder; the text for a terminal.

    Raises:
        InputError: as `against`, and where the folder holds no run.
    """
    table = against(*load_run(folder), reference, reference_backbone)
    run = Run.open(folder, create=True)
    whose = f"{reference_backbone}: {reference}" if reference_backbone else reference
    write_atomic(run.folder / "against.csv", table.to_csv(index=False, float_format="%.10g", lineterminator="\n"))
    write_atomic(run.folder / "against.md", "# " + _text(table, f"Against {whose}", "github", "## "))
    return _text(table, f"against {whose}", "simple", "")


def _text(table: pd.DataFrame, heading: str, style: str, mark: str) -> str:
    def escaped(text: str) -> str:
        return text.replace("|", "\\|") if style == "github" else text

    parts = [heading, ""]
    for backbone in sorted(set(table["backbone"])):
        own = table[table["backbone"] == backbone]
        tasks = [*sorted(set(own["task"]) - {MEAN}), MEAN]
        lines = []
        for (budget, label), row in own.groupby(["budget", "label"], sort=False):
            by_task = row.set_index("task")
            shown = [_cell(by_task.loc[task]) if task in by_task.index else "" for task in tasks]
            lines.append([budget_text(str(budget)), escaped(str(label)), *shown])
        align = ["right", "left", *["right"] * len(tasks)]
        drawn = tabulate(lines, ["budget", "method", *tasks], tablefmt=style, disable_numparse=True, colalign=align)
        parts += [mark + escaped(titled(backbone, own["backbone_remark"].iloc[0])), "", drawn, ""]
    notes = sorted({f"{t}: {note}" for t, note in zip(table["task"], table["note"], strict=True) if note and t != MEAN})
    return "\n".join([*parts, *(f"- {escaped(line)}" for line in (*_LEGEND, *notes))]) + "\n"


def _cell(row: pd.Series) -> str:
    if math.isnan(row["difference"]):
        return "-"
    bounds = f" [{row['low']:.1f}, {row['high']:.1f}]" if math.isfinite(row["low"]) else f" ({stats.TOO_FEW})"
    return f"{'≈ ' if row['distinguishable'] is False else ''}{row['difference']:+.1f}{bounds}"
