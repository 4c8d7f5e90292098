"""The difficulty split of VTC-Bench (arXiv 2510.07143): how methods fare on the documents that down-sampling loses.

Most documents of most benchmarks are answered as well from a smaller image, so a plain score says little about the
choice of tokens. Group A holds the documents that `full` answers right and `downsample` wrong: there, which tokens are
kept matters. Group B holds those that both answer right. `difficulty(cells, samples)` only computes; `write(folder)`
reads a run and writes `difficulty.{csv,md}`.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from tabulate import tabulate

from visionselector_eval.baselines.contract.budget import Share, parse_budget
from visionselector_eval.baselines.contract.errors import InputError
from visionselector_eval.harness.report.comparison import REFERENCE, backbone_remarks, budget_order, prepared
from visionselector_eval.harness.report.render import budget_text
from visionselector_eval.harness.report.rows import titled
from visionselector_eval.harness.report.stats import MINIMUM_UNITS, paired_difference, t_quantile
from visionselector_eval.harness.store.files import write_atomic
from visionselector_eval.harness.store.run import Run, load_run

CONTROL = "downsample"

THRESHOLD = 0.5
"""A document is answered right from this share of the largest score of a document on."""

MINIMUM = 10
"""A group of fewer documents says too little to be shown: the 95 % interval of 5 right in 9 is 0.27 to 0.81."""

COLUMNS = (
    "backbone",
    "method",
    "label",
    "budget",
    "task",
    "seed",
    "metric",
    "score",
    "scale",
    "n_documents",
    "n_unscored",
    "share_right",
    "control",
    "control_budget",
    "same_budget",
    "kept_tokens",
    "control_kept_tokens",
    *(f"{name}_{group}" for group in ("a", "b") for name in ("n", "accuracy", "low", "high", "enough")),
    "note",
    "backbone_remark",
)

_LEGEND = (
    "A: documents that `full` answers right and `downsample` wrong, at the budget named; B: those that both answer "
    "right. The rest are documents that `full` answers wrong (VTC-Bench, arXiv 2510.07143).",
    f"on A, on B: share answered right, with its 95 % interval (Wilson; where documents share an image or video, with "
    f"as many documents as they are worth). Too few: a group of fewer than {MINIMUM} documents, or "
    f"of fewer than {MINIMUM_UNITS} images or videos that they share.",
    f"Right: at least {THRESHOLD:g} of the largest score of a document, so for ANLS and VQA accuracy 0.5. "
    "score is the task's own metric over all documents.",
    "`downsample` itself is 0 on A and 1 on B by definition, `full` 1 on both. Read A and B together: a method may "
    "lose on B, which a smaller image keeps, what it gains on A.",
)


class Proportion(NamedTuple):
    """A share of right answers with its 95 % interval; nan where there is no document."""

    share: float
    low: float
    high: float


def proportion(right: Sequence[bool], clusters: Sequence[Hashable] | None = None, *, level: float = 0.95) -> Proportion:
    """The share of right answers with Wilson's interval.

    With clusters, the number of documents is replaced by the number of independent ones that would have the clustered
    standard error of `stats.paired_difference` (never more than there are; where all answers are alike, one a cluster),
    and the normal quantile by that of t with a degree of freedom less than clusters (Korn and Graubard). Where every
    document is its own cluster it is the plain interval.

    Args:
        right: (n,) whether each document is answered right.
        clusters: (n,) cluster of each document.
    """
    n = len(right)
    if n == 0:
        return Proportion(math.nan, math.nan, math.nan)
    values = np.asarray(right, dtype=np.float64)
    p, size = float(values.mean()), float(n)
    quantile = NormalDist().inv_cdf(0.5 + level / 2)
    if clusters is not None and (groups := len(set(clusters))) < n:
        if groups == 1:  # nothing to estimate how alike they are
            return Proportion(p, 0.0, 1.0)
        error = paired_difference(values, np.zeros(n), clusters).se
        size = min(size, p * (1 - p) / error**2) if 0 < p < 1 and error > 0 else float(groups)
        quantile = t_quantile(0.5 + level / 2, groups - 1)
    square = quantile**2
    middle = (p + square / (2 * size)) / (1 + square / size)
    half = quantile / (1 + square / size) * math.sqrt(p * (1 - p) / size + square / (4 * size**2))
    # At p = 0 and 1 an end is p itself; rounding must not leave it beside.
    low, high = (0.0 if p == 0 else middle - half), (1.0 if p == 1 else middle + half)
    return Proportion(p, max(0.0, low), min(1.0, high))


# ---------------------------------------------------------------- computing


def difficulty(cells: pd.DataFrame, samples: pd.DataFrame) -> pd.DataFrame:
    """Accuracy on A and on B for every method, budget, task and seed of a run.

    The reference cells have the same backbone, task and settings. Their seed is the method's or, since `full` and
    `downsample` draw nothing and are run once, the lowest there is. The downsample cell is that of the same budget,
    else that of the nearest share of visual tokens (a count has the share that was measured; the smaller of two
    equally near).

    Args:
        cells, samples: the two tables of `load_run`.

    Returns:
        One row a finished cell besides `full` and `downsample`, columns `COLUMNS`; the groups' ones end in `_a` and
        `_b`. Where the split can't be made `note` says why and the numbers are missing. `enough_a` and `enough_b` say
        whether the group has `MINIMUM` documents, in `MINIMUM_UNITS` clusters. `share_right` is over all scored
        documents.

    Raises:
        InputError: the run has no finished `full` cell, no finished `downsample` cell, or nothing else.
    """
    cells = prepared(cells, [])
    remarks = backbone_remarks(cells)
    done = cells[cells["status"] == "done"]
    _check_methods(set(done["method"]))
    tables = _tables(samples)
    rows: list[dict[str, Any]] = []
    for _, group in done.groupby(["backbone", "task"], sort=True):
        unit, why = _unit(group, tables)
        for cell in _records(group[~group["method"].isin([REFERENCE, CONTROL])]):
            row = {name: cell.get(name, math.nan) for name in COLUMNS}
            row |= {"control": "", "control_budget": "", "note": ""}
            row["backbone_remark"] = remarks.get(cell["backbone"], "")
            row |= dict.fromkeys(("same_budget", "enough_a", "enough_b"))
            full = _reference(cell, _records(group[group["method"] == REFERENCE]))
            control = _reference(cell, _records(group[group["method"] == CONTROL]), by_budget=True)
            if why:
                row["note"] = why
            elif full is None or control is None:
                row["note"] = f"no finished {REFERENCE if full is None else CONTROL} cell with the same settings"
            else:
                row |= {
                    "control": control["label"],
                    "control_budget": control["budget"],
                    "same_budget": control["budget"] == cell["budget"],
                    "control_kept_tokens": control["kept_tokens"],
                }
                own, base, lowered = (tables.get(c["digest"]) for c in (cell, full, control))
                row |= _split(own, base, lowered, unit)
            rows.append(row)
    rows.sort(key=lambda r: (r["backbone"], r["task"], *budget_order(r["budget"]), r["label"], r["seed"]))
    return pd.DataFrame(rows, columns=list(COLUMNS))


def _check_methods(methods: set[str]) -> None:
    """Refuse a run without the reference cells, or with nothing to compare with them."""
    for method in (REFERENCE, CONTROL):
        if method not in methods:
            raise InputError(
                f"the difficulty split needs a finished cell of `{method}`, which this run does not have: "
                f"sweep it again with {method} among --methods"
            )
    if not methods - {REFERENCE, CONTROL}:
        raise InputError(
            "the difficulty split compares methods, and this run has no finished cell besides `full` and `downsample`: "
            "sweep it again with more --methods"
        )


def _records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    return [{str(name): value for name, value in row.items()} for row in frame.to_dict("records")]


def _tables(samples: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Score and cluster of each cell's documents, by document; subtasks number theirs from 0 each."""
    key = [name for name in ("subtask", "doc_id") if name in samples.columns]
    columns = [name for name in ("score", "cluster") if name in samples.columns]
    return {
        str(digest): group.set_index(key)[columns].sort_index() for digest, group in samples.groupby("cell", sort=False)
    }


