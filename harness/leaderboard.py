"""Leaderboards: one row for each method and budget, one column for each task, and what a careful reader
needs beside it.

`build_leaderboard(cells, samples)` only computes; `write(folder)` reads a run and writes
`leaderboard.{csv,md,tex,html}`.
The same run gives the same bytes. Everything is compared with the `full` row of the same run, backbone, task and
documents, never with another run's.
"""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
from tabulate import tabulate

from visionselector_eval.baselines.budget import Share, Tokens, parse_budget

from . import stats
from .store import RECORD_COLUMNS, Run, canonical_json, load_run, write_atomic

REFERENCE = "full"
CONTROLS = frozenset({"random", "uniform", "downsample"})

_DEFAULTS: dict[str, Any] = {
    "digest": "",
    "revision": "",
    "remark": "",
    "label": "",
    "options": "{}",
    "seed": 0,
    "metric": "",
    "higher_is_better": True,
    "scale": 1.0,
    "mean_of_documents": True,
    "n_documents": 0,
    "needs_submission": False,
    "kept_tokens": math.nan,
    "total_tokens": math.nan,
    "layer_tokens": math.nan,
    "status": "done",
    "error": "",
    "seconds": 0.0,
    "version": "",
    "finished_at": "",
    "context": "",
}

_CELL = ["backbone", "revision", "method", "label", "options", "budget", "task", "seed"]

MEANING = (
    "Relative %: 100 x score / score of the full model (every visual token kept) on the same backbone, "
    "task and documents in this same run; 100 x full / score where lower is better. Mean relative %: "
    "plain mean over the benchmarks, whatever their numbers of documents. (k/n) beside a mean: it covers "
    "only k of the n benchmarks and is not comparable with means over others."
)
_LEGEND = (
    MEANING,
    "95 % vs full: paired t interval over the same documents (over clusters of them where a task has any) "
    "of the difference to full, in points of relative %, with full's score taken as exact; no correction "
    "for the number of comparisons. Where a task has fewer than "
    f"{stats.MINIMUM_UNITS} documents (clusters): {stats.TOO_FEW}, and no mark says whether rows can be told apart.",
    "≈ marks what is not distinguishable: the interval of the difference to full holds 0. `best` has the "
    "highest mean of its budget; other rows of that budget are compared with it in the same way.",
    "Kept tokens: visual tokens that entered the LLM, measured, mean over the documents of a task, then "
    "over tasks; kept: their share of the tokens before compression.",
    "Controls (random, uniform, downsample) show what is had without any method.",
)


