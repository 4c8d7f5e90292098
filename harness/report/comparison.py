"""What may be compared with what: rows of a run, paired over the same documents."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import pandas as pd

from visionselector_eval.baselines.contract.budget import Share, parse_budget
from visionselector_eval.harness.report import stats
from visionselector_eval.harness.store.files import canonical_json
from visionselector_eval.harness.store.record import RECORD_COLUMNS

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
    """Cells of `load_run` as every table reads them.

    Defaults are filled in, each thing has one name, stale cells are left out (`notes` gets a line that says so), and
    the order is fixed.
    """
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


def method_of(row: Mapping[str, Entry]) -> str:
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
    """The mean difference of two entries over the same documents, in units of their scores.

    Without an interval where they are too few, None where documents have no scores.
    """
    if entry.documents is None or other.documents is None or not entry.documents.index.equals(other.documents.index):
        return None
    clusters = None
    if "cluster" in other.documents and other.documents["cluster"].notna().all():
        clusters = other.documents["cluster"].tolist()
    interval = stats.paired_difference(
        entry.documents["score"].to_numpy(), other.documents["score"].to_numpy(dtype="float64"), clusters
    )
    return stats.shown(interval) if math.isfinite(interval.difference) else None


def budget_order(text: str) -> tuple[int, float]:
    """Sort key of a budget: shares from the largest down, then counts from the largest down."""
    budget = parse_budget(text)
    return (0, -budget.ratio) if isinstance(budget, Share) else (1, -float(budget.number))


assert set(_DEFAULTS) <= set(RECORD_COLUMNS)
