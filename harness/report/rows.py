"""The rows of a leaderboard, as numbers: what `leaderboard` computes and `render` shows.

A number that there is none of is nan; a question that the data leave open is None.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from visionselector_eval.harness.report.comparison import CONTROLS, REFERENCE

Key = tuple[str, str, str]
"""What names a row of a run: backbone, label, budget."""


@dataclass(frozen=True, kw_only=True)
class TaskInfo:
    """A task as a backbone was asked it.

    Attributes:
        metric: name of the headline metric.
        scale: largest possible score; nan where it is not known.
        mean_of_documents: whether the score is the mean of the documents' scores.
    """

    backbone: str
    task: str
    metric: str
    higher_is_better: bool
    scale: float
    mean_of_documents: bool
    n_documents: int


@dataclass(kw_only=True)
class TaskRow:
    """One method at one budget on one task.

    Attributes:
        score: the headline metric, mean over seeds; `spread` its deviation over them.
        relative: per cent of `full`'s score.
        difference, low, high: to `full` over the same documents, in units of the score, with its interval.
        distinguishable: whether the interval leaves 0 out.
        interval_note: why there is no interval.
        kept_tokens, total_tokens, layer_tokens: visual tokens, means over documents.
        status: done, partial (some seeds failed), failed or missing.
        note: why it is not compared with `full`.
    """

    backbone: str
    method: str
    label: str
    options: str
    budget: str
    task: str
    metric: str = ""
    score: float = math.nan
    spread: float = math.nan
    seeds: int = 0
    seeds_expected: int = 0
    relative: float = math.nan
    difference: float = math.nan
    low: float = math.nan
    high: float = math.nan
    distinguishable: bool | None = None
    interval_note: str = ""
    n_documents: int = 0
    needs_submission: bool = False
    kept_tokens: float = math.nan
    total_tokens: float = math.nan
    layer_tokens: float = math.nan
    status: str = "missing"
    error: str = ""
    note: str = ""
    finished_at: str = ""

    @property
    def key(self) -> Key:
        """What names its row."""
        return self.backbone, self.label, self.budget


@dataclass(kw_only=True)
class SummaryRow:
    """One method at one budget over all tasks.

    Attributes:
        mean_relative: plain mean over the tasks that have a relative score, `tasks_counted` of `tasks`.
        low, high: interval of the difference of the mean to `full`, in points of relative %.
        comparable: its mean covers every task that `full` can be compared on.
        kept_tokens, total_tokens, layer_tokens: means over tasks.
        by_task: its tasks, by name.
    """

    backbone: str
    label: str
    budget: str
    method: str
    options: str
    seeds: int
    mean_relative: float
    tasks_counted: int
    tasks: int
    low: float = math.nan
    high: float = math.nan
    distinguishable_from_full: bool | None = None
    comparable: bool = False
    best_of_budget: bool = False
    distinguishable_from_best: bool | None = None
    interval_note: str = ""
    kept_tokens: float = math.nan
    total_tokens: float = math.nan
    layer_tokens: float = math.nan
    failed_tasks: int = 0
    by_task: dict[str, TaskRow] = field(default_factory=dict)

    @property
    def key(self) -> Key:
        """What names the row."""
        return self.backbone, self.label, self.budget

    @property
    def kind(self) -> str:
        """full, control or method."""
        return "full" if self.method == REFERENCE else "control" if self.method in CONTROLS else "method"

    @property
    def complete(self) -> bool:
        """Whether the mean covers all tasks."""
        return self.tasks_counted == self.tasks

    @property
    def share_kept(self) -> float:
        """Kept tokens by tokens before compression."""
        return self.kept_tokens / self.total_tokens if self.total_tokens > 0 else math.nan


@dataclass(frozen=True)
class Leaderboard:
    """A leaderboard.

    Attributes:
        summary: the rows in the order shown, backbone by backbone.
        tasks: the tasks of each backbone.
        notes: remarks on this run (failed cells, cells left out, ...), one line each.
        environment: what the run ran on.
        remarks: what is said beside a backbone's name ("LLM retrained"), for those that have such a remark.
    """

    summary: tuple[SummaryRow, ...]
    tasks: tuple[TaskInfo, ...]
    notes: tuple[str, ...] = ()
    environment: Mapping[str, Any] = field(default_factory=dict)
    remarks: Mapping[str, str] = field(default_factory=dict)

    @property
    def backbones(self) -> list[str]:
        """In the order shown."""
        return list(dict.fromkeys(row.backbone for row in self.summary))

    def tasks_of(self, backbone: str) -> list[TaskInfo]:
        """The tasks that a backbone was asked, by name."""
        return [task for task in self.tasks if task.backbone == backbone]

    def title(self, backbone: str) -> str:
        """A backbone as headings name it."""
        return titled(backbone, self.remarks.get(backbone, ""))

    @property
    def date(self) -> str:
        """The day (UTC) of the run, or its first and last."""
        rows = (line for row in self.summary for line in row.by_task.values())
        dates = sorted({line.finished_at[:10] for line in rows if line.finished_at})
        return "" if not dates else dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"


def titled(backbone: str, remark: str) -> str:
    """A backbone as headings name it."""
    return f"{backbone} ({remark})" if remark else backbone
