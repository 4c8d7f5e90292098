"""Answer the documents of one unit: one backbone, one task, any number of (compressor, options, budget) cells.

One loaded model, one image decode and one vision pass serve all cells of a unit. Nothing here writes
a file: answers leave as events, in batches, and the driver stores them. So a unit can run here or on a worker.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING, Any

import torch

from visionselector_eval.baselines import Budget, Compressor, build
from visionselector_eval.baselines.contract.errors import InputError, one_line
from visionselector_eval.models.answering import Answer, Answerer, CompressorAtBudget, PreparedBatch, Request
from visionselector_eval.models.generation import generation_arguments
from visionselector_eval.models.inputs import MediaSettings, UnsupportedMediaError
from visionselector_eval.models.loading import load_backbone
from visionselector_eval.models.tiny import thread_limit
from visionselector_eval.tasks import binding

if TYPE_CHECKING:
    from visionselector_eval.models.backbones.base import Backbone

log = logging.getLogger(__name__)

Document = tuple[str, int]  # lmms-eval task name and document number


@dataclass(frozen=True)
class PendingCell:
    """What is left to do of one cell: plain data, so that it travels to a worker."""

    digest: str
    method: str
    options: Mapping[str, Any]
    budget: Budget
    seed: int = 0
    done: frozenset[Document] = frozenset()


@dataclass(frozen=True)
class WorkUnit:
    """Cells that share a backbone, a task and pixel settings; plain data.

    Attributes:
        pretrained, revision, device, dtype, attn_implementation: as for `load_backbone`.
        media: fields of `MediaSettings`.
        protocol: the one that says how a task is asked.
        task, base_model, limit: as for `tasks.binding.bind`.
        generation: over the task's own generation settings.
        batch_size: documents at once.
        on_bad_document: "fail" the cell, or "skip" the document.
        data_root: as for `tasks.binding.bind`.
    """

    pretrained: str
    revision: str | None
    device: str
    dtype: str
    attn_implementation: str
    media: Mapping[str, Any]
    task: str
    base_model: str
    limit: int | None
    generation: Mapping[str, Any]
    batch_size: int
    on_bad_document: str
    cells: tuple[PendingCell, ...]
    protocol: str = "checkpoint"
    data_root: str | None = None

    @property
    def checkpoint(self) -> tuple[str, str | None, str, str, str]:
        """The arguments of `backbone_of`."""
        return self.pretrained, self.revision, self.device, self.dtype, self.attn_implementation


@dataclass(frozen=True)
class Answered:
    """Answers of one cell to one batch of documents. `answers` are plain: task, doc_id, answer and token counts."""

    digest: str
    batch: int
    answers: list[dict[str, Any]] = field(repr=False)
    seconds: float = 0.0


@dataclass(frozen=True)
class Failed:
    """A cell that can't continue, with the reason in one line."""

    digest: str
    reason: str


Event = Answered | Failed

_loaded: dict[tuple[Any, ...], Backbone] = {}
_bound: dict[tuple[Any, ...], binding.BoundTask] = {}


def backbone_of(pretrained: str, revision: str | None, device: str, dtype: str, attn_implementation: str) -> Backbone:
    """A loaded backbone; the last one stays, so that all that follows on one backbone loads it once.

    Args:
        pretrained, revision, device, dtype, attn_implementation: as for `load_backbone`.
    """
    key = (pretrained, revision, device, dtype, attn_implementation)
    if key not in _loaded:
        _loaded.clear()  # free the old one before the new one needs its memory
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        _loaded[key] = load_backbone(pretrained, device, dtype, attn_implementation, revision=revision)
    return _loaded[key]


def bound_task(
    task: str, base_model: str, limit: int | None, data_root: str | None = None, metric: str | None = None
) -> binding.BoundTask:
    """lmms-eval's task with its documents, loaded once in this process."""
    key = (task, base_model, limit, data_root, metric)
    if key not in _bound:
        _bound[key] = binding.bind(task, base_model=base_model, limit=limit, data_root=data_root, metric=metric)
    return _bound[key]


def bind_compressors(cells: Sequence[PendingCell], backbone: Backbone) -> dict[str, CompressorAtBudget | Exception]:
    """The compressor of each cell, by its digest, bound to the backbone, at its budget; each is built once.

    Where one can't be built, does not fit the backbone (no scorer weights, another width) or refuses its budget, the
    cell gets the exception.
    """
    bound: dict[str, Compressor | Exception] = {}
    settings: dict[str, CompressorAtBudget | Exception] = {}
    for cell in cells:
        key = repr((cell.method, sorted(cell.options.items())))
        if key not in bound:
            try:
                bound[key] = backbone.bind(build(cell.method, **cell.options))
            except Exception as error:
                bound[key] = error
        compressor = bound[key]
        try:
            settings[cell.digest] = (
                compressor
                if isinstance(compressor, Exception)
                else CompressorAtBudget(compressor, cell.budget, cell.seed)
            )
        except InputError as error:
            settings[cell.digest] = error
    return settings


