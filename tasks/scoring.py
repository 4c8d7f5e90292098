"""Scores stored answers with lmms-eval's own evaluator, and reads the headline and each document's score."""

from __future__ import annotations

import hashlib
import inspect
import json
import math
import random
import re
import tempfile
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from visionselector_eval.baselines.contract.errors import InputError
from visionselector_eval.tasks import lmms
from visionselector_eval.tasks.binding import BoundTask, count_documents, one_at_a_time, unread_error
from visionselector_eval.tasks.module_state import restore
from visionselector_eval.tasks.suites import TaskEntry

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f]")


@dataclass(frozen=True)
class DocScore:
    """One scored document.

    `score` is in units of the headline where `entry.mean_of_documents` (so 0 or 100 for a percentage), else what
    upstream notes for the document (0..1), and None where the headline metric says nothing about it (cognition
    questions of MME). `cluster` names the image or video that documents share. `doc_hash` is the SHA-256 of the
    columns without media.
    """

    task: str
    doc_id: int
    answer: str
    target: str
    score: float | None
    cluster: str
    doc_hash: str


@dataclass(frozen=True)
class TaskScore:
    """What upstream's evaluator says about a set of answers.

    Attributes:
        task: our task name.
        metric: key of the headline, "metric,filter".
        score: the headline, at most `entry.scale`; None where only the benchmark's server has the right answers.
        metrics: all numeric metrics by "metric,filter", standard errors left out; "task/metric,filter" for members of a
            group.
        documents: every document, by task and `doc_id`.
        mean_of_documents: whether the mean of the documents' scores (of those that have one) equals `score` for these
            very answers. It can be False where the entry says True: MVBench leaves empty answers out of its mean.
        submissions: files that upstream wrote for a benchmark's server, below `output_path`.
        needs_submission: the benchmark's server makes the score from `submissions`; `score` and the documents' are
            None.
    """

    task: str
    metric: str
    score: float | None
    metrics: dict[str, float]
    documents: list[DocScore]
    mean_of_documents: bool
    submissions: list[Path] = field(default_factory=list)
    needs_submission: bool = False

    @property
    def n_documents(self) -> int:
        """Number of documents scored."""
        return len(self.documents)


def score(
    bound: BoundTask, responses: Mapping[str, Mapping[int, str]], output_path: str | Path | None = None
) -> TaskScore:
    """Score stored answers with lmms-eval's own evaluator.

    Args:
        responses: answer text by lmms-eval task name and `doc_id`, one for every document of `requests(bound)`.
        output_path: folder for the submission files that some tasks write; None throws them away.

        The same answers give the same scores in any process and order: random fallbacks of upstream's parsers are
            seeded, its module tables reset, and the caller's random state is left as it was. Raises `InputError` for a
            missing answer and for answers that leave the headline metric undefined.
    """
    for name, count in bound.counts().items():
        given = responses.get(name, {})
        if missing := [i for i in range(count) if i not in given]:
            raise InputError(
                f"{name}: {len(missing)} of {count} answers are missing, the first is document {missing[0]}"
            )
    with one_at_a_time, ExitStack() as stack:
        if output_path is None:
            output_path = stack.enter_context(tempfile.TemporaryDirectory())
            keep = False
        else:
            Path(output_path).mkdir(parents=True, exist_ok=True)
            keep = True
        before = _files(output_path) if keep else {}
        results = _evaluate(bound, responses, output_path)
        written = sorted(p for p, stamp in _files(output_path).items() if before.get(p) != stamp) if keep else []
    if keep and bound.entry.needs_submission and not written:
        raise InputError(f"{bound.name}: upstream's code wrote no submission file for these answers")
    metrics = _metrics(bound, results)
    documents = [d for n in bound.tasks for d in _documents(bound, n, results["samples"][n], responses[n])]
    headline = _headline(bound, metrics)
    return TaskScore(
        task=bound.name,
        metric=bound.entry.key,
        score=headline,
        metrics=metrics,
        documents=documents,
        mean_of_documents=headline is not None and _is_mean(documents, headline, bound.entry),
        submissions=written,
        needs_submission=bound.entry.needs_submission,
    )