def _unit(group: pd.DataFrame, tables: Mapping[str, pd.DataFrame]) -> tuple[float, str]:
    """The largest score of one document of a task, and why it can't be split (empty where it can)."""
    if not group["higher_is_better"].astype(bool).all():
        return math.nan, "lower is better: there is no rule for what is answered right"
    found = [tables[digest]["score"].astype("float64") for digest in group["digest"] if digest in tables]
    scores = pd.concat(found).dropna() if found else pd.Series(dtype="float64")
    if scores.empty:
        return math.nan, "its documents have no scores of their own"
    # Scores are in units of the headline where that is their mean; else (MME) they are shares of 1, with one exception:
    # a cell of MVBench whose empty answers upstream left out of the mean. Its scores beyond 1 tell.
    headline = group["mean_of_documents"].astype(bool).any() or scores.max() > 1
    unit = float(group["scale"].max()) if headline else 1.0
    if math.isnan(unit):
        if scores.max() > 1:
            return math.nan, "the largest score of its documents is not known"
        unit = 1.0
    return unit, ""


def _reference(
    cell: Mapping[str, Any], candidates: Sequence[Mapping[str, Any]], by_budget: bool = False
) -> Mapping[str, Any] | None:
    """The cell among `candidates` to compare `cell` with: nearest budget, then its seed, then plainest variant."""
    fitting = [
        c for c in candidates if c["metric"] == cell["metric"] and len({c["context"], cell["context"]} - {""}) <= 1
    ]

    def order(candidate: Mapping[str, Any]) -> tuple[Any, ...]:
        near = _distance(candidate, cell) if by_budget else (0.0, 0.0)
        variant = (candidate["label"] != candidate["method"], candidate["label"])
        return (*near, candidate["seed"] != cell["seed"], candidate["seed"], *variant, candidate["digest"])

    best = min(fitting, key=order, default=None)
    return best if best is not None and (not by_budget or math.isfinite(_distance(best, cell)[0])) else None


