"""A leaderboard as text: one function a format, one row of `RENDERERS`; the terminal's table beside them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jinja2
import pandas as pd
from tabulate import SEPARATING_LINE, tabulate

from visionselector_eval.baselines.contract.budget import Tokens, parse_budget
from visionselector_eval.harness.report import stats
from visionselector_eval.harness.report.rows import Leaderboard, SummaryRow, TaskRow

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


def footer(board: Leaderboard) -> list[str]:
    """What stands below every rendering: meanings, remarks, environment."""
    return [*_LEGEND, *board.notes, *_environment_lines(board.environment, board.date)]


# A row's text --------------------------------------------------------------------------------------------------------


def budget_text(text: str) -> str:
    """A budget as tables show it: 20%, 64tok."""
    budget = parse_budget(text)
    return str(budget) if isinstance(budget, Tokens) else f"{100 * budget.ratio:.4g}%"


def _number(value: float, scale: float) -> str:
    if math.isnan(scale):
        return f"{value:.5g}"
    return f"{value:.{4 if scale <= 1 else 2 if scale <= 100 else 1}f}"


def _score_text(row: TaskRow, scale: float, *, full: bool) -> str:
    if row.status in ("missing", "failed"):
        return "-" if row.status == "missing" else "failed"
    if not math.isfinite(row.score):
        return "needs submission" if row.needs_submission else "n/a"
    text = _number(row.score, scale)
    if math.isfinite(row.spread):
        text += f" ±{_number(row.spread, scale)}"
    if not full:
        text += f" ({row.relative:.1f}%)" if math.isfinite(row.relative) else " (-)"
    if row.distinguishable is False:
        text += " ≈"
    if row.status == "partial":
        text += f" {row.seeds}/{row.seeds_expected} seeds"
    return text


def _remark(row: SummaryRow) -> str:
    parts = {
        "control": row.kind == "control",
        "best": row.best_of_budget,
        "not distinguishable from full": row.distinguishable_from_full is False,
        "not distinguishable from best": row.distinguishable_from_best is False,
    }
    return "; ".join(part for part, holds in parts.items() if holds)


def _kept_text(row: SummaryRow) -> str:
    """Kept tokens; where tokens are dropped inside the LLM the average over layers, since equal K is not equal cost."""
    if not math.isfinite(row.kept_tokens):
        return "-"
    text = f"{row.kept_tokens:.1f}"
    if math.isfinite(row.layer_tokens) and abs(row.layer_tokens - row.kept_tokens) > 0.05:
        text += f" ({row.layer_tokens:.1f} a layer)"
    return text


def _interval_text(row: SummaryRow) -> str:
    if math.isfinite(row.low):
        return f"[{row.low:+.1f}, {row.high:+.1f}]"
    return row.interval_note or "-"


def _mean_text(row: SummaryRow) -> str:
    mean = f"{row.mean_relative:.1f}" if math.isfinite(row.mean_relative) else "-"
    return mean if row.complete else f"{mean} ({row.tasks_counted}/{row.tasks})"


@dataclasses.dataclass(frozen=True)
class Table:
    """A table as text.

    Attributes:
        head: the columns' names.
        rows: their cells.
        groups: what each row belongs to; a new one is set apart.
    """

    head: list[str]
    rows: list[list[str]]
    groups: list[str]


def main_table(board: Leaderboard, backbone: str) -> Table:
    """The table of a backbone: one row a method and budget, one column a task."""
    tasks = board.tasks_of(backbone)
    rows = [row for row in board.summary if row.backbone == backbone]
    budgets = ["-" if row.kind == "full" else budget_text(row.budget) for row in rows]
    return Table(
        ["method", "budget", *(task.task for task in tasks), *_LAST],
        [
            [
                row.label,
                budget,
                *(_score_text(row.by_task[task.task], task.scale, full=row.kind == "full") for task in tasks),
                _mean_text(row),
                _interval_text(row),
                _kept_text(row),
                f"{100 * row.share_kept:.1f}%" if math.isfinite(row.share_kept) else "-",
                _remark(row),
            ]
            for row, budget in zip(rows, budgets, strict=True)
        ],
        budgets,
    )


_LAST = ("mean rel. %", "95 % vs full", "kept tokens", "kept", "remark")


def _tasks_table(board: Leaderboard, backbone: str) -> Table:
    tasks = board.tasks_of(backbone)
    from_documents = "per-document scores (the metric is not their mean)"
    return Table(
        ["task", "metric", "best is", "largest score", "documents", "interval from"],
        [
            [
                task.task,
                task.metric,
                "high" if task.higher_is_better else "low",
                "-" if math.isnan(task.scale) else f"{task.scale:g}",
                str(task.n_documents),
                "the metric" if task.mean_of_documents else from_documents,
            ]
            for task in tasks
        ],
        [""] * len(tasks),
    )


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


# Formats -------------------------------------------------------------------------------------------------------------


def markdown(board: Leaderboard) -> str:
    """GitHub Markdown."""
    parts = ["# Leaderboard", ""]
    for backbone in board.backbones:
        tables = (main_table(board, backbone), _tasks_table(board, backbone))
        parts += [f"## {_markdown(board.title(backbone))}", ""]
        parts += [line for table in tables for line in (_github(table), "")]
    parts += [f"- {_markdown(line)}" for line in footer(board)]
    return "\n".join(parts) + "\n"


def csv(board: Leaderboard) -> str:
    """Plain CSV: the numbers of each row, four columns a task, then the environment, the same in every row."""
    lines = []
    for row in board.summary:
        line: dict[str, Any] = {
            "backbone": row.backbone,
            "backbone_remark": board.remarks.get(row.backbone, ""),
            **{name: getattr(row, name) for name in _CSV_COLUMNS},
        }
        for task in sorted({task.task for task in board.tasks}):
            part = row.by_task.get(task)
            line[task] = part.score if part else None
            line[f"{task} relative %"] = part.relative if part else None
            line[f"{task} sd"] = part.spread if part else None
            line[f"{task} status"] = part.status if part else None
        environment = "; ".join(_environment_lines(board.environment, ""))
        lines.append({**line, "run_date": board.date, "environment": environment})
    return pd.DataFrame(lines).to_csv(index=False, float_format="%.10g", lineterminator="\n")


_CSV_COLUMNS = (
    "label", "budget", "method", "kind", "options", "seeds", "mean_relative", "tasks_counted", "tasks", "complete",
    "low", "high", "distinguishable_from_full", "best_of_budget", "distinguishable_from_best", "interval_note",
    "kept_tokens", "total_tokens", "layer_tokens", "share_kept", "failed_tasks",
)  # fmt: skip


def latex(board: Leaderboard) -> str:
    """A `table*` for each backbone (packages booktabs and graphicx), remarks as comments below."""
    parts = ["% needs \\usepackage{booktabs,graphicx}"]
    for backbone in board.backbones:
        table = main_table(board, backbone)
        rows: list[Any] = []
        for number, (row, group) in enumerate(zip(table.rows, table.groups, strict=True)):
            rows += [SEPARATING_LINE] if number and group != table.groups[number - 1] else []
            rows.append(row)
        align = _align(table)
        drawn = tabulate(rows, table.head, tablefmt="latex_booktabs", disable_numparse=True, colalign=align)
        parts += [
            "\\begin{table*}",
            "\\centering",
            f"\\caption{{{_tex(board.title(backbone))}: score (relative \\%). {_tex(MEANING)}}}",
            "\\resizebox{\\textwidth}{!}{%",
            f"{_tex_signs(drawn)}}}",
            "\\end{table*}",
        ]
    parts += [f"% {line}" for line in footer(board)]
    return "\n".join(parts) + "\n"


def html(board: Leaderboard) -> str:
    """One page that needs no other file."""
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    tables = [
        (board.title(backbone), [("board", main_table(board, backbone)), ("tasks", _tasks_table(board, backbone))])
        for backbone in board.backbones
    ]
    return environment.from_string(_PAGE).render(tables=tables, notes=footer(board))


RENDERERS: dict[str, Callable[[Leaderboard], str]] = {"csv": csv, "md": markdown, "tex": latex, "html": html}
"""The formats that a run's leaderboard is written in, by the ending of their files."""


