"""What a sweep has to do: the cells of a spec with their digests, grouped by what they share."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from visionselector_eval.baselines import build
from visionselector_eval.baselines.contract.errors import InputError
from visionselector_eval.harness.store.files import digest_of
from visionselector_eval.harness.store.run import Run
from visionselector_eval.harness.sweep.spec import BackboneSpec, CellSpec, SweepSpec, cells_of
from visionselector_eval.harness.sweep.worker import (
    bound_task,
)
from visionselector_eval.models.inputs import MediaSettings
from visionselector_eval.models.loading import checkpoint_family, checkpoint_revision, choose_attention, choose_dtype
from visionselector_eval.models.protocols import protocol_named
from visionselector_eval.tasks import binding, lmms
from visionselector_eval.tasks.suites import load_suites

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PlannedCell:
    """A cell with its name and, where its task can't be loaded, the reason."""

    spec: CellSpec
    digest: str
    settings: Mapping[str, Any]
    done: bool
    answered: int = 0
    error: str = ""


@dataclass(frozen=True)
class CellGroup:
    """Cells that share one loaded model, one decode and one vision pass for each document."""

    backbone: BackboneSpec
    family: str
    task: str
    n_documents: int
    cells: tuple[PlannedCell, ...]
    data_root: str | None = None
    metric: str | None = None

    @property
    def missing(self) -> list[PlannedCell]:
        """Cells still to be answered or scored."""
        return [cell for cell in self.cells if not cell.done and not cell.error]


@dataclass(frozen=True)
class SweepPlan:
    """All groups of a sweep, and what of them is already done."""

    spec: SweepSpec
    groups: tuple[CellGroup, ...]

    @property
    def cells(self) -> list[PlannedCell]:
        """All cells, group by group."""
        return [cell for group in self.groups for cell in group.cells]


def plan(spec: SweepSpec, run: Run | None, device: str) -> SweepPlan:
    """Which cells there are, how they share work, and which are done in `run`; `device` is what `auto` came to.

    Long because every cell takes from what is looked up once for its backbone, its task and its compressor.

    Raises:
        InputError: a backbone that can't be found, a device or option that can't be used, a task that does not exist,
            or no task that can be loaded (one of several that can't be makes its cells fail).
    """
    dtype = choose_dtype(spec.dtype, device)
    attention = choose_attention(spec.attn_implementation, device, dtype)
    revisions = {b.pretrained: checkpoint_revision(b.pretrained, b.revision) for b in spec.backbones}
    families = {b.pretrained: checkpoint_family(b.pretrained, b.revision).lmms_eval for b in spec.backbones}
    for backbone in spec.backbones:
        MediaSettings(**spec.media(backbone))  # refuses bounds that contradict each other
    # Absolute, because a worker may have another working folder.
    data_root = str(Path(spec.data_root).expanduser().absolute()) if spec.data_root is not None else None
    weights: dict[str, str] = {}
    groups: dict[tuple[str, str], list[PlannedCell]] = {}
    sizes: dict[tuple[str, str], int] = {}
    names: dict[tuple[str, str], tuple[str, str]] = {}
    metrics: dict[tuple[str, str], str] = {}
    problems: dict[tuple[str, str], InputError] = {}
    for cell in cells_of(spec):
        name = cell.backbone.pretrained
        key = (name, cell.task)
        if key not in names:
            try:
                metric = spec.metric.get(cell.task)
                bound = bound_task(cell.task, families[name], spec.limit, data_root, metric)
                prompts = _prompts_hash(bound, spec.protocol_of(cell.backbone))
                names[key], sizes[key] = (bound.data_hash, prompts), bound.n_documents
                if metric is not None or cell.task not in load_suites().tasks:
                    metrics[key] = bound.entry.metric
                if bound.entry.guess:
                    log.warning("%s: %s; choose with --metric %s=NAME", cell.task, bound.entry.guess, cell.task)
            except InputError as problem:
                if not _task_exists(cell.task, families[name]) or str(problem).startswith("unknown metric"):
                    raise
                names[key], problems[key] = ("unavailable", "unavailable"), problem
        data, prompts = names[key]
        compressor_key = json.dumps([cell.method, dict(cell.options)], sort_keys=True, default=str)
        if compressor_key not in weights:
            weights[compressor_key] = build(cell.method, **cell.options).fingerprint()
        settings = {
            **_cell_settings(spec, cell),
            "revision": revisions[name],
            "weights": weights[compressor_key],
            "data": data,
            "prompts": prompts,
            "dtype": str(dtype).removeprefix("torch."),
            "attention": attention,
            "lmms_eval": version("lmms-eval"),
            "version": version("visionselector-eval"),
        }
        if key in metrics:  # a task of suites.yaml has a fixed one, of our version
            settings["metric"] = metrics[key]
        digest = digest_of(settings)
        done = run is not None and run.is_done(digest)
        answered = 0 if done or run is None else sum(len(line["answers"]) for line in run.journal(digest).read())
        error = str(problems[key]) if key in problems else ""
        groups.setdefault(key, []).append(PlannedCell(cell, digest, settings, done, answered, error))
    if len(problems) == len(groups):
        raise next(iter(problems.values()))
    return SweepPlan(
        spec,
        tuple(
            CellGroup(
                cells[0].spec.backbone,
                families[name],
                task,
                sizes.get((name, task), 0),
                tuple(cells),
                data_root,
                spec.metric.get(task),
            )
            for (name, task), cells in groups.items()
        ),
    )


def _cell_settings(spec: SweepSpec, cell: CellSpec) -> dict[str, Any]:
    """What the spec alone says of a cell's answers."""
    return {
        "backbone": cell.backbone.pretrained,
        "method": cell.method,
        "options": {
            k: v if isinstance(v, bool | int | float | str | None) else str(v) for k, v in cell.options.items()
        },
        "budget": str(cell.budget),
        "seed": cell.seed,
        "task": cell.task,
        "limit": spec.limit,
        "media": spec.media(cell.backbone),
        "generation": spec.generation,
        "on_bad_document": spec.on_bad_document,
    }


def _task_exists(task: str, family: str) -> bool:
    return task in load_suites().tasks or task in lmms.task_manager(family).task_index


def _prompts_hash(bound: binding.BoundTask, protocol: str) -> str:
    """Names every question's wording and generation settings, so that a change upstream gives other cells."""
    digest = hashlib.sha256(b"media first" if protocol_named(protocol).media_first else b"")
    for request in binding.requests(bound, protocol):
        what = [request.task, request.doc_id, request.context, request.generation, request.until]
        digest.update(json.dumps(what, default=str).encode())
    return digest.hexdigest()[:16]
