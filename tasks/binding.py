"""Binds a task name to lmms-eval's own task objects: documents, prompts, and scoring of stored answers.

Nothing of a benchmark is re-implemented here. A mirror differs from the real task in where its data is; both are
loaded, asked (`requests`) and scored (`score`) by upstream's code.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import json
import os
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from visionselector_eval.baselines.contract.errors import InputError, unknown
from visionselector_eval.models.requests import Messages, Request, request_of
from visionselector_eval.tasks import lmms
from visionselector_eval.tasks.headline import aggregates, chosen, headline
from visionselector_eval.tasks.local import hashing, layout, upstream
from visionselector_eval.tasks.module_state import module_state
from visionselector_eval.tasks.suites import TaskEntry, check_limit, load_suites

_ADDRESS = re.compile(r" ?<[\w.]+ object at 0x[0-9a-f]+>")


# Upstream's scoring touches process-wide things (standard streams, random state, module tables): one call at a time.
one_at_a_time = threading.RLock()


class DocumentError(InputError):
    """One document cannot be used (missing video, unreadable image); `task` and `doc_id` say which."""

    def __init__(self, task: str, doc_id: int, reason: str) -> None:
        super().__init__(f"document {doc_id} of {task}: {reason}")
        self.task, self.doc_id, self.reason = task, doc_id, reason

    def __reduce__(self) -> tuple[Any, ...]:  # errors travel between worker processes
        return type(self), (self.task, self.doc_id, self.reason)


@dataclass(frozen=True, eq=False)
class BoundTask:
    """A benchmark ready to be asked and scored.

    Attributes:
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
        return {name: count_documents(task, self.limit) for name, task in self.tasks.items()}


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
    """Load the task `name`: an embedded look-alike, or any task, group or tag of lmms-eval.

    Args:
        base_model: lmms-eval's name of the unmodified model, which chooses the prompt wording ("qwen2_5_vl").
        cache_dir: where mirrors are generated; see `tiny.store.default_cache_dir`.
        limit: ask only the first documents, for a group the first of each member; None for all.
        seed, documents: for a mirror only, other documents than those that sweeps ask.
        override: for a real task only, keys of its definition to replace (of each member's, for a group), such as where
            its data are.
        data_root: folder with the data of real tasks in the layout of `tasks.data`, used instead of the hub; mirrors do
            not look at it.
        metric: the headline, instead of the one of `suites.yaml` (for other tasks, of `headline.headline`).

    Raises:
        InputError: an unknown name or metric, a limit that is no whole number or splits pairs, data that can't be
            loaded, and data without documents; one line each.
    """
    known = load_suites().tasks.get(name)
    limit = check_limit(name, limit, known.pair if known else 1)
    if known is not None and known.mirror_of is not None:
        if override:
            raise InputError(
                f"{name} is an embedded look-alike: its data cannot be replaced, name {known.mirror_of} instead"
            )
        manager, found, data_hash = _load_mirror(name, base_model, cache_dir, seed, documents)
    else:
        if seed is not None or documents is not None:
            raise InputError(f"seed and documents choose the data of an embedded look-alike; {name} is not one")
        manager = lmms.task_manager(base_model)
        if name not in manager.task_index:
            raise _unknown_task(name, manager.all_tasks)
        if data_root is not None and override is None:
            found, data_hash = _load_local(manager, name, data_root)
        else:
            found, data_hash = _load_tasks(manager, name, override), ""
    for task_name, task in found.items():
        _check_task(task_name, task, limit, known)
    return BoundTask(
        name=name,
        tasks=found,
        task_manager=manager,
        entry=_entry(name, found, known, metric),
        data_hash=data_hash or _fingerprint(found),
        n_documents=sum(count_documents(task, limit) for task in found.values()),
        limit=limit,
        base_model=base_model,
        _state=module_state(found.values()),
    )


def requests(
    bound: BoundTask, protocol: str = "checkpoint", generation: Mapping[str, Any] | None = None
) -> list[Request]:
    """Every question of a bound task in upstream's order, by its own `build_all_requests`; no media are read.

    Their `messages()` read the media, so call it batch by batch: images are PIL images, videos are paths of files that
    exist. It raises `DocumentError` for media that are missing or can't be read (upstream would end the process for
    some tasks).

    Args:
        protocol: how the task is asked.
        generation: settings over those of the task and of the protocol.
    """
    made = []
    with one_at_a_time, lmms.quiet():
        for name, task in bound.tasks.items():
            try:
                task.build_all_requests(limit=bound.limit, rank=0, world_size=1)
            except KeyError as error:
                raise unread_error(task, name, error) from error
            for instance in task.instances:
                context, to_messages, settings, doc_id, _, split = instance.args
                made.append(
                    request_of(
                        name,
                        doc_id,
                        context,
                        partial(_messages, task, split, doc_id, to_messages),
                        settings,
                        protocol=protocol,
                        delimiter=task.config.fewshot_delimiter,
                        overrides=generation,
                    )
                )
    return made


