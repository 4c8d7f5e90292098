"""A leaderboard as text: terminal, Markdown, LaTeX and HTML."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
from tabulate import tabulate

from visionselector_eval.baselines.contract.budget import Tokens, parse_budget
from visionselector_eval.harness.report import stats

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

    Attributes:
        tidy: one row for each (backbone, label, budget, task), numbers; tasks without a result have status "missing".
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
        """Plain CSV: the numbers of `summary`, four columns a task, then the environment, the same in every row."""
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
        """A plain table; with `width`, task columns are spread over several tables where one would not fit."""
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


def titled(backbone: str, remark: str) -> str:
    """A backbone as headings name it."""
    return f"{backbone} ({remark})" if remark else backbone


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
    """Kept tokens; where tokens are dropped inside the LLM the average over layers, since equal K is not equal cost."""
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


def display_rows(summary: pd.DataFrame, tidy: pd.DataFrame, tasks: pd.DataFrame) -> pd.DataFrame:
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