@dataclass(frozen=True)
class Leaderboard:
    """A leaderboard as tables and, by its methods, as text.

    Attributes
    ----------
    tidy: one row for each (backbone, label, budget, task), numbers; tasks without a result have status
    "missing".
    summary: one row for each (backbone, label, budget), numbers, in the order shown.
    display: the same rows as text, one column a task.
    tasks: one row for each (backbone, task): metric, direction, largest score, documents.
    notes: remarks on this run (failed cells, cells left out, ...), one line each.
    environment: what the run ran on.
    remarks: what is said beside a backbone's name ("LLM retrained"), for those that have such a remark.
    """

    tidy: pd.DataFrame
    summary: pd.DataFrame
    display: pd.DataFrame
    tasks: pd.DataFrame
    notes: tuple[str, ...] = ()
    environment: Mapping[str, Any] = field(default_factory=dict)
    remarks: Mapping[str, str] = field(default_factory=dict)

    def title(self, backbone: str) -> str:
        """The heading of a backbone's table."""
        return titled(backbone, self.remarks.get(backbone, ""))

    def footer(self) -> list[str]:
        """What stands below every rendering: meanings, remarks, environment."""
        return [*_LEGEND, *self.notes, *_environment_lines(self.environment, self._date())]

    def to_markdown(self) -> str:
        """GitHub Markdown."""
        parts = ["# Leaderboard", ""]
        for backbone, table in self._by_backbone():
            parts += [
                f"## {_markdown(self.title(backbone))}",
                "",
                _github(table),
                "",
                _github(self._tasks_of(backbone)),
                "",
            ]
        parts += [f"- {_markdown(line)}" for line in self.footer()]
        return "\n".join(parts) + "\n"

    def to_csv(self) -> str:
        """Plain CSV: the numbers of `summary`, then four columns a task, then the environment, the same in
        every row."""
        return self._wide().to_csv(index=False, float_format="%.10g", lineterminator="\n")

    def to_latex(self) -> str:
        """A `table*` for each backbone (packages booktabs and graphicx), remarks as comments below."""
        parts = ["% needs \\usepackage{booktabs,graphicx}"]
        for backbone, table in self._by_backbone():
            parts += [
                "\\begin{table*}",
                "\\centering",
                f"\\caption{{{_tex(self.title(backbone))}: score (relative \\%). {_tex(MEANING)}}}",
                "\\resizebox{\\textwidth}{!}{%",
                "\\begin{tabular}{ll" + "r" * (len(table.columns) - 3) + "l}",
                "\\toprule",
                " & ".join(_tex(name) for name in table.columns) + " \\\\",
            ]
            previous = None
            for row in table.itertuples(index=False):
                if row[1] != previous:
                    parts.append("\\midrule")
                    previous = row[1]
                parts.append(" & ".join(_tex(value) for value in row) + " \\\\")
            parts += ["\\bottomrule", "\\end{tabular}}", "\\end{table*}"]
        parts += [f"% {line}" for line in self.footer()]
        return "\n".join(parts) + "\n"

    def to_html(self) -> str:
        """One page that needs no other file."""
        body = []
        for backbone, table in self._by_backbone():
            body += [f"<h2>{html.escape(self.title(backbone))}</h2>", _html_table(table, "board")]
            body += [_html_table(self._tasks_of(backbone), "tasks")]
        notes = "\n".join(f"<li>{html.escape(line)}</li>" for line in self.footer())
        return _PAGE.replace("@BODY@", "\n".join(body)).replace("@NOTES@", notes)

    def to_terminal(self, width: int | None = None) -> str:
        """A plain table; with `width`, the task columns are spread over several tables where one would not
        fit."""
        parts = []
        for backbone, table in self._by_backbone():
            parts += [self.title(backbone), "", *_terminal_tables(table, width), ""]
        parts += [
            "relative % to `full` in brackets; ≈: not distinguishable (95 % paired interval holds 0); "
            "(k/n): mean over k of n benchmarks only",
            *self.notes,
        ]
        return "\n".join(parts) + "\n"

    def _date(self) -> str:
        dates = sorted({str(value)[:10] for value in self.tidy["finished_at"] if value})
        return "" if not dates else dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"

    def _by_backbone(self) -> Iterable[tuple[str, pd.DataFrame]]:
        for backbone in self.display["backbone"].unique():
            table = self.display[self.display["backbone"] == backbone].drop(columns="backbone")
            own = set(self.tasks.loc[self.tasks["backbone"] == backbone, "task"])
            other = set(self.tasks["task"]) - own
            yield backbone, table.drop(columns=[name for name in table.columns if name in other])

    def _tasks_of(self, backbone: str) -> pd.DataFrame:
        rows = self.tasks[self.tasks["backbone"] == backbone]
        return pd.DataFrame(
            {
                "task": rows["task"],
                "metric": rows["metric"],
                "best is": ["high" if high else "low" for high in rows["higher_is_better"]],
                "largest score": ["-" if math.isnan(scale) else f"{scale:g}" for scale in rows["scale"]],
                "documents": [str(n) for n in rows["n_documents"]],
                "interval from": [
                    "the metric" if mean else "per-document scores (the metric is not their mean)"
                    for mean in rows["mean_of_documents"]
                ],
            }
        )

    def _wide(self) -> pd.DataFrame:
        keys = ["backbone", "label", "budget"]
        wide = self.summary.copy()
        wide.insert(1, "backbone_remark", [self.remarks.get(backbone, "") for backbone in wide["backbone"]])
        for task in sorted(self.tasks["task"].unique()):
            part = self.tidy[self.tidy["task"] == task].set_index(keys)
            index = pd.MultiIndex.from_frame(wide[keys])
            for source, suffix in (
                ("score", ""),
                ("relative", " relative %"),
                ("spread", " sd"),
                ("status", " status"),
            ):
                wide[f"{task}{suffix}"] = part[source].reindex(index).to_numpy()
        wide["run_date"] = self._date()
        wide["environment"] = "; ".join(_environment_lines(self.environment, ""))
        return wide