def _distance(one: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[float, float]:
    """How far apart two cells' budgets are, and the first one's share; infinite where a count has no measured share."""
    if one["budget"] == other["budget"]:
        return -1.0, 0.0
    distance = abs(_share(one) - _share(other))
    # rounded: 0.3 - 0.2 and 0.2 - 0.1 are not the same float
    return (round(distance, 9), _share(one)) if math.isfinite(distance) else (math.inf, 0.0)


def _share(cell: Mapping[str, Any]) -> float:
    budget = parse_budget(cell["budget"])
    if isinstance(budget, Share):
        return budget.ratio
    return cell["kept_tokens"] / cell["total_tokens"] if cell["total_tokens"] > 0 else math.nan


def _split(
    own: pd.DataFrame | None, full: pd.DataFrame | None, control: pd.DataFrame | None, unit: float
) -> dict[str, Any]:
    if own is None or full is None or control is None:
        return {"note": "its documents have no scores of their own"}
    if not own.index.is_unique or not own.index.equals(full.index) or not own.index.equals(control.index):
        return {"note": "full, downsample and the method did not answer the same documents"}
    scores = [table["score"].astype("float64") for table in (own, full, control)]
    scored = scores[0].notna() & scores[1].notna() & scores[2].notna()
    if not scored.any():
        return {"note": "its documents have no scores of their own"}
    # 1e-9: half of a scale such as 0.6 is not the same float by every way of computing it
    right, full_right, control_right = (table[scored] >= THRESHOLD * unit - 1e-9 for table in scores)
    clusters = None
    if "cluster" in full and full["cluster"].notna().all():
        clusters = full["cluster"][scored]
    out: dict[str, Any] = {"n_unscored": int((~scored).sum()), "share_right": float(right.mean())}
    for name, members in (("a", full_right & ~control_right), ("b", full_right & control_right)):
        found = proportion(right[members].tolist(), None if clusters is None else clusters[members].tolist())
        n = int(members.sum())
        out |= {f"n_{name}": n, f"accuracy_{name}": found.share, f"low_{name}": found.low, f"high_{name}": found.high}
        units = n if clusters is None else clusters[members].nunique()
        out[f"enough_{name}"] = n >= MINIMUM and int(units) >= MINIMUM_UNITS
    return out


# ---------------------------------------------------------------- text


def to_csv(table: pd.DataFrame) -> str:
    """Plain CSV of the numbers."""
    return table.to_csv(index=False, float_format="%.10g", lineterminator="\n")


def to_markdown(table: pd.DataFrame) -> str:
    """GitHub Markdown, a table for each backbone."""
    parts = ["# Difficulty split", ""]
    for title, rows in _by_backbone(table):
        parts += [f"## {title.replace('|', chr(92) + '|')}", "", _draw(rows, "github"), ""]
    return "\n".join([*parts, *(f"- {line}" for line in [*_LEGEND, *_notes(table)])]) + "\n"


def to_terminal(table: pd.DataFrame) -> str:
    """Plain tables, one for each backbone."""
    parts = []
    for title, rows in _by_backbone(table):
        parts += [f"difficulty split of {title}", "", _draw(rows, "simple"), ""]
    return "\n".join([*parts, *_LEGEND[:3], *_notes(table)]) + "\n"


def _by_backbone(table: pd.DataFrame) -> list[tuple[str, pd.DataFrame]]:
    """The rows of each backbone under its heading."""
    groups = table.groupby("backbone", sort=True)
    return [(titled(str(backbone), rows["backbone_remark"].iloc[0]), rows) for backbone, rows in groups]


def _draw(table: pd.DataFrame, style: str) -> str:
    shown = table[table["note"] == ""]
    if shown.empty:
        return "no task of this run can be split"
    several = table["seed"].nunique() > 1
    rows = []
    for row in _records(shown):
        label = f"{row['label']} (seed {row['seed']})" if several else row["label"]
        control = budget_text(row["control_budget"]) + ("" if row["same_budget"] else " (nearest)")
        if row["control"] != CONTROL:
            control = f"{row['control']} {control}"
        rows.append(
            [
                row["task"],
                budget_text(row["budget"]),
                label.replace("|", "\\|") if style == "github" else label,
                _score(row["score"], row["scale"]),
                *(_group(row, name) for name in ("a", "b")),
                control,
                int(row["n_a"]),
                int(row["n_b"]),
                int(row["n_documents"]),
            ]
        )
    head = ["task", "budget", "method", "score", "on A", "on B", "downsample at", "docs A", "docs B", "docs"]
    align = ["left", "right", "left", "right", "left", "left", "left", "right", "right", "right"]
    return tabulate(rows, head, tablefmt=style, disable_numparse=True, colalign=align)


def _group(row: Mapping[str, Any], name: str) -> str:
    if not row[f"enough_{name}"]:
        return "too few"
    return f"{row[f'accuracy_{name}']:.3f} [{row[f'low_{name}']:.3f}, {row[f'high_{name}']:.3f}]"


def _score(value: float, scale: float) -> str:
    if math.isnan(value):
        return "n/a"
    return f"{value:.5g}" if math.isnan(scale) else f"{value:.{4 if scale <= 1 else 2 if scale <= 100 else 1}f}"


def _notes(table: pd.DataFrame) -> list[str]:
    """Tasks and cells that are not in the table, and what is not counted in it."""
    lines = []
    for (backbone, task), rows in table.groupby(["backbone", "task"], sort=True):
        for note in dict.fromkeys(note for note in rows["note"] if note):
            mine = rows[rows["note"] == note]
            of = "" if len(mine) == len(rows) else " (" + ", ".join(_names(mine)) + ")"
            lines.append(f"left out: {backbone}, {task}{of}: {note}")
        if (unscored := rows["n_unscored"].max()) > 0:
            lines.append(f"{backbone}, {task}: {int(unscored)} documents have no score of their own and do not count")
    return lines


def _names(rows: pd.DataFrame) -> list[str]:
    return [f"{r['label']} at {budget_text(r['budget'])} seed {r['seed']}" for r in _records(rows)]


# ---------------------------------------------------------------- files


def write(run_folder: str | Path) -> pd.DataFrame:
    """Compute the split of a run and write `difficulty.{csv,md}` into its folder.

    Raises:
        InputError: no run there, nothing to split it by, or the folder cannot be written to.
    """
    table = difficulty(*load_run(run_folder))
    run = Run.open(run_folder, create=True)
    write_atomic(run.folder / "difficulty.csv", to_csv(table))
    write_atomic(run.folder / "difficulty.md", to_markdown(table))
    return table