def _files(folder: str | Path) -> dict[Path, tuple[int, int]]:
    # With time and size: an earlier scoring of the same cell may have left files of the same names.
    stamps = ((p, p.stat()) for p in Path(folder).rglob("*") if p.is_file())
    return {p: (stamp.st_mtime_ns, stamp.st_size) for p, stamp in stamps}


def _replay(responses: Mapping[str, Mapping[int, str]]) -> Any:
    """A chat model for lmms-eval that returns stored answers."""

    class Replay(lmms.lmms_eval().lmms):  # type: ignore[misc]
        is_simple = False
        accelerator = None  # present, so that the evaluator does not start one

        def generate_until(self, requests: list[Any]) -> list[str]:
            return [responses[task][doc_id] for _, _, _, doc_id, task, _ in (r.args for r in requests)]

        def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
            raise NotImplementedError

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            raise NotImplementedError

        def clean(self) -> None:
            """Nothing to free."""

    return Replay()


def _evaluate(bound: BoundTask, responses: Mapping[str, Mapping[int, str]], output_path: str | Path) -> dict[str, Any]:
    if "mmbench" in bound.name:  # it writes answers to a worksheet, which refuses control characters
        responses = {
            task: {i: _CONTROL.sub(" ", text) for i, text in given.items()} for task, given in responses.items()
        }
    restore(bound._state)
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with lmms.quiet() as said, lmms.no_judge():
            try:
                return lmms.lmms_eval().simple_evaluate(
                    model=_replay(responses),
                    tasks=list(bound.tasks.values()),
                    task_manager=bound.task_manager,
                    limit=bound.limit,
                    bootstrap_iters=0,
                    log_samples=True,
                    process_docs_parallel=1,  # threads would share, and so reorder, the random fallbacks
                    random_seed=0,
                    numpy_random_seed=1234,
                    torch_random_seed=None,  # nothing in scoring draws from torch; leave the caller's generator alone
                    cli_args=SimpleNamespace(output_path=str(output_path), process_with_media=False),
                )
            except KeyError as error:
                raise unread_error(next(iter(bound.tasks.values())), bound.name, error) from error
            except SystemExit as error:
                raise RuntimeError(
                    f"{bound.name}: upstream's scoring ended the process: {error}; {said.getvalue()}"
                ) from error
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def _metrics(bound: BoundTask, results: Mapping[str, Any]) -> dict[str, float]:
    found = {}
    for name in bound.tasks:
        prefix = f"{name}/" if len(bound.tasks) > 1 else ""
        for key, value in results["results"][name].items():
            if "," not in key or "_stderr" in key:
                continue
            if isinstance(value, int | float | np.number) and not isinstance(value, bool):
                found[prefix + key] = float(value)
                if key == bound.entry.key and bound.entry.fixed_denominator:
                    points = round(found[prefix + key] * bound.entry.fixed_denominator, 6)
                    found[prefix + key] = points / count_documents(bound.tasks[name], bound.limit)
    return found


def _headline(bound: BoundTask, metrics: Mapping[str, float]) -> float | None:
    entry = bound.entry
    if entry.needs_submission:
        return None
    keys = [entry.key] if len(bound.tasks) == 1 else [f"{name}/{entry.key}" for name in bound.tasks]
    if missing := [key for key in keys if key not in metrics or math.isnan(metrics[key])]:
        raise InputError(
            f"{bound.name}: {missing[0]} has no value for these {bound.n_documents} documents "
            f"(present: {', '.join(metrics) or 'none'}); ask more documents"
        )
    sizes = [count_documents(task, bound.limit) if entry.combine == "weighted" else 1 for task in bound.tasks.values()]
    return sum(metrics[key] * size for key, size in zip(keys, sizes, strict=True)) / sum(sizes)


