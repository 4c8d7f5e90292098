"""Run a sweep: plan the cells, answer what is missing, score it, write the run folder and its leaderboard."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal

import pandas as pd

from visionselector_eval.baselines.contract.errors import InputError
from visionselector_eval.harness.environment import environment
from visionselector_eval.harness.store.files import digest_of
from visionselector_eval.harness.store.record import CellRecord
from visionselector_eval.harness.store.run import Run
from visionselector_eval.harness.sweep.engines import Engine
from visionselector_eval.harness.sweep.plan import CellGroup, PlannedCell, SweepPlan, plan
from visionselector_eval.harness.sweep.spec import SweepSpec
from visionselector_eval.harness.sweep.worker import (
    Answered,
    Event,
    Failed,
    PendingCell,
    WorkUnit,
    answer_unit,
    backbone_of,
    bind_compressors,
    bound_task,
    reason_of,
)
from visionselector_eval.tasks import scoring

Existing = Literal["keep", "replace-stale", "overwrite"]
"""What becomes of cells that a run folder holds already."""

# What a cell has of its own; everything else it must share with the `full` row that it is compared with.
_OWN_SETTINGS = ("method", "options", "weights", "budget", "seed")


# What all cells of one sweep on one backbone have in common.
_SWEEP_SETTINGS = (
    "revision", "limit", "media", "generation", "on_bad_document", "dtype", "attention", "lmms_eval", "version",
)  # fmt: skip


@dataclass
class SweepResult:
    """What a sweep did: digests of cells that were done before, are done now, and failed with their reasons."""

    before: list[str] = field(default_factory=list)
    done: list[str] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)


class Progress:
    """What a sweep tells while it runs; this one keeps silent."""

    def start(self, documents: int) -> None:
        """A sweep begins: so many answers (documents x cells) are left."""

    def group(self, group: CellGroup) -> None:
        """A group begins."""

    def answered(self, cell: PlannedCell, documents: int) -> None:
        """A cell has answered so many documents more."""

    def finished(self, cell: PlannedCell, record: CellRecord) -> None:
        """A cell is done, or failed (see the record)."""


def run_sweep(
    spec: SweepSpec,
    *,
    engine: Engine,
    existing: Existing = "keep",
    progress: Progress | None = None,
    answer: Callable[[WorkUnit], Iterable[Event]] = answer_unit,
) -> tuple[Run, SweepResult]:
    """Answer and score every cell of `spec` that its run folder does not hold yet.

    Args:
        engine: where units run.
        existing: what becomes of cells that the folder holds. keep: finished ones are kept, and those made with other
            settings than this sweep's, such as another version or other weights, are refused; replace-stale: these are
            forgotten; overwrite: all cells of this spec are forgotten.
        progress: is told what happens.
        answer: what a worker does with a unit.

    Raises:
        InputError: a spec that can't be run at all, or a run folder that holds cells made with other settings.
    """
    progress = progress or Progress()
    run = Run.open(spec.folder(), create=True)
    with run.lock():
        device = engine.device(spec.device)
        planned = plan(spec, run, device)
        if _settle_earlier_cells(run, planned, existing):
            planned = plan(spec, run, device)
        settings = planned.cells[0].settings
        run.write_spec(spec.to_yaml())
        run.write_environment(
            {
                **environment(),
                "device": device,
                "dtype": settings["dtype"],
                "attn_implementation": settings["attention"],
            }
        )
        result = SweepResult(before=[cell.digest for cell in planned.cells if cell.done])
        for digest in result.before:  # killed after the record was written, before its journal was removed
            run.journal(digest).path.unlink(missing_ok=True)
        for cell in planned.cells:
            if cell.error:
                _fail(run, cell, cell.error, result, progress)
        groups = [group for group in planned.groups if group.missing]
        units = {id(unit): (unit, group) for group in groups for unit in [_unit(spec, group, run, device)]}
        _preflight(engine, [unit for unit, _ in units.values()], len(spec.backbones))
        progress.start(sum(group.n_documents * len(group.missing) for group in groups))
        for _, group in units.values():
            for cell in group.missing:
                if cell.answered:
                    progress.answered(cell, cell.answered)
        _drive(run, list(units.values()), engine, answer, result, progress)
    return run, result


def _preflight(engine: Engine, units: Sequence[WorkUnit], backbones: int) -> None:
    """See to it that a mistake shows before any document is read: load a backbone and fit every method to it.

    One backbone of the sweep that takes them all is enough, or one with nothing left to do: the cells of the others
    fail by themselves, so which backbone is named first does not matter.

    Args:
        backbones: how many the sweep has.

    Raises:
        InputError: every backbone of the sweep is tried, and none is usable with all methods.
    """
    firsts: dict[str, WorkUnit] = {}
    for unit in units:
        firsts.setdefault(unit.pretrained, unit)
    problems: list[Exception] = []
    for unit in firsts.values():
        try:
            engine.call(_fit, unit)
            return
        except Exception as problem:
            problems.append(problem)
    if problems and len(problems) == backbones:
        raise problems[0]


def _fit(unit: WorkUnit) -> None:
    for setting in bind_compressors(unit.cells, backbone_of(*unit.checkpoint)).values():
        if isinstance(setting, Exception):
            raise setting


def _unit(spec: SweepSpec, group: CellGroup, run: Run, device: str) -> WorkUnit:
    def work(cell: PlannedCell) -> PendingCell:
        lines = run.journal(cell.digest).read()
        done = frozenset((a["task"], a["doc_id"]) for line in lines for a in line["answers"])
        return PendingCell(
            cell.digest, cell.spec.method, dict(cell.spec.options), cell.spec.budget, cell.spec.seed, done
        )

    return WorkUnit(
        pretrained=group.backbone.pretrained,
        revision=group.backbone.revision,
        device=device,
        dtype=spec.dtype,
        attn_implementation=spec.attn_implementation,
        media=spec.media(group.backbone),
        protocol=spec.protocol_of(group.backbone),
        task=group.task,
        base_model=group.family,
        limit=spec.limit,
        generation=spec.generation,
        batch_size=spec.batch_size,
        on_bad_document=spec.on_bad_document,
        cells=tuple(work(cell) for cell in group.missing),
        data_root=group.data_root,
    )


def _drive(
    run: Run,
    units: Sequence[tuple[WorkUnit, CellGroup]],
    engine: Engine,
    answer: Callable[[WorkUnit], Iterable[Event]],
    result: SweepResult,
    progress: Progress,
) -> None:
    """Store events as they come; score a cell when it has answered every document."""
    cells = {cell.digest: (cell, group) for _, group in units for cell in group.missing}
    left = {work.digest: cells[work.digest][1].n_documents - len(work.done) for unit, _ in units for work in unit.cells}
    seconds = dict.fromkeys(left, 0.0)
    for digest in [d for d, n in left.items() if n == 0]:  # killed after its last answer, before it was scored
        _score(run, *cells[digest], 0.0, result, progress)
    begun: set[int] = set()
    groups = {id(unit): group for unit, group in units}
    for unit, event in engine([unit for unit, _ in units if any(left[w.digest] for w in unit.cells)], answer):  # type: ignore[arg-type]
        if id(unit) not in begun:
            begun.add(id(unit))
            progress.group(groups[id(unit)])
        if isinstance(event, Answered):
            cell, group = cells[event.digest]
            run.journal(event.digest).append(event.batch, event.answers)
            seconds[event.digest] += event.seconds
            left[event.digest] -= len(event.answers)
            progress.answered(cell, len(event.answers))
            if left[event.digest] == 0:
                _score(run, cell, group, seconds[event.digest], result, progress)
        elif isinstance(event, Failed):
            _fail(run, cells[event.digest][0], event.reason, result, progress)
        else:  # the unit itself could not continue
            reason = reason_of(event)
            for work in unit.cells:
                if work.digest not in result.done and work.digest not in result.failed:
                    _fail(run, cells[work.digest][0], reason, result, progress)


def _remark(answers: Iterable[Mapping[str, Any]]) -> str:
    """What the answers of a cell say about their backbone; those of an older version say nothing."""
    return max((answer.get("remark", "") for answer in answers), default="")


def _record(cell: PlannedCell, **values: Any) -> CellRecord:
    shared = {k: v for k, v in cell.settings.items() if k not in _OWN_SETTINGS}
    return CellRecord(
        digest=cell.digest,
        backbone=cell.spec.backbone.pretrained,
        revision=str(cell.settings["revision"]),
        method=cell.spec.method,
        label=cell.spec.label,
        options=dict(cell.settings["options"]),
        budget=str(cell.spec.budget),
        task=cell.spec.task,
        seed=cell.spec.seed,
        version=str(cell.settings["version"]),
        finished_at=datetime.now(UTC).isoformat(timespec="seconds"),
        context=digest_of(shared),
        settings=dict(cell.settings),
        **values,
    )


def _fail(run: Run, cell: PlannedCell, reason: str, result: SweepResult, progress: Progress) -> None:
    remark = _remark(a for line in run.journal(cell.digest).read() for a in line["answers"])
    record = _record(cell, remark=remark)
    run.fail(cell.digest, record, reason)
    result.failed[cell.digest] = reason
    progress.finished(cell, record.model_copy(update={"status": "failed", "error": reason}))


def _score(
    run: Run, cell: PlannedCell, group: CellGroup, seconds: float, result: SweepResult, progress: Progress
) -> None:
    """Replay the stored answers through lmms-eval's own scoring, and complete the cell."""
    bound = bound_task(group.task, group.family, cell.settings["limit"], group.data_root, group.metric)
    answers = {(a["task"], a["doc_id"]): a for line in run.journal(cell.digest).read() for a in line["answers"]}
    responses: dict[str, dict[int, str]] = {}
    for (task, doc_id), given in answers.items():
        responses.setdefault(task, {})[doc_id] = given["answer"]
    submissions = run.folder / "cells" / cell.digest / "submissions"
    try:
        scored = scoring.score(bound, responses, submissions)
    except Exception as error:  # upstream's code, on answers that nobody has seen before
        _fail(run, cell, reason_of(error), result, progress)
        return
    with suppress(OSError):
        submissions.rmdir()  # most tasks write none
    samples = pd.DataFrame(
        [
            {
                "doc_id": document.doc_id,
                "subtask": document.task,
                "answer": document.answer,
                "target": document.target,
                "score": document.score,
                "cluster": document.cluster,
                "doc_hash": document.doc_hash,
                **{
                    k: answers[document.task, document.doc_id][k]
                    for k in ("kept_tokens", "total_tokens", "layer_tokens", "prompt_tokens", "new_tokens", "skipped")
                },
            }
            for document in scored.documents
        ]
    )
    visual = samples[samples["total_tokens"] > 0]
    record = _record(
        cell,
        remark=_remark(answers.values()),
        metric=scored.metric,
        score=scored.score,
        metrics=scored.metrics,
        metric_note=bound.entry.guess,
        higher_is_better=bound.entry.higher_is_better,
        scale=bound.entry.scale,
        mean_of_documents=scored.mean_of_documents,
        cluster_key=bound.entry.cluster_key,
        n_documents=len(samples),
        needs_submission=scored.needs_submission,
        n_skipped=int((samples["skipped"] != "").sum()),
        kept_tokens=float(visual["kept_tokens"].mean()) if len(visual) else None,
        total_tokens=float(visual["total_tokens"].mean()) if len(visual) else None,
        layer_tokens=float(visual["layer_tokens"].mean()) if len(visual) else None,
        seconds=seconds,
    )
    run.finish(cell.digest, record, samples)
    result.done.append(cell.digest)
    progress.finished(cell, record)