def _messages(task: Any, split: str, doc_id: int, to_messages: Callable[[Any], Any]) -> Messages:
    name = task.config.task
    try:
        chat = lmms.lmms_eval().ChatMessages(messages=to_messages(task.dataset[split][doc_id]))
    except KeyError as error:
        raise unread_error(task, name, error) from error
    # SyntaxError is Pillow's for a broken PNG, AttributeError and TypeError upstream's for an image that is None.
    except (
        OSError,
        SyntaxError,
        SystemExit,
        AttributeError,
        TypeError,
        Image.DecompressionBombError,
    ) as error:
        raise DocumentError(name, doc_id, f"its media cannot be read ({_line(error)})") from error
    for video in chat.extract_media()[1]:
        if isinstance(video, str) and "://" not in video and not os.path.exists(video):
            raise DocumentError(name, doc_id, f"its video {video} does not exist")
    messages: Messages = chat.to_hf_messages()
    return messages


def _unknown_task(name: str, upstream: list[str]) -> InputError:
    ours = load_suites().tasks
    if not (close := difflib.get_close_matches(name, [*ours, *upstream], n=1, cutoff=0.6)):
        return unknown("task", name, ours)
    return InputError(
        f"unknown task '{name}': did you mean '{close[0]}'? available: {', '.join(sorted(ours))}, "
        f"and any of the {len(upstream)} tasks of lmms-eval"
    )


def _load_mirror(
    name: str, base_model: str, cache_dir: str | Path | None, seed: int | None, documents: int | None
) -> tuple[Any, dict[str, Any], str]:
    from visionselector_eval.tasks.tiny import EVALUATION_SEED, store

    seed = EVALUATION_SEED if seed is None else seed
    n = store.DOCUMENTS if documents is None else documents
    stored = store.ensure(name, seed=seed, n=n, cache_dir=cache_dir)
    manager = lmms.task_manager(base_model, store.write_bindings([name], seed=seed, n=n, cache_dir=cache_dir))
    with layout.no_use_reports():
        return manager, _load_tasks(manager, name), stored.content_hash


def _load_local(manager: Any, name: str, data_root: str | Path) -> tuple[dict[str, Any], str]:
    located = layout.locate(data_root, name)
    found: dict[str, Any] = {}
    with layout.no_use_reports():
        for task in located:
            found |= _load_tasks(manager, task.upstream.task, task.override())
    return found, hashing.content_hash(located)


def _load_tasks(manager: Any, name: str, override: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """lmms-eval `Task` objects of a task, group or tag, by name, as chat tasks.

    `override` replaces keys of the task file (of each member's, for a group), e.g. where the data is. Raises
    `InputError` with the cause in one line.
    """
    expected: str | dict[str, Any] = {"task": name, **copy.deepcopy(dict(override))} if override else name
    try:
        with one_at_a_time, lmms.quiet(), lmms.no_waiting_offline(), lmms.no_word_lists(name):
            return dict(_leaves(manager.load_task_or_group([expected], task_type="chat")))
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


def _check_task(task_name: str, task: Any, limit: int | None, known: TaskEntry | None) -> None:
    """Refuse a task that is not answered by generation, and data that its code can't use."""
    if task.OUTPUT_TYPE != "generate_until":
        raise InputError(
            f"{task_name} asks for {task.OUTPUT_TYPE}, and only answers written once (generate_until) can be "
            "compared here: choose a generative variant of the task"
        )
    if not len(task.eval_docs_no_media):
        raise InputError(f"{task_name} has no documents: its data set is empty")
    _check_documents(task_name, task, limit, known)


def _check_documents(name: str, task: Any, limit: int | None, entry: TaskEntry | None) -> None:
    """Before any question is asked: the columns that upstream's code will read are there, and pairs are whole."""
    present = task.eval_docs.column_names
    if (entry is None or entry.mirror_of is None) and (
        missing := [c for c in upstream.upstream(name).columns if c not in present]
    ):
        raise _lacks(name, missing[0], present)
    if entry is None or entry.pair == 1 or entry.cluster_key is None:
        return
    keys = list(task.eval_docs_no_media[entry.cluster_key])[: count_documents(task, limit)]
    if split := [(key, count) for key, count in Counter(keys).items() if count % entry.pair]:
        key, count = split[0]
        raise InputError(
            f"{name} scores documents with the same {entry.cluster_key} {entry.pair} at a time, and among "
            f"{f'the first {len(keys)}' if limit else f'its {len(keys)}'} there is {count} of {key!r}: "
            f"{'take another limit or none' if limit else 'its data are not complete'}"
        )


def _lacks(name: str, column: str, present: Iterable[str]) -> InputError:
    return InputError(f"{name}: its data lack the column {column!r} (present: {', '.join(sorted(present))})")


def unread_error(task: Any, name: str, error: KeyError) -> InputError:
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


def count_documents(task: Any, limit: int | None) -> int:
    total = len(task.eval_docs_no_media)
    return total if limit is None else min(limit, total)
