"""Binds a task name to lmms-eval's own task objects: documents, prompts, and scoring of stored answers.

Nothing of a benchmark is re-implemented here. A mirror differs from the real task in where its data is; both are
loaded, asked (`requests`) and scored (`score`) by upstream's code.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import inspect
import json
import math
import os
import random
import re
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from PIL import Image

from visionselector_eval.baselines.errors import InputError, unknown
from visionselector_eval.models.generation import named_stops
from visionselector_eval.tasks import data, host
from visionselector_eval.tasks.headline import aggregates, chosen, headline
from visionselector_eval.tasks.suites import TaskEntry, check_limit, load_suites

__all__ = [
    "BoundTask",
    "DocRequest",
    "DocScore",
    "DocumentError",
    "TaskScore",
    "bind",
    "requests",
    "score",
]

_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f]")
_ADDRESS = re.compile(r" ?<[\w.]+ object at 0x[0-9a-f]+>")

# Upstream's scoring touches process-wide things (standard streams, random state, module tables): one call at a time.
_one_at_a_time = threading.RLock()


class DocumentError(InputError):
    """One document cannot be used (missing video, unreadable picture); `task` and `doc_id` say which."""

    def __init__(self, task: str, doc_id: int, reason: str) -> None:
        super().__init__(f"document {doc_id} of {task}: {reason}")
        self.task, self.doc_id, self.reason = task, doc_id, reason

    def __reduce__(self) -> tuple[Any, ...]:  # errors travel between worker processes
        return type(self), (self.task, self.doc_id, self.reason)


@dataclass(frozen=True, eq=False)
class BoundTask:
    """A benchmark ready to be asked and scored.

    Attributes
    ----------
    name: our name of it, e.g. "tiny_docvqa_val", "chartqa" or the group "mvbench".
    tasks: lmms-eval `Task` objects by name; a group has several, a single task one of the same name.
    task_manager: the lmms-eval `TaskManager` that loaded them.
    entry: how the headline number is read.
    data_hash: SHA-256 that names the documents, for the digest of a cell.
    n_documents: number of documents under `limit`, over all `tasks`.
    limit: documents per lmms-eval task, or None for all.
    base_model: the model whose prompts are used.
    """

    name: str
    tasks: dict[str, Any]
    task_manager: Any
    entry: TaskEntry
    data_hash: str
    n_documents: int
    limit: int | None
    base_model: str
    _state: list[tuple[dict[str, Any], dict[str, Any]]] = field(default_factory=list, repr=False)

    def counts(self) -> dict[str, int]:
        """Documents under the limit, by lmms-eval task name."""
        return {name: _count(task, self.limit) for name, task in self.tasks.items()}


@dataclass(frozen=True, eq=False)
class DocRequest:
    """One question as upstream asks it.

    Attributes
    ----------
    task, doc_id: lmms-eval task name and position of the document, the key of its answer.
    context: the question's text with upstream's prompt (no media), for pictures and logs.
    generation: generation settings of the task, without `until`; may lack `max_new_tokens` (textvqa_val gives none).
    until: strings at which the answer ends, as the task itself names them; may be empty.
    """

    task: str
    doc_id: int
    context: str
    generation: dict[str, Any]
    until: tuple[str, ...]
    _build: Callable[[], list[dict[str, Any]]] = field(repr=False)

    def messages(self) -> Any:
        """The conversation as `lmms_eval.protocol.ChatMessages`; media are read now, so call it batch by batch.

        Pictures are PIL images, videos are paths of files that exist. Raises `DocumentError` for media that are
        missing or cannot be read (upstream would end the process for some tasks).
        """
        try:
            chat = host.lmms_eval().ChatMessages(messages=self._build())
        # SyntaxError is Pillow's for a broken PNG, AttributeError and TypeError upstream's for a picture that is None.
        except (
            OSError,
            SyntaxError,
            SystemExit,
            AttributeError,
            TypeError,
            Image.DecompressionBombError,
        ) as error:
            raise DocumentError(self.task, self.doc_id, f"its media cannot be read ({_line(error)})") from error
        for video in chat.extract_media()[1]:
            if isinstance(video, str) and "://" not in video and not os.path.exists(video):
                raise DocumentError(self.task, self.doc_id, f"its video {video} does not exist")
        return chat


@dataclass(frozen=True)
class DocScore:
    """One scored document.

    `score` is in units of the headline where `entry.mean_of_documents` (so 0 or 100 for a percentage), else what
    upstream notes for the document (0..1), and None where the headline metric says nothing about it (cognition
    questions of MME). `cluster` names the picture or video that documents share. `doc_hash` is the SHA-256 of the
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

    Attributes
    ----------
    task: our task name.
    metric: key of the headline, "metric,filter".
    score: the headline, at most `entry.scale`; None where only the benchmark's server has the right answers.
    metrics: all numeric metrics by "metric,filter", standard errors left out; "task/metric,filter" for members of
        a group.
    documents: every document, by task and `doc_id`.
    mean_of_documents: whether the mean of the documents' scores (of those that have one) equals `score` for these very
        answers. It can be False where the entry says True: MVBench leaves empty answers out of its mean.
    submissions: files that upstream wrote for a benchmark's server, below `output_path`.
    needs_submission: the benchmark's server makes the score from `submissions`; `score` and the documents' are None.
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