def terminal(board: Leaderboard, width: int | None = None) -> str:
    """A plain table; with `width`, task columns are spread over several tables where one would not fit."""
    parts = []
    for backbone in board.backbones:
        parts += [board.title(backbone), "", *_terminal_tables(main_table(board, backbone), width), ""]
    parts += [
        "relative % to `full` in brackets; ≈: not distinguishable (95 % paired interval holds 0); "
        "(k/n): mean over k of n benchmarks only",
        *board.notes,
    ]
    return "\n".join(parts) + "\n"


def _align(table: Table) -> list[str]:
    left = ("method", "remark", "task", "metric", "best is", "interval from")
    return ["left" if name in left else "right" for name in table.head]


def _markdown(text: str) -> str:
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;")


def _github(table: Table) -> str:
    rows = [[_markdown(cell) for cell in row] for row in table.rows]
    head = [_markdown(name) for name in table.head]
    align = _align(table) if rows else None
    return tabulate(rows, head, tablefmt="github", disable_numparse=True, colalign=align)


def _terminal_tables(table: Table, width: int | None) -> list[str]:
    fixed = ["method", "budget"]

    def draw(names: Sequence[str]) -> str:
        columns = [table.head.index(name) for name in (*fixed, *names)]
        body = [[_stacked(row[column]) for column in columns] for row in table.rows]
        align = ["left" if table.head[column] in ("method", "remark") else "right" for column in columns]
        # a header breaks at underscores and spaces, so that its column is no wider than its numbers
        head = [*fixed, *(_wrapped(name) for name in names)]
        return tabulate(body, head, tablefmt="simple", disable_numparse=True, colalign=align if body else None)

    def too_wide(text: str) -> bool:
        return width is not None and max(len(line) for line in text.split("\n")) > width

    blocks: list[list[str]] = [[]]
    for name in table.head[len(fixed) :]:
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


def _tex(text: str) -> str:
    """Text escaped for LaTeX, as a cell of tabulate's tables is."""
    cell = tabulate([[" ".join(text.split())]], tablefmt="latex_booktabs", disable_numparse=True).splitlines()[2]
    return _tex_signs(cell.removesuffix("\\\\").strip())


def _tex_signs(text: str) -> str:
    return text.replace("≈", "$\\approx$").replace("±", "$\\pm$")


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
{% for title, parts in tables %}
<h2>{{ title }}</h2>
{% for kind, table in parts %}
<table class="{{ kind }}"><thead><tr>
{%- for name in table.head %}<th>{{ name }}</th>{% endfor %}</tr></thead><tbody>
{% for row in table.rows %}
{% set new = loop.index0 and table.groups[loop.index0] != table.groups[loop.index0 - 1] %}
<tr{% if new %} class="group"{% endif %}>{% for cell in row %}<td>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</tbody></table>
{% endfor %}
{% endfor %}
<ul>
{% for note in notes %}
<li>{{ note }}</li>
{% endfor %}
</ul>
</body></html>
"""