# ---------------------------------------------------------------- building


@dataclass(frozen=True)
class Entry:
    """All seeds of one (backbone, label, budget, task)."""

    done: pd.DataFrame
    failed: pd.DataFrame
    documents: pd.DataFrame | None  # score (mean over seeds) and perhaps cluster, by doc_id; None: not usable

    @property
    def score(self) -> float:
        values = [float(value) for value in self.done["score"]]
        return math.fsum(values) / len(values) if values else math.nan

    def first(self, column: str) -> Any:
        rows = self.done if len(self.done) else self.failed
        return rows[column].iloc[0]

    def mean(self, column: str) -> float:
        values = [float(value) for value in self.done[column] if pd.notna(value)]
        return math.fsum(values) / len(values) if values else math.nan


def build_leaderboard(
    cells: pd.DataFrame, samples: pd.DataFrame, environment: Mapping[str, Any] | None = None
) -> Leaderboard:
    """Compute a leaderboard from the two tables of `load_run`.

    Parameters
    ----------
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
        full = next((row for row in own.values() if _method(row) == REFERENCE), {})
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
    display = _display(summary_frame, tidy_frame, task_frame)
    return Leaderboard(tidy_frame, summary_frame, display, task_frame, tuple(notes), dict(environment or {}), remarks)


def entries_of(cells: pd.DataFrame, samples: pd.DataFrame) -> dict[tuple[str, str, str], dict[str, Entry]]:
    """What `prepared` cells and their documents hold, by (backbone, label, budget) and then by task."""
    documents = _documents(samples)
    entries: dict[tuple[str, str, str], dict[str, Entry]] = {}
    for key, group in cells.groupby(["backbone", "label", "budget", "task"], sort=True):
        backbone, label, budget, task = (str(part) for part in key)
        done = group[group["status"] == "done"]
        entry = Entry(done, group[group["status"] != "done"], _mean_over_seeds(done, documents))
        entries.setdefault((backbone, label, budget), {})[task] = entry
    return entries


def prepared(cells: pd.DataFrame, notes: list[str]) -> pd.DataFrame:
    """Cells of `load_run` as every table reads them: defaults filled in, one name for each thing, stale cells left out
    (`notes` gets a line that says so), in an order of its own."""
    cells = cells.copy()
    for name, default in _DEFAULTS.items():
        if name not in cells.columns:
            cells[name] = default
        elif name not in ("kept_tokens", "total_tokens", "layer_tokens", "options", "scale"):
            cells[name] = cells[name].where(cells[name].notna(), default)
    cells["score"] = pd.to_numeric(cells["score"], errors="coerce").astype("float64")
    cells["scale"] = pd.to_numeric(cells["scale"], errors="coerce").astype("float64")
    cells["options"] = [
        _without_seed(options, seed) for options, seed in zip(cells["options"], cells["seed"], strict=True)
    ]
    cells["label"] = cells["label"].where(cells["label"] != "", cells["method"])
    cells["budget"] = [
        "1" if method == REFERENCE else str(parse_budget(budget))
        for method, budget in zip(cells["method"], cells["budget"], strict=True)
    ]
    cells = cells.sort_values([*_CELL, "finished_at", "digest"], kind="stable", ignore_index=True)
    stale = cells.duplicated(_CELL, keep="last")
    if stale.any():
        # One cell under two digests: made with other pixels, limit or version; these are no seeds to average.
        notes.append(f"{int(stale.sum())} older cells of this run, made with other settings, are left out")
        cells = cells[~stale].reset_index(drop=True)
    several = cells.groupby("backbone")["revision"].transform("nunique") > 1
    cells.loc[several, "backbone"] = cells["backbone"] + " @ " + cells["revision"].astype(str).str[:12]
    return _distinct_labels(cells)


def backbone_remarks(cells: pd.DataFrame) -> dict[str, str]:
    """The remark of each backbone that has one. A cell that failed before its backbone was loaded has none to tell."""
    told = cells[cells["remark"] != ""]
    return {str(name): "; ".join(sorted(set(group))) for name, group in told.groupby("backbone")["remark"]}


def titled(backbone: str, remark: str) -> str:
    """A backbone as headings name it."""
    return f"{backbone} ({remark})" if remark else backbone


def _without_seed(options: Any, seed: Any) -> str:
    """Canonical JSON of the options that tell methods apart; the seed is an axis of its own."""
    decoded = json.loads(options) if isinstance(options, str) else dict(options or {})
    return canonical_json({name: value for name, value in decoded.items() if (name, value) != ("seed", seed)})


def _distinct_labels(cells: pd.DataFrame) -> pd.DataFrame:
    """Where one label stands for several options on a backbone, the options that differ become part of it."""
    cells = cells.copy()
    for (_, label), group in cells.groupby(["backbone", "label"]):
        variants = sorted({(str(row.method), str(row.options)) for row in group.itertuples()})
        if len(variants) == 1:
            continue
        decoded = {variant: {"method": variant[0], **json.loads(variant[1])} for variant in variants}
        names = sorted({name for options in decoded.values() for name in options})
        differing = [
            name for name in names if len({json.dumps(o.get(name), sort_keys=True) for o in decoded.values()}) > 1
        ]
        for variant, options in decoded.items():
            text = ", ".join(f"{name}={options[name]}" for name in differing if name in options)
            mask = (cells["label"] == label) & (cells["method"] == variant[0]) & (cells["options"] == variant[1])
            cells.loc[mask & cells.index.isin(group.index), "label"] = f"{label} ({text})"
    return cells


def _documents(samples: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Scores of each cell by document; a task made of subtasks numbers its documents in each of them from 0."""
    if not len(samples):
        return {}
    columns = [name for name in ("score", "cluster") if name in samples.columns]
    key = [name for name in ("subtask", "doc_id") if name in samples.columns]
    tables = {}
    for digest, group in samples.groupby("cell", sort=False):
        index = [tuple(str(part) for part in row) for row in group[key].itertuples(index=False)]
        table = group[columns].set_axis(pd.Index(index, tupleize_cols=False)).sort_index()
        # The headline says nothing about some documents (MME's cognition, MMBench's other option orders).
        tables[str(digest)] = table[table["score"].notna()] if "score" in table else table
    return tables


