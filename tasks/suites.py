"""Which benchmarks exist, which suites they form, and how each one's headline number is read.

Reads `suites.yaml` and nothing else: importing this module imports neither lmms-eval nor torch.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from importlib.resources import files
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

__all__ = ["Suites", "TaskEntry", "check_limit", "entry", "load_suites", "suite"]


class TaskEntry(BaseModel):
    """How one task is scored; the fields are explained at the top of `suites.yaml`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    metric: str = Field(description="metric name in simple_evaluate's results; for a server's task, \"submission\"")
    filter: str = Field(default="none", description="filter name in simple_evaluate's results")
    scale: float | None = Field(default=1.0, gt=0, description="largest value of the headline; None: not known")
    higher_is_better: bool = True
    mean_of_documents: bool = True
    cluster_key: str | None = None
    pair: int = Field(default=1, ge=1)
    combine: Literal["mean", "weighted"] | None = None
    fixed_denominator: int | None = Field(default=None, ge=1)
    circular: int | None = Field(default=None, ge=2)
    target: str | None = None
    needs_submission: bool = False
    published: str = ""
    mirror_of: str | None = None
    guess: str = Field(default="", description="why the metric is a guess; never so in suites.yaml")
    about: str = ""

    @property
    def key(self) -> str:
        """The headline's key in `simple_evaluate()["results"][task]`, e.g. "anls,none"."""
        return f"{self.metric},{self.filter}"


class Suites(BaseModel):
    """The whole of `suites.yaml`, checked: every suite names tasks that have an entry, every mirror an original."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tasks: dict[str, TaskEntry]
    suites: dict[str, list[str]]

    @model_validator(mode="before")
    @classmethod
    def _inherit(cls, raw: Any) -> Any:
        tasks = {}
        for name, own in raw["tasks"].items():
            original = own.get("mirror_of")
            if original is not None and original not in raw["tasks"]:
                raise ValueError(f"{name} mirrors {original}, which has no entry")
            # What papers report is about the original.
            tasks[name] = {**raw["tasks"][original], "published": "", **own} if original else own
        return {**raw, "tasks": tasks}

    @field_validator("suites", mode="before")
    @classmethod
    def _flatten(cls, raw: Any) -> Any:
        # A YAML alias inside a list makes a list in a list.
        return {
            name: [task for item in items for task in (item if isinstance(item, list) else [item])]
            for name, items in raw.items()
        }

    @model_validator(mode="after")
    def _known(self) -> Suites:
        for name, tasks in self.suites.items():
            if missing := [t for t in tasks if t not in self.tasks]:
                raise ValueError(f"suite {name} names tasks without an entry: {', '.join(missing)}")
            if len(set(tasks)) != len(tasks):
                raise ValueError(f"suite {name} names a task twice")
        return self


@functools.cache
def load_suites() -> Suites:
    """The shipped `suites.yaml`."""
    text = files("visionselector_eval.tasks").joinpath("suites.yaml").read_text(encoding="utf-8")
    return Suites.model_validate(yaml.safe_load(text))


def suite(name: str) -> list[str]:
    """Task names of a suite, in its order. Raises `InputError` with the nearest name for an unknown one."""
    suites = load_suites().suites
    if name not in suites:
        raise _unknown("suite", name, suites)
    return list(suites[name])


def entry(task: str) -> TaskEntry:
    """The entry of a task that `suites.yaml` names; `InputError` with the nearest name otherwise.

    Other tasks of lmms-eval work too: `binding.bind` makes their entry from the upstream definition.
    """
    tasks = load_suites().tasks
    if task not in tasks:
        raise _unknown("task", task, tasks)
    return tasks[task]


def check_limit(task: str, limit: int | float | None, pair: int = 1) -> int | None:
    """`limit` as a whole number of documents, or None for all.

    Raises `InputError` for a fraction (lmms-eval would use the first task's count for all), for less than one, and
    for a limit that tears a pair of documents apart.
    """
    if limit is None:
        return None
    if isinstance(limit, bool) or not isinstance(limit, int | float) or limit != int(limit) or limit < 1:
        raise _wrong(f"limit {limit!r} for {task}: give a whole number of documents, 1 or more, e.g. 16")
    if int(limit) % pair:
        more = int(limit) + (-int(limit)) % pair
        raise _wrong(f"limit {int(limit)} for {task}: its documents are scored in groups of {pair}, try {more}")
    return int(limit)


# `baselines` imports torch: not before something is wrong.
def _unknown(kind: str, name: object, choices: Iterable[str]) -> Exception:
    from visionselector_eval.baselines.contract.errors import unknown

    return unknown(kind, name, choices)


def _wrong(message: str) -> Exception:
    from visionselector_eval.baselines.contract.errors import InputError

    return InputError(message)