def bind(
    name: str,
    *,
    base_model: str = "qwen2_5_vl",
    cache_dir: str | Path | None = None,
    limit: int | None = None,
    seed: int | None = None,
    documents: int | None = None,
    override: Mapping[str, Any] | None = None,
    data_root: str | Path | None = None,
    metric: str | None = None,
) -> BoundTask:
    """Load the task `name`: an embedded mirror, or any task, group or tag of lmms-eval.

    Parameters
    ----------
    base_model: lmms-eval's name of the unmodified model, which chooses the prompt wording (e.g. "qwen2_5_vl",
        "qwen3_vl").
    cache_dir: where mirrors are generated; see `tiny.store.default_cache_dir`. Real tasks use the Hugging Face caches.
    limit: ask only the first documents, for a group the first of each member; None for all.
    seed, documents: for a mirror only, other documents than those that sweeps ask.
    override: for a real task only, keys of its definition to replace (of each member's, for a group), such as where the
        data
        is: {"dataset_path": "parquet", "dataset_name": None, "dataset_kwargs": {"data_files": {"test": path}}}.
    data_root: folder with the data of real tasks in the layout of `tasks.data`, used instead of the hub; mirrors do
        not look at it.
    metric: the headline, a metric of the task's definition, instead of the one of `suites.yaml` or, for a task that
        is not there, of `headline.headline`.

    Raises `InputError`, one line each, for an unknown name or metric, a limit that is no whole number or tears pairs
    apart, data that cannot be loaded, and data without documents.
    """
    known = load_suites().tasks.get(name)
    limit = check_limit(name, limit, known.pair if known else 1)
    if known is not None and known.mirror_of is not None:
        if override:
            raise InputError(
                f"{name} is an embedded mirror: its data cannot be replaced, name {known.mirror_of} instead"
            )
        manager, found, data_hash = _load_mirror(name, base_model, cache_dir, seed, documents)
    else:
        if seed is not None or documents is not None:
            raise InputError(f"seed and documents choose the data of an embedded mirror; {name} is not one")
        manager = host.task_manager(base_model)
        if name not in manager.task_index:
            raise _unknown_task(name, manager.all_tasks)
        if data_root is not None and override is None:
            found, data_hash = _load_local(manager, name, data_root)
        else:
            found, data_hash = _load_tasks(manager, name, override), ""
    for task_name, task in found.items():
        if task.OUTPUT_TYPE != "generate_until":
            raise InputError(
                f"{task_name} asks for {task.OUTPUT_TYPE}, and only answers written once (generate_until) can be "
                "compared here: choose a generative variant of the task"
            )
        if not len(task.eval_docs_no_media):
            raise InputError(f"{task_name} has no documents: its data set is empty")
        _check_documents(task_name, task, limit, known)
    return BoundTask(
        name=name,
        tasks=found,
        task_manager=manager,
        entry=_entry(name, found, known, metric),
        data_hash=data_hash or _fingerprint(found),
        n_documents=sum(_count(task, limit) for task in found.values()),
        limit=limit,
        base_model=base_model,
        _state=_module_state(found.values()),
    )