def _mean_over_seeds(done: pd.DataFrame, documents: Mapping[str, pd.DataFrame]) -> pd.DataFrame | None:
    tables = [documents.get(digest) for digest in done["digest"]]
    found = [table for table in tables if table is not None]
    if not found or len(found) != len(tables):
        return None
    first = found[0]
    if not first.index.is_unique or any(not table.index.equals(first.index) for table in found[1:]):
        return None
    mean = first.copy()
    mean["score"] = sum(table["score"].astype("float64") for table in found) / len(found)
    return mean


def _method(row: Mapping[str, Entry]) -> str:
    return str(next(iter(row.values())).first("method"))


def obstacle(entry: Entry, other: Entry | None, name: str = "full") -> str:
    """Why two entries of a task must not be compared; empty where they may. `name`: what the other row is called."""
    if other is None or not len(other.done):
        return f"no {name} row"
    if entry.first("metric") != other.first("metric"):
        return f"another metric than the {name} row"
    contexts = {value for value in (*entry.done["context"], *other.done["context"]) if value}
    if len(contexts) > 1:
        return f"other settings than the {name} row"
    if entry.documents is not None and other.documents is not None:
        same = entry.documents.index.equals(other.documents.index)
    else:
        same = set(entry.done["n_documents"]) == set(other.done["n_documents"])
    return "" if same else f"other documents than the {name} row"


