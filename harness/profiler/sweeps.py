"""`sweep --profile`: the cells of a sweep, measured on documents of their own tasks after they were answered."""

from __future__ import annotations

import re
from dataclasses import replace

from visionselector_eval.baselines.contract.errors import InputError
from visionselector_eval.harness.profiler import report
from visionselector_eval.harness.profiler.rounds import ProfilePlan, Progress, about, profile, run_environment
from visionselector_eval.harness.profiler.run import Done
from visionselector_eval.harness.profiler.spec import FULL, ProfileCell, cell_of, limits
from visionselector_eval.harness.profiler.store import ProfileFolder, save_cells
from visionselector_eval.harness.profiler.workloads import documents
from visionselector_eval.harness.store.run import Run
from visionselector_eval.harness.sweep.plan import CellGroup, plan
from visionselector_eval.harness.sweep.spec import SweepSpec
from visionselector_eval.harness.sweep.worker import backbone_of
from visionselector_eval.models.inputs import MediaSettings
from visionselector_eval.models.loading import choose_attention, choose_device, choose_dtype
from visionselector_eval.models.tiny import thread_limit

_DOCUMENTS = 8  # of each task, evenly spread over those that the sweep answers


def profile_sweep(
    spec: SweepSpec, run: Run, measuring: ProfilePlan, *, overwrite: bool = False, progress: Progress | None = None
) -> list[Done]:
    """Measure every finished cell of a sweep on this machine; one profile for each backbone and task.

    They are written to `profile/<backbone>-<task>` in the run folder, and each cell's rows to its own
    `profile.parquet`. Of several seeds the first is measured: a seed changes which tokens are kept, not what they cost.

    Args:
        measuring: how often everything is run.

    Raises:
        InputError: a device that can't be used, or an earlier profile with other settings.
    """
    device = choose_device(spec.device)
    dtype = choose_dtype(spec.dtype, device)
    attention = choose_attention(spec.attn_implementation, device, dtype)
    results = []
    for group in plan(spec, run, device).groups:
        cells = _cells(group, spec)
        if not cells:
            continue
        name = re.sub(r"[^\w.-]+", "-", f"{group.backbone.pretrained}-{group.task}").strip("-")
        folder = ProfileFolder(run.folder / "profile" / name)
        with folder.run.lock(), thread_limit(group.backbone.pretrained):
            if overwrite:
                folder.forget()
            backbone = backbone_of(
                group.backbone.pretrained, group.backbone.revision, device, spec.dtype, spec.attn_implementation
            )
            media, protocol = MediaSettings(**spec.media(group.backbone)), spec.protocol_of(group.backbone)
            workload = documents(
                group.task, backbone, group.family, spec.limit, media, protocol, group.data_root, most=_DOCUMENTS
            )
            shared = folder.settle(about(backbone, measuring, dtype, attention, workload=dict(workload.settings)))
            folder.run.write_environment(run_environment(shared))
            failed = profile(folder, backbone, [workload], cells, measuring, attention=attention, progress=progress)
            folder.finish()
            save_cells(folder.rows(), run.folder, [cell.digest for cell in cells])
            titles = {cell.digest: cell.title for cell in cells}
            text = report.write(folder.folder)
        results.append(Done(folder.folder, text, [f"{titles[c]} on {w}: {why}" for (w, c), why in failed.items()]))
    if not results:
        raise InputError("--profile has nothing to measure: no cell of this sweep is done")
    return results


def _cells(group: CellGroup, spec: SweepSpec) -> list[ProfileCell]:
    """The group's finished cells under the sweep's own digests, and the limits of their budgets."""
    first: dict[tuple[str, str], ProfileCell] = {}
    for planned in group.cells:
        cell = planned.spec
        if not planned.done or cell.seed != spec.seeds[0]:
            continue
        role = FULL if cell.method == "full" else "method"
        made = cell_of(role, cell.method, cell.label, cell.options, cell.budget)
        first.setdefault((cell.label, str(cell.budget)), replace(made, digest=planned.digest))
    cells = list(first.values())
    return [*cells, *limits([c.budget for c in cells if c.role != FULL])] if cells else []