def requests(bound: BoundTask) -> list[DocRequest]:
    """Every question of a bound task in upstream's order, built by the task's own `build_all_requests`; no media
    are read."""
    made = []
    with _one_at_a_time, host.quiet():
        for name, task in bound.tasks.items():
            try:
                task.build_all_requests(limit=bound.limit, rank=0, world_size=1)
            except KeyError as error:
                raise _unread(task, name, error) from error
            for instance in task.instances:
                context, to_messages, generation, doc_id, _, split = instance.args
                settings = dict(generation)
                until = named_stops(settings.pop("until", None), task.config.fewshot_delimiter)
                made.append(
                    DocRequest(
                        task=name,
                        doc_id=doc_id,
                        context=context,
                        generation=settings,
                        until=until,
                        _build=partial(_build, task, split, doc_id, to_messages),
                    )
                )
    return made


def _build(task: Any, split: str, doc_id: int, to_messages: Callable[[Any], Any]) -> Any:
    try:
        return to_messages(task.dataset[split][doc_id])
    except KeyError as error:
        raise _unread(task, task.config.task, error) from error


def score(
    bound: BoundTask, responses: Mapping[str, Mapping[int, str]], output_path: str | Path | None = None
) -> TaskScore:
    """Score stored answers with lmms-eval's own evaluator.

    Parameters
    ----------
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
    with _one_at_a_time, ExitStack() as stack:
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


def _unknown_task(name: str, upstream: list[str]) -> InputError:
    ours = load_suites().tasks
    if not (close := difflib.get_close_matches(name, [*ours, *upstream], n=1, cutoff=0.6)):
        return unknown("task", name, ours)
    return InputError(
        f"unknown task '{name}': did you mean '{close[0]}'? available: {', '.join(sorted(ours))}, "
        f"and any of the {len(upstream)} tasks of lmms-eval"
    )


# --- loading ---------------------------------------------------------------------------------------------------------


def _load_mirror(
    name: str, base_model: str, cache_dir: str | Path | None, seed: int | None, documents: int | None
) -> tuple[Any, dict[str, Any], str]:
    from visionselector_eval.tasks.tiny import EVALUATION_SEED, store

    seed = EVALUATION_SEED if seed is None else seed
    n = store.DOCUMENTS if documents is None else documents
    stored = store.ensure(name, seed=seed, n=n, cache_dir=cache_dir)
    manager = host.task_manager(base_model, store.write_bindings([name], seed=seed, n=n, cache_dir=cache_dir))
    import datasets

    # A packaged loader reports its use to a server; without a network that costs up to 3 s a task.
    counting = datasets.config.HF_UPDATE_DOWNLOAD_COUNTS
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    try:
        return manager, _load_tasks(manager, name), stored.content_hash
    finally:
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = counting


def _load_local(manager: Any, name: str, data_root: str | Path) -> tuple[dict[str, Any], str]:
    located = data.locate(data_root, name)
    found: dict[str, Any] = {}
    with data.no_use_reports():
        for task in located:
            found |= _load_tasks(manager, task.upstream.task, task.override())
    return found, data.content_hash(located)


def _load_tasks(manager: Any, name: str, override: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """lmms-eval `Task` objects of a task, group or tag, by name, as chat tasks.

    `override` replaces keys of the task file (of each member's, for a group), e.g. where the data is. Raises
    `InputError` with the cause in one line.
    """
    wanted: str | dict[str, Any] = {"task": name, **copy.deepcopy(dict(override))} if override else name
    try:
        with _one_at_a_time, host.quiet(), host.no_waiting_offline(), host.no_word_lists(name):
            return dict(_leaves(manager.load_task_or_group([wanted], task_type="chat")))
    except (Exception, SystemExit) as error:
        cause = _cause(error)
        if isinstance(cause, ImportError):
            package = cause.name or _line(cause)
            raise InputError(
                f"task {name} needs the package {package}, which cannot be imported: install it"
            ) from error
        if isinstance(cause, IndexError) or "corresponds to no data" in str(cause):
            raise InputError(f"task {name} has no documents: its data set is empty ({_line(cause)})") from error
        if isinstance(cause, KeyError):
            raise InputError(f"task {name}: its data lack the column or split {_line(cause)}") from error
        if override:
            raise InputError(
                f"task {name}: cannot load the given data ({type(cause).__name__}: {_line(cause)}): "
                "are they in the layout that the task reads?"
            ) from error
        raise InputError(
            f"task {name}: cannot load its data set {_source(manager, name)} ({type(cause).__name__}: {_line(cause)}): "
            "is the hub reachable, or the data set in the local cache? The tiny suite needs neither"
        ) from error


def _check_documents(name: str, task: Any, limit: int | None, entry: TaskEntry | None) -> None:
    """Before any question is asked: the columns that upstream's code will read are there, and pairs are whole."""
    present = task.eval_docs.column_names
    if (entry is None or entry.mirror_of is None) and (
        missing := [c for c in data.upstream(name).columns if c not in present]
    ):
        raise _lacks(name, missing[0], present)
    if entry is None or entry.pair == 1 or entry.cluster_key is None:
        return
    keys = list(task.eval_docs_no_media[entry.cluster_key])[: _count(task, limit)]
    if torn := [(key, count) for key, count in Counter(keys).items() if count % entry.pair]:
        key, count = torn[0]
        raise InputError(
            f"{name} scores documents with the same {entry.cluster_key} {entry.pair} at a time, and among "
            f"{f'the first {len(keys)}' if limit else f'its {len(keys)}'} there is {count} of {key!r}: "
            f"{'take another limit or none' if limit else 'its data are not complete'}"
        )


def _lacks(name: str, column: str, present: Iterable[str]) -> InputError:
    return InputError(f"{name}: its data lack the column {column!r} (present: {', '.join(sorted(present))})")


def _unread(task: Any, name: str, error: KeyError) -> InputError:
    """What a `KeyError` of upstream's code is about: a column that is not there, or a value that it does not know."""
    key, present = str(error.args[0]) if error.args else "", task.eval_docs.column_names
    if key.isidentifier() and key not in present:
        return _lacks(name, key, present)
    return InputError(f"{name}: upstream's code does not know {key!r}, which a document holds")


def _leaves(loaded: Mapping[Any, Any]) -> Iterable[tuple[str, Any]]:
    for key, value in loaded.items():
        if isinstance(value, Mapping):
            yield from _leaves(value)
        else:
            task = value[1] if isinstance(value, tuple) else value
            # A task loaded through an override has lost its name, by which the evaluator files its results.
            if task.config.task is None:
                task.set_config("task", key)
            yield task.config.task, task


def _cause(error: BaseException) -> BaseException:
    attempt = getattr(error, "last_attempt", None)  # tenacity.RetryError hides what went wrong
    inner = attempt.exception() if attempt is not None else None
    return _cause(inner) if inner is not None else error


def _line(error: BaseException) -> str:
    # Addresses say nothing to people, and two runs would not note the same.
    text = " ".join(_ADDRESS.sub("", str(error)).split()) or type(error).__name__
    return text if len(text) <= 200 else text[:197] + "..."


def _source(manager: Any, name: str) -> str:
    from lmms_eval.utils import load_yaml_config

    try:
        known = manager.task_index[name]
        config = known if known["type"] == "tag" else load_yaml_config(known["yaml_path"], mode="simple")
        if "dataset_path" not in config:  # a group or a tag
            return _source(manager, config["task"][0])
        return repr(config["dataset_path"])
    except Exception:  # only the wording of a message depends on it
        return ""


def _entry(name: str, tasks: Mapping[str, Any], known: TaskEntry | None, metric: str | None) -> TaskEntry:
    if known is None or (metric is not None and metric != known.metric):
        derived = _derive(name, tasks, metric)
        # How documents belong together does not hang on what is counted.
        kept = {"cluster_key": known.cluster_key, "pair": known.pair, "target": known.target} if known else {}
        return derived.model_copy(update=kept)
    return known


def _derive(name: str, tasks: Mapping[str, Any], metric: str | None = None) -> TaskEntry:
    """The entry of a task from its definition: the metric given or the aggregate that it states, its first filter."""
    first = next(iter(tasks.values()))
    names = list(first.aggregation())
    of_group = aggregates(name) if len(tasks) > 1 else []
    made = headline(names, of_group)
    note = "" if metric else made.note()
    metric = chosen(name, metric, names) if metric else made.metric
    stated = next((item for item in of_group if item.metric == metric), None)
    if stated is not None and not stated.is_mean:
        note = "; ".join(filter(None, [note, f"the group's own {metric} is made by other rules than a mean"]))
    return TaskEntry(
        metric=metric,
        filter=first._filters[0].name,
        scale=None,
        higher_is_better=bool(first.higher_is_better().get(metric, True)),
        needs_submission=metric == "submission",
        mean_of_documents=True,  # checked for each set of answers
        cluster_key=first.config.cluster_key,
        combine=None if len(tasks) == 1 else "weighted" if stated is not None and stated.weighted else "mean",
        guess=note,
        about=f"{name} of lmms-eval (headline from its definition)",
    )


def _fingerprint(tasks: Mapping[str, Any]) -> str:
    """SHA-256 over name, length and fingerprint of each task's documents.

    The fingerprint that the datasets library gives a data set from the hub covers its revision and every step
    applied to it.
    """
    names = [[name, len(task.eval_docs_no_media), task.eval_docs._fingerprint] for name, task in sorted(tasks.items())]
    return hashlib.sha256(json.dumps(names).encode()).hexdigest()


def _count(task: Any, limit: int | None) -> int:
    total = len(task.eval_docs_no_media)
    return total if limit is None else min(limit, total)


# --- scoring ---------------------------------------------------------------------------------------------------------


def _replay(responses: Mapping[str, Mapping[int, str]]) -> Any:
    """A chat model for lmms-eval that returns stored answers."""

    class Replay(host.lmms_eval().lmms):  # type: ignore[misc]
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
    _restore(bound._state)
    python_state, numpy_state = random.getstate(), np.random.get_state()
    try:
        with host.quiet() as said, host.no_judge():
            try:
                return host.lmms_eval().simple_evaluate(
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
                raise _unread(next(iter(bound.tasks.values())), bound.name, error) from error
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
                    found[prefix + key] = points / _count(bound.tasks[name], bound.limit)
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
    sizes = [_count(task, bound.limit) if entry.combine == "weighted" else 1 for task in bound.tasks.values()]
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
    with host.quiet(), host.no_judge():
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
            with host.quiet():
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


# --- module tables ---------------------------------------------------------------------------------------------------


def _module_state(tasks: Iterable[Any]) -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """Plain tables (dict, list, set) in the modules of the tasks' scoring functions, with a copy of what they hold now.

    Some upstream modules count in such a table and never clear it (ocrbench), so that a second scoring in one
    process would start from the sums of the first.
    """
    modules: dict[int, dict[str, Any]] = {}
    for task in tasks:
        for function in (task.config.process_results, *task.aggregation().values()):
            module = getattr(function, "__globals__", {})
            if str(module.get("__file__", "")).startswith(str(host.lmms_eval().tasks_folder)):
                modules[id(module)] = module
    return [
        (
            module,
            {
                name: copy.deepcopy(value)
                for name, value in module.items()
                if not name.startswith("__") and isinstance(value, dict | list | set) and _plain(value)
            },
        )
        for module in modules.values()
    ]


def _plain(value: Any) -> bool:
    if isinstance(value, dict):
        return all(_plain(v) for v in value.values())
    if isinstance(value, list | set | tuple):
        return all(_plain(v) for v in value)
    return value is None or isinstance(value, str | int | float)


def _restore(state: list[tuple[dict[str, Any], dict[str, Any]]]) -> None:
    for module, tables in state:
        for name, saved in tables.items():
            if module.get(name) == saved:
                continue
            current, fresh = module.get(name), copy.deepcopy(saved)
            # In place where possible: other functions of the module hold the same object.
            if isinstance(current, list) and isinstance(fresh, list):
                current[:] = fresh
            elif isinstance(current, dict | set) and type(current) is type(fresh):
                current.clear()
                current.update(fresh)
            else:
                module[name] = fresh