def paired(entry: Entry, other: Entry) -> stats.Interval | None:
    """The mean difference of two entries over the same documents, in units of their scores; without an interval where
    they are too few, None where documents have no scores."""
    if entry.documents is None or other.documents is None or not entry.documents.index.equals(other.documents.index):
        return None
    clusters = None
    if "cluster" in other.documents and other.documents["cluster"].notna().all():
        clusters = other.documents["cluster"].tolist()
    interval = stats.paired_difference(
        entry.documents["score"].to_numpy(), other.documents["score"].to_numpy(dtype="float64"), clusters
    )
    return stats.shown(interval) if math.isfinite(interval.difference) else None


def _told_apart(interval: stats.Interval) -> bool | None:
    """Whether two rows can be told apart; None where too few documents leave that open."""
    return stats.distinguishable(interval) if math.isfinite(interval.low) else None


def _findings(interval: stats.Interval) -> dict[str, Any]:
    """An interval's columns: its ends, or why there are none."""
    if not math.isfinite(interval.low):
        return {"interval_note": stats.TOO_FEW}
    return {"low": interval.low, "high": interval.high}


def _relative_points(entry: Entry, other: Entry, full: Entry) -> stats.Interval | None:
    """The paired difference of two entries in points of relative %, positive where `entry` is the better
    one."""
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
        "method": _method(row),
        "label": label,
        "kind": _kind(_method(row)),
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
    if _method(row) != REFERENCE and (interval := paired(entry, full)) is not None:
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
    method = _method(row)
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
    """The difference of two rows' mean relative % over `tasks`; without an interval where one of them has too few
    documents, None unless the documents of every one have scores."""
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


def budget_order(text: str) -> tuple[int, float]:
    """Sort key of a budget: shares from the largest down, then counts from the largest down."""
    budget = parse_budget(text)
    return (0, -budget.ratio) if isinstance(budget, Share) else (1, -float(budget.number))


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


# ---------------------------------------------------------------- text


def budget_text(text: str) -> str:
    """A budget as tables show it: 20%, 64tok."""
    budget = parse_budget(text)
    return str(budget) if isinstance(budget, Tokens) else f"{100 * budget.ratio:.4g}%"


def _number(value: float, scale: float) -> str:
    if math.isnan(scale):
        return f"{value:.5g}"
    return f"{value:.{4 if scale <= 1 else 2 if scale <= 100 else 1}f}"


def _score_text(line: Mapping[str, Any], scale: float) -> str:
    if line["status"] == "missing":
        return "-"
    if line["status"] == "failed":
        return "failed"
    if not math.isfinite(line["score"]):
        return "needs submission" if line["needs_submission"] else "n/a"
    text = _number(line["score"], scale)
    if math.isfinite(line["spread"]):
        text += f" ±{_number(line['spread'], scale)}"
    if line["kind"] != "full":
        text += f" ({line['relative']:.1f}%)" if math.isfinite(line["relative"]) else " (-)"
    if line["distinguishable"] is False:
        text += " ≈"
    if line["status"] == "partial":
        text += f" {line['seeds']}/{line['seeds_expected']} seeds"
    return text


def _remark(row: Mapping[str, Any]) -> str:
    parts = []
    if row["kind"] == "control":
        parts.append("control")
    if row["best_of_budget"]:
        parts.append("best")
    if row["distinguishable_from_full"] is False:
        parts.append("not distinguishable from full")
    if row["distinguishable_from_best"] is False:
        parts.append("not distinguishable from best")
    return "; ".join(parts)