def batches_of(requests: Sequence[Request], size: int) -> list[list[Request]]:
    """Batches of documents with equal generation settings.

    They depend on nothing but the documents and `size`, so that a resumed cell is answered in the same batches, and so
    with the same rounding, as an undisturbed one.
    """
    batches = []
    for _, run in groupby(requests, key=lambda r: sorted(generation_arguments(r.generation).items(), key=str)):
        group = list(run)
        batches += [group[i : i + size] for i in range(0, len(group), size)]
    return batches


def answer_unit(unit: WorkUnit) -> Iterator[Event]:
    """Answer what is left of every cell of `unit`, batch by batch.

    Yields:
        `Answered` as soon as a cell has answered a batch; `Failed` once for a cell that can't continue (the rest does).

    Raises:
        InputError: the backbone or the task can't be loaded.
    """
    with thread_limit(unit.pretrained):
        yield from _answer_unit(unit)


def _answer_unit(unit: WorkUnit) -> Iterator[Event]:
    backbone = backbone_of(*unit.checkpoint)
    remark = getattr(backbone, "remark", "")
    settings: dict[str, CompressorAtBudget] = {}
    for digest, setting in bind_compressors(unit.cells, backbone).items():
        if isinstance(setting, Exception):
            yield Failed(digest, reason_of(setting))
        else:
            settings[digest] = setting
    bound = bound_task(unit.task, unit.base_model, unit.limit, unit.data_root)
    answerer = Answerer(backbone, MediaSettings(**unit.media))
    alive = {work.digest: work for work in unit.cells if work.digest in settings}
    for number, batch in enumerate(
        batches_of(binding.requests(bound, unit.protocol, unit.generation), unit.batch_size)
    ):
        # Cells with the same documents left share the decode and the vision pass: all of them, but for a cell that was
        # begun with another batch size.
        waiting: dict[tuple[Document, ...], list[str]] = {}
        for digest, work in alive.items():
            if left := tuple(r.document for r in batch if r.document not in work.done):
                waiting.setdefault(left, []).append(digest)
        for left, digests in waiting.items():
            asked = [request for request in batch if request.document in left]
            try:
                prepared, skipped = _prepare(answerer, asked, [settings[d] for d in digests], unit.on_bad_document)
            except Exception as error:
                for digest in digests:
                    yield Failed(digest, reason_of(error))
                    del alive[digest]
                continue
            for digest in digests:
                started = time.perf_counter()
                try:
                    answers = answerer.answer(prepared, settings[digest]) if prepared is not None else []
                except Exception as error:
                    yield Failed(digest, reason_of(error))
                    del alive[digest]
                    continue
                yield Answered(digest, number, _plain(left, answers, skipped, remark), time.perf_counter() - started)


def _prepare(
    answerer: Answerer, asked: list[Request], settings: list[CompressorAtBudget], on_bad_document: str
) -> tuple[PreparedBatch | None, dict[Document, str]]:
    """A batch, prepared, and the documents that had to be left out of it with the reason.

    Raises:
        InputError: a document that can't be read, named, unless it is to be skipped.
    """
    try:
        return answerer.prepare(asked, settings), {}
    except UnsupportedMediaError as error:  # not this document's fault: skipping would score the whole task as empty
        raise InputError(f"{asked[0].task} can't be answered: {error}") from error
    except InputError as error:
        broken: dict[Document, str] = {}
        for request in asked:  # one by one, to find out which
            try:
                answerer.inputs([request])
            except UnsupportedMediaError as cause:
                raise InputError(f"{request.task} can't be answered: {cause}") from cause
            except InputError as cause:
                named = f"document {request.doc_id} of {request.task}"
                broken[request.document] = str(cause) if named in str(cause) else f"{named}: {cause}"
        if not broken:
            raise
        if on_bad_document == "fail":
            raise InputError(next(iter(broken.values()))) from error
    for reason in broken.values():
        log.warning("skipped: %s", reason)
    readable = [request for request in asked if request.document not in broken]
    return (answerer.prepare(readable, settings) if readable else None), broken


def _plain(
    documents: Sequence[Document], answers: list[Answer], skipped: Mapping[Document, str], remark: str = ""
) -> list[dict[str, Any]]:
    """Answers as plain data for the journal; a skipped document has an empty one, with the reason.

    The backbone's remark goes with them: a cell killed before it was scored is scored without loading the backbone.
    """
    left = iter(answers)
    nothing = Answer(text="", kept_tokens=0, total_tokens=0, prompt_tokens=0, new_tokens=0)
    plain = []
    for task, doc_id in documents:
        reason = skipped.get((task, doc_id), "")
        answer = nothing if reason else next(left)
        plain.append(
            {
                "task": task,
                "doc_id": doc_id,
                "answer": answer.text,
                "kept_tokens": answer.kept_tokens,
                "total_tokens": answer.total_tokens,
                "layer_tokens": answer.layer_tokens,
                "prompt_tokens": answer.prompt_tokens,
                "new_tokens": answer.new_tokens,
                "skipped": reason,
                **({"remark": remark} if remark else {}),
            }
        )
    return plain


def reason_of(error: Exception) -> str:
    """Why a cell failed, in one line."""
    if isinstance(error, InputError):
        return one_line(error)
    log.debug("a cell failed", exc_info=error)
    if isinstance(error, torch.OutOfMemoryError):
        torch.cuda.empty_cache()
        return "out of memory: lower the batch size or max_pixels"
    return one_line(error, kind=True, longest=2000)
