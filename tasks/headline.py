"""Which metric of a task outside `suites.yaml` is its headline: the aggregate that its definition states."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from visionselector_eval.baselines.errors import InputError, unknown
from visionselector_eval.tasks import data, host
from visionselector_eval.tasks.suites import load_suites

_AGGREGATES = frozenset({"average", "avg", "overall", "total", "mean", "all"})
_NO_SCORE = frozenset({"submission", "bypass"})


@dataclass(frozen=True)
class Headline:
    """The headline metric of a task.

    Attributes
    ----------
    metric: its name.
    others: metrics that are as plausible; empty where the definition states one or has only one.
    """

    metric: str
    others: tuple[str, ...] = ()

    def note(self) -> str:
        """What to say about a guess; empty where there is none."""
        if not self.others:
            return ""
        return f"headline {self.metric} is a guess, as plausible: {', '.join(self.others)}"


def headline(names: Iterable[str]) -> Headline:
    """The headline among the metrics of a task, in the order of its definition.

    The one whose name states an aggregate (average, overall, total, ...) where there is one; else the first, and the
    rest are as plausible. Files for a server are no score where there is another metric.
    """
    every = list(dict.fromkeys(names))
    scores = [name for name in every if name not in _NO_SCORE] or every
    stated = [name for name in scores if _AGGREGATES & set(re.split(r"[^a-z0-9]+", name.lower()))]
    first, *others = stated or scores
    return Headline(first, tuple(others))


def chosen(task: str, wanted: str, names: Iterable[str]) -> str:
    """`wanted`, a metric of the task's definition. Raises `InputError` with the nearest name for an unknown one."""
    every = list(names)
    if wanted not in every:
        raise unknown(f"metric of {task}", wanted, every)
    return wanted


def guesses(tasks: Sequence[str] = ()) -> tuple[int, dict[str, Headline]]:
    """How many tasks were read, and the headlines among them that are guesses, by task.

    Reads task files alone, no documents and no code of a task, so it covers every task that asks for an answer
    written once and names its data set; those of `suites.yaml` have a fixed headline.
    `tasks`: those (groups: their members) alone; all of lmms-eval where empty.
    """
    read = [of for name in tasks for of in data.members(name)] if tasks else _all()
    found = {}
    number = 0
    for of in read:
        names = [str(item["metric"]) for item in of.config.get("metric_list") or [] if isinstance(item, Mapping)]
        if of.config.get("output_type") != "generate_until" or not names or of.task in load_suites().tasks:
            continue
        number += 1
        if (made := headline(names)).others:
            found[of.task] = made
    return number, found


def _all() -> list[Any]:
    found = []
    for name, known in sorted(host.task_manager("").task_index.items()):
        if known["type"] != "task":
            continue
        try:
            found.append(data.upstream(name))
        except (InputError, OSError):  # a file without a data set or with a missing include: it can't be asked either
            continue
    return found