def _records(table: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(name): value for name, value in row.items()} for row in table.to_dict("records")]


def _kept_text(row: Mapping[str, Any]) -> str:
    """Kept tokens; beside them the average over the layers where tokens are dropped inside the LLM: equal K is not
    equal cost."""
    if not math.isfinite(row["kept_tokens"]):
        return "-"
    text = f"{row['kept_tokens']:.1f}"
    if math.isfinite(row["layer_tokens"]) and abs(row["layer_tokens"] - row["kept_tokens"]) > 0.05:
        text += f" ({row['layer_tokens']:.1f} a layer)"
    return text


def _interval_text(row: Mapping[str, Any]) -> str:
    if math.isfinite(row["low"]):
        return f"[{row['low']:+.1f}, {row['high']:+.1f}]"
    return str(row["interval_note"]) or "-"


def _display(summary: pd.DataFrame, tidy: pd.DataFrame, tasks: pd.DataFrame) -> pd.DataFrame:
    scales = {(row["backbone"], row["task"]): float(row["scale"]) for row in _records(tasks)}
    lines = {(line["backbone"], line["label"], line["budget"], line["task"]): line for line in _records(tidy)}
    names = sorted(set(tasks["task"])) if len(tasks) else []
    rows = []
    for row in _records(summary):
        mean = f"{row['mean_relative']:.1f}" if math.isfinite(row["mean_relative"]) else "-"
        if not row["complete"]:
            mean += f" ({row['tasks_counted']}/{row['tasks']})"
        shown: dict[Any, str] = {
            "backbone": row["backbone"],
            "method": row["label"],
            "budget": "-" if row["kind"] == "full" else budget_text(row["budget"]),
        }
        for task in names:
            line = lines.get((row["backbone"], row["label"], row["budget"], task))
            shown[task] = "-" if line is None else _score_text(line, scales[row["backbone"], task])
        shown |= {
            "mean rel. %": mean,
            "95 % vs full": _interval_text(row),
            "kept tokens": _kept_text(row),
            "kept": f"{100 * row['share_kept']:.1f}%" if math.isfinite(row["share_kept"]) else "-",
            "remark": _remark(row),
        }
        rows.append(shown)
    return pd.DataFrame(rows)


def _environment_lines(environment: Mapping[str, Any], date: str) -> list[str]:
    """The environment in a line for people; each earlier one of a resumed run in its own."""
    lines = []
    for number, entry in enumerate([environment, *environment.get("earlier", [])]):
        packages = entry.get("packages") or {}
        parts = [f"{name} {packages[name]}" for name in sorted(packages) if packages[name]]
        commit = entry.get("commit")
        if commit:
            parts.append(f"commit {str(commit)[:12]}" + (" with changes" if entry.get("modified") else ""))
        if entry.get("python"):
            parts.append(f"Python {entry['python']}")
        for name in ("device", "dtype", "attn_implementation"):
            if entry.get(name):
                parts.append(f"{name} {entry[name]}")
        if gpus := (entry.get("cuda") or {}).get("devices"):
            parts.append("GPUs " + ", ".join(str(gpu.get("name")) for gpu in gpus))
        if cpu := (entry.get("cpu") or {}).get("model"):
            parts.append(f"CPU {cpu}")
        if entry.get("platform"):
            parts.append(str(entry["platform"]))
        if parts:
            lines.append(("Environment: " if number == 0 else "Resumed; earlier environment: ") + ", ".join(parts))
    if date:
        lines.insert(0, f"Run of {date} (UTC).")
    return lines


