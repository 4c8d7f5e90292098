"""Which metric of a task outside `suites.yaml` is its headline: the aggregate that its definition states."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from visionselector_eval.baselines.contract.errors import InputError, unknown
from visionselector_eval.tasks import lmms
from visionselector_eval.tasks.local import upstream
from visionselector_eval.tasks.suites import load_suites

_AGGREGATES = frozenset({"average", "avg", "overall", "total", "mean", "all"})
_NO_SCORE = frozenset({"submission", "bypass"})


@dataclass(frozen=True)
class Aggregate:
    """One number of a group of tasks, as the group's file states it.

    Attributes:
        metric: the members' metric that it is made of.
        weighted: whether a member counts by its number of documents, not as one.
        is_mean: whether it is a mean; else code of upstream makes it.
    """

    metric: str
    weighted: bool
    is_mean: bool


@dataclass(frozen=True)
class Headline:
    """The headline metric of a task.

    Attributes:
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


def headline(names: Iterable[str], aggregates: Sequence[Aggregate] = ()) -> Headline:
    """The headline among the metrics of a task, in the order of its definition.

    `aggregates`: what the file of a group says, for a group: its first metric that the members have is the headline.
    Else the one whose name states an aggregate (average, overall, total, ...) where there is one; else the first, and
    the rest are as plausible. Files for a server are no score where there is another metric.
    """
    every = list(dict.fromkeys(names))
    scores = [name for name in every if name not in _NO_SCORE] or every
    of_group = [made.metric for made in aggregates if made.metric in scores]
    stated = [name for name in of_group or scores if _AGGREGATES & set(re.split(r"[^a-z0-9]+", name.lower()))]
    first, *others = stated or of_group or scores
    return Headline(first, tuple(others))


def aggregates(name: str) -> list[Aggregate]:
    """What the file of the group `name` of lmms-eval says about the group's own numbers; empty for any other task."""
    listed = upstream.group_file(name).get("aggregate_metric_list") or []
    return [
        Aggregate(
            metric=str(item["metric"]),
            weighted=bool(item.get("weight_by_size", False)),
            is_mean=item.get("aggregation", "mean") == "mean",
        )
        for item in ([listed] if isinstance(listed, Mapping) else listed)
    ]


def chosen(task: str, wanted: str, names: Iterable[str]) -> str:
    """`wanted`, a metric of the task's definition. Raises `InputError` with the nearest name for an unknown one."""
    every = list(names)
    if wanted not in every:
        raise unknown(f"metric of {task}", wanted, every)
    return wanted


def guesses(tasks: Sequence[str] = ()) -> tuple[int, dict[str, Headline]]:
    """How many tasks were read, and the headlines among them that are guesses, by task.

    Reads task files alone, no documents and no code of a task, so it covers every task that asks for an answer
    written once and names its data set, and every group of them whose file states numbers of its own; those of
    `suites.yaml` have a fixed headline.
    `tasks`: those (groups: their members, too) alone; all of lmms-eval where empty.
    """
    found = {}
    number = 0
    for name, names, of_group in _metrics(tasks):
        number += 1
        if (made := headline(names, of_group)).others:
            found[name] = made
    return number, found


def _metrics(tasks: Sequence[str]) -> Iterator[tuple[str, list[str], list[Aggregate]]]:
    """Name, metrics and the group's own numbers of each task that `guesses` reads."""
    seen = set()
    for name in tasks or sorted(lmms.task_manager("").task_index):
        try:
            members = upstream.members(name)
            of_group = aggregates(name)
        except (InputError, OSError):  # a file without a data set or with a missing include: it can't be asked either
            if tasks:
                raise
            continue
        asked = [of for of in members if of.config.get("output_type") == "generate_until" and _listed(of)]
        for of in asked:
            if of.task not in seen:
                seen.add(of.task)
                yield of.task, _listed(of), []
        if of_group and asked and name not in load_suites().tasks:
            yield name, _listed(asked[0]), of_group


def _listed(of: upstream.Upstream) -> list[str]:
    if of.task in load_suites().tasks:
        return []
    return [str(item["metric"]) for item in of.config.get("metric_list") or [] if isinstance(item, Mapping)]