def _documents(
    bound: BoundTask, name: str, samples: list[dict[str, Any]], responses: Mapping[int, str]
) -> Iterable[DocScore]:
    task, entry = bound.tasks[name], bound.entry
    # Upstream logs all documents once for each filter, filter by filter.
    filters = [f.name for f in task._filters]
    size = len(samples) // len(filters)
    start = filters.index(entry.filter) * size if entry.filter in filters else 0
    aggregate = task.aggregation().get(entry.metric)
    samples = samples[start : start + size]
    numbers: list[float | None]
    if entry.needs_submission:
        numbers = [None] * size
    elif entry.circular and aggregate is not None:
        numbers = _circular(samples, aggregate, entry)
    else:
        numbers = [_number(sample.get(entry.metric), task, aggregate, entry) for sample in samples]
    for sample, number in zip(samples, numbers, strict=True):
        doc = sample["doc"]
        doc_id = sample["doc_id"]
        cluster = doc.get(entry.cluster_key) if entry.cluster_key else None
        yield DocScore(
            task=name,
            doc_id=doc_id,
            answer=responses[doc_id],
            target=""
            if entry.needs_submission
            else _target(doc.get(entry.target) if entry.target else sample["target"]),
            score=number,
            cluster=str(doc_id if cluster is None else cluster % entry.circular if entry.circular else cluster),
            doc_hash=hashlib.sha256(json.dumps(doc, sort_keys=True, default=str).encode()).hexdigest(),
        )


def _circular(samples: list[dict[str, Any]], aggregate: Callable[..., Any], entry: TaskEntry) -> list[float | None]:
    """MMBench's score of each question, at the first of its forms, by upstream's rule: right in all forms."""
    assert entry.circular is not None
    assert entry.cluster_key is not None
    firsts = [str(sample["doc"][entry.cluster_key] % entry.circular) for sample in samples]
    # Upstream tells means by category only: let each question be a category.
    values = [{**sample[entry.metric], "category": first} for sample, first in zip(samples, firsts, strict=True)]
    with lmms.quiet(), lmms.no_judge():
        _, means, _ = aggregate.__globals__["mmbench_evaluator"].eval_result(values, eval_method="static")
    unit = entry.scale or 1.0
    return [
        float(means[first]) * unit if sample["doc"][entry.cluster_key] < entry.circular else None
        for sample, first in zip(samples, firsts, strict=True)
    ]


def _target(target: Any) -> str:
    """One right answer as text: of several, the one given most often."""
    if isinstance(target, Mapping):  # VQAv2's people say how sure they are
        return _target(target.get("answer", target))
    if isinstance(target, list | tuple):
        target = [_target(t) for t in target]
        return str(Counter(map(str, target)).most_common(1)[0][0]) if target else ""
    return str(target)


def _number(value: Any, task: Any, aggregate: Callable[..., Any] | None, entry: TaskEntry) -> float | None:
    """The score of one document in what upstream's `process_results` gave for the headline metric."""
    unit = entry.scale if entry.mean_of_documents and entry.scale else 1.0
    if isinstance(value, Mapping):
        inner = value.get(task.config.score_key or "score")
        if isinstance(inner, int | float):
            return float(inner) * unit
        if entry.mean_of_documents and aggregate is not None and "args" not in inspect.signature(aggregate).parameters:
            # Only prediction and truth are noted (seedbench, mmmu): the aggregate of one document is its score.
            with lmms.quiet():
                return float(aggregate([value]))
        return None
    if isinstance(value, int | float | np.number):
        return float(value) * unit
    return None


def _is_mean(documents: list[DocScore], headline: float, entry: TaskEntry) -> bool:
    scores = [d.score for d in documents if d.score is not None]
    if not entry.mean_of_documents or not scores:
        return False
    # mmmu rounds its result to five decimals.
    return math.isclose(sum(scores) / len(scores), headline, rel_tol=0, abs_tol=2e-5 * (entry.scale or 1.0))