def _place(values: Mapping[str, Any]) -> tuple[Any, ...]:
    return tuple(str(values[k]) for k in ("backbone", "label", "budget", "task", "seed"))


def _settle_earlier_cells(run: Run, planned: SweepPlan, existing: Existing) -> bool:
    """Cells of the folder that stand where a planned one will: failed ones go, finished ones are not mixed with others.

    With `replace-stale` the finished ones of other settings go, too, and so do cells elsewhere in the grid (a method
    that is no longer asked for) that were made under other settings of the whole sweep.

    Returns:
        whether any was removed.

    Raises:
        InputError: a finished cell was made with other settings, and `existing` is `keep`.
    """
    overwrite, replace_stale = existing == "overwrite", existing == "replace-stale"
    expected = {
        _place(
            {
                "backbone": cell.spec.backbone.pretrained,
                "label": cell.spec.label,
                "budget": cell.spec.budget,
                "task": cell.spec.task,
                "seed": cell.spec.seed,
            }
        ): cell
        for cell in planned.cells
    }
    removed = False
    digests = {cell.digest for cell in planned.cells}
    common = {cell.spec.backbone.pretrained: cell.settings for cell in planned.cells}
    for digest in run.digests():
        record = run.record(digest)
        if record is None:
            if overwrite and digest in digests:  # begun, not finished
                run.remove(digest)
                removed = True
            continue
        cell = expected.get(_place(record))
        if cell is None:
            here = common.get(record["backbone"])
            if replace_stale and here and any(here[k] != record["settings"].get(k) for k in _SWEEP_SETTINGS):
                run.remove(digest)
            continue
        # Not where the task's data are out of reach at the moment: results are not lost to a folder that isn't mounted.
        stale = replace_stale and not cell.error
        if overwrite or (cell.digest != digest and (stale or record["status"] == "failed")):
            run.remove(digest)
            removed = True
        elif cell.digest != digest:
            differing = sorted(
                k for k in {*cell.settings, *record["settings"]} if cell.settings.get(k) != record["settings"].get(k)
            )
            raise InputError(
                f"the run folder '{run.folder}' holds {cell.spec.title} made with other settings "
                f"({', '.join(differing)}): give another --name or --output, or recompute such cells with "
                "--existing replace-stale, or all of this sweep with --existing overwrite"
            )
    return removed