def _markdown(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def _github(table: pd.DataFrame) -> str:
    right = [name not in ("method", "remark", "task", "metric", "best is", "interval from") for name in table.columns]
    return tabulate(
        [[_markdown(str(value)) for value in row] for row in table.itertuples(index=False)],
        headers=[_markdown(str(name)) for name in table.columns],
        tablefmt="github",
        disable_numparse=True,
        colalign=["right" if flag else "left" for flag in right] if len(table) else None,
    )


def _terminal_tables(table: pd.DataFrame, width: int | None) -> list[str]:
    fixed = ["method", "budget"]
    last = ["mean rel. %", "95 % vs full", "kept tokens", "kept", "remark"]
    tasks = [name for name in table.columns if name not in fixed and name not in last]

    def draw(names: Sequence[str]) -> str:
        columns = [*fixed, *names]
        body = [[_stacked(str(row[name])) for name in columns] for row in table.to_dict("records")]
        align = ["left" if name in ("method", "remark") else "right" for name in columns]
        # a header breaks at underscores and spaces, so that its column is no wider than its numbers
        head = [name if name in fixed else _wrapped(name) for name in columns]
        return tabulate(body, head, tablefmt="simple", disable_numparse=True, colalign=align if body else None)

    def too_wide(text: str) -> bool:
        return width is not None and max(len(line) for line in text.split("\n")) > width

    blocks: list[list[str]] = [[]]
    for name in [*tasks, *last]:
        if blocks[-1] and too_wide(draw([*blocks[-1], name])):
            blocks.append([])
        blocks[-1].append(name)
    return "\n\n".join(draw(block) for block in blocks).split("\n")


def _stacked(text: str) -> str:
    short = text.replace("not distinguishable from ", "≈ ").replace("; ", "\n")
    return short.replace(" (", "\n(")


def _wrapped(name: str) -> str:
    lines: list[str] = []
    for part in name.replace("_", "_ ").split():
        if lines and len(lines[-1]) + len(part) <= 10:
            lines[-1] += part if lines[-1].endswith("_") else f" {part}"
        else:
            lines.append(part)
    return "\n".join(lines)


_TEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "≈": r"$\approx$",
    "±": r"$\pm$",
}


def _tex(value: Any) -> str:
    return "".join(_TEX.get(character, character) for character in str(value))


def _html_table(table: pd.DataFrame, kind: str) -> str:
    head = "".join(f"<th>{html.escape(str(name))}</th>" for name in table.columns)
    rows = []
    previous = None
    for row in table.itertuples(index=False):
        new = kind == "board" and previous is not None and row[1] != previous
        previous = row[1]
        cells = "".join(f"<td>{html.escape(str(value))}</td>" for value in row)
        rows.append(f'<tr class="group">{cells}</tr>' if new else f"<tr>{cells}</tr>")
    return f'<table class="{kind}"><thead><tr>{head}</tr></thead><tbody>\n' + "\n".join(rows) + "\n</tbody></table>"


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>Leaderboard</title>
<style>
body { font: 14px/1.4 system-ui, sans-serif; margin: 2em; color: #222; background: #fff }
table { border-collapse: collapse; margin: 1em 0; display: block; overflow-x: auto }
thead, tbody { font-variant-numeric: tabular-nums }
th, td { padding: .25em .7em; text-align: right; white-space: nowrap }
th:first-child, td:first-child, th:last-child, td:last-child { text-align: left }
thead th { border-bottom: 2px solid #444 }
tr.group td { border-top: 1px solid #bbb }
tbody tr:hover { background: #f3f6fa }
table.tasks { font-size: 12px; color: #555 }
table.tasks td { text-align: left }
li { max-width: 60em; color: #444 }
</style></head><body>
<h1>Leaderboard</h1>
@BODY@
<ul>
@NOTES@
</ul>
</body></html>
"""


# ---------------------------------------------------------------- files


def write(run_folder: str | Path) -> Leaderboard:
    """Build the leaderboard of a run and write `leaderboard.{csv,md,tex,html}` into its folder.

    Raises
    ------
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


assert set(_DEFAULTS) <= set(RECORD_COLUMNS)
