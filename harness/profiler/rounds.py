"""The rounds of a profile.

A round runs every cell once on one prompt, in an order of its own, so that drift of clocks and temperatures meets all
cells alike and each can be compared with `full` in the same round. Time, memory, FLOPs and energy have rounds of their
own: nothing but the method runs while time is taken.
"""

from __future__ import annotations

import gc
import logging
import random
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch

from visionselector_eval.baselines.contract.errors import InputError, one_line
from visionselector_eval.harness.environment import cpu_model, environment
from visionselector_eval.harness.profiler.flops import (
    matmul_ceiling,
)
from visionselector_eval.harness.profiler.measure import BoundCell, Profiler, Prompt, bind_cells, out_of_memory
from visionselector_eval.harness.profiler.memory import weight_bytes
from visionselector_eval.harness.profiler.metrics import METRICS, Metric, ProfilePlan, Time
from visionselector_eval.harness.profiler.nvml import INTERVAL, Nvml
from visionselector_eval.harness.profiler.spec import ProfileCell
from visionselector_eval.harness.profiler.store import ProfileFolder
from visionselector_eval.harness.profiler.workloads import Workload, check_length

if TYPE_CHECKING:
    import pandas as pd

    from visionselector_eval.models.backbones.base import Backbone

log = logging.getLogger(__name__)


class Progress:
    """What a profile tells while it runs; this one keeps silent."""

    def start(self, samples: int) -> None:
        """So many samples are left."""

    def workload(self, name: str) -> None:
        """A workload begins."""

    def measured(self, count: int) -> None:
        """So many samples more (or given up)."""

    def failed(self, workload: str, cell: ProfileCell, reason: str) -> None:
        """A cell can't be measured on a workload."""


def about(backbone: Backbone, plan: ProfilePlan, dtype: torch.dtype, attention: str, **more: Any) -> dict[str, Any]:
    """What every row of a profile shares: `settings` must agree when it is resumed, the rest is for the reader."""
    device = backbone.device
    gpu = Nvml.find(device)
    on_gpu = device.type == "cuda"
    return {
        "settings": {
            "backbone": backbone.id,
            "revision": backbone.revision,
            "device": torch.cuda.get_device_name(device) if on_gpu else cpu_model(),
            "dtype": str(dtype).removeprefix("torch."),
            "attention": attention,
            "threads": torch.get_num_threads(),
            "new_tokens": plan.new_tokens,
            "seed": plan.seed,
            "torch": torch.__version__,
            "transformers": version("transformers"),
            "version": version("visionselector-eval"),
            **more,
        },
        "warmup": plan.warmup,
        "repeats": plan.repeats,
        "parameters": sum(p.numel() for p in backbone.model.parameters()),
        "weight_bytes": weight_bytes(backbone.model),
        "ceiling_flops": matmul_ceiling(device, dtype),
        "clock": "CUDA events, device settled at phase borders" if on_gpu else "perf_counter",
        "energy": f"NVML every {1000 * INTERVAL:g} ms" if isinstance(gpu, Nvml) else f"none: {gpu}",
    }


def profile(
    folder: ProfileFolder,
    backbone: Backbone,
    workloads: Sequence[Workload],
    cells: Sequence[ProfileCell],
    plan: ProfilePlan,
    *,
    attention: str,
    progress: Progress | None = None,
    profiler: Profiler | None = None,
) -> dict[tuple[str, str], str]:
    """Measure what `folder` does not hold yet.

    Returns:
        {(workload, cell digest): reason} of what could not be measured.

    Raises:
        InputError: a workload with more tokens than the model has positions; nothing is measured then.
    """
    progress = progress or Progress()
    measuring = profiler or Profiler(backbone, plan.new_tokens)
    text = backbone.model.config.get_text_config()
    for workload in workloads:
        for item in workload.items:
            check_length(text, item.make(), plan.new_tokens, item.key)
    bound, unfit = bind_cells(backbone, cells)
    gpu = Nvml.find(backbone.device)
    metrics = [metric(plan, gpu) for metric in METRICS]
    schedules = [
        _Schedule(workload, bound, metrics, plan, _measured(folder.rows(), workload.name)) for workload in workloads
    ]
    progress.start(sum(s.left for s in schedules))
    failed: dict[tuple[str, str], str] = {}
    numbers = {cell.digest: number for number, cell in enumerate(cells)}
    for schedule in schedules:
        session = _Session(folder, measuring, schedule, plan, numbers, attention, progress, failed)
        for cell, reason in unfit.values():
            session.give_up(cell, reason)
        progress.workload(schedule.workload.name)
        session.run()
    return failed


def _measured(rows: pd.DataFrame, workload: str) -> set[tuple[str, str, int]]:
    own = rows[(rows["workload"] == workload) & (rows["kind"] != "failed")]
    return set(zip(own["cell"], own["kind"], own["round"].astype(int), strict=True))


@dataclass(frozen=True)
class _Step:
    """One sample: a cell, what is measured, and in which round. Samples of a warm-up are not kept."""

    bound: BoundCell
    metric: Metric
    round: int
    kept: bool = True


class _Schedule:
    """All rounds of a workload, without what is measured already. The same seed gives the same order."""

    def __init__(
        self,
        workload: Workload,
        bound: Sequence[BoundCell],
        metrics: Sequence[Metric],
        plan: ProfilePlan,
        done: set[tuple[str, str, int]],
    ) -> None:
        self.workload, self.bound = workload, bound
        rounds = [
            [_Step(b, metric, number) for metric in metrics for b in metric.in_timed_round(bound, number)]
            for number in range(plan.repeats)
        ]
        for metric in metrics:
            rounds += [
                [_Step(b, metric, number) for b in bound] for number in range(metric.own_rounds(len(workload.items)))
            ]
        self.rounds = []
        for steps in rounds:
            if not steps:
                continue
            order = random.Random(f"{plan.seed}/{workload.name}/{steps[0].metric.kind}/{steps[0].round}")
            order.shuffle(steps)
            if left := [s for s in steps if (s.bound.cell.digest, s.metric.kind, s.round) not in done]:
                self.rounds.append(left)

    @property
    def left(self) -> int:
        return sum(map(len, self.rounds))

    @property
    def cold(self) -> list[BoundCell]:
        """Cells that still have something to be measured for which they are warmed up."""
        digests = {s.bound.cell.digest for steps in self.rounds for s in steps if s.metric.warmed_up}
        return [b for b in self.bound if b.cell.digest in digests]


@dataclass
class _Session:
    """One workload's rounds. `numbers`: the place of each cell in the table."""

    folder: ProfileFolder
    profiler: Profiler
    schedule: _Schedule
    plan: ProfilePlan
    numbers: Mapping[str, int]
    attention: str
    progress: Progress
    failed: dict[tuple[str, str], str]

    @property
    def workload(self) -> Workload:
        return self.schedule.workload

    def run(self) -> None:
        cold = self.schedule.cold
        for number in range(self.plan.warmup if cold else 0):
            steps = [_Step(b, Time(self.plan), number, kept=False) for b in cold]
            random.Random(f"{self.plan.seed}/{self.workload.name}/warmup/{number}").shuffle(steps)
            self._round(steps)
        for steps in self.schedule.rounds:
            self._round(steps)

    def give_up(self, cell: ProfileCell, reason: str) -> None:
        """Record that a cell can't be measured on this workload; the others continue."""
        self.failed[self.workload.name, cell.digest] = reason
        self.progress.failed(self.workload.name, cell, reason)
        self._write(cell, "failed", 0, "", 0, {"error": reason})

    def _alive(self, bound: BoundCell) -> bool:
        return (self.workload.name, bound.cell.digest) not in self.failed

    def _round(self, steps: Sequence[_Step]) -> None:
        alive = [s for s in steps if self._alive(s.bound)]
        counted = [s for s in steps if s.kept]
        if not alive:
            self.progress.measured(len(counted))
            return
        item = self.workload.items[steps[0].round % len(self.workload.items)]
        prompt = self.profiler.preprocess(item.make, item.key)
        with _without_gc():
            for place, step in enumerate(steps):
                if self._alive(step.bound):
                    self._step(step, prompt, place)
                if step.kept:
                    self.progress.measured(1)

    def _step(self, step: _Step, prompt: Prompt, place: int) -> None:
        reason = ""
        try:
            values = step.metric.measure(self.profiler, step.bound, prompt)
        except Exception as error:
            reason = self._reason(error)
        if reason:  # after the handler: the error's frames held the tensors that filled the memory
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            self.give_up(step.bound.cell, reason)
        elif step.kept:
            self._write(step.bound.cell, step.metric.kind, step.round, prompt.key, place, values)

    def _reason(self, error: Exception) -> str:
        if out_of_memory(error):
            n = self.workload.tokens
            return f"out of memory at N={n}" if n is not None else f"out of memory on {self.workload.name}"
        if not isinstance(error, InputError):
            log.debug("a cell failed", exc_info=error)
        return one_line(error, kind=True, longest=2000)

    def _write(
        self, cell: ProfileCell, kind: str, number: int, key: str, place: int, values: Mapping[str, Any]
    ) -> None:
        self.folder.append(
            {
                "workload": self.workload.name,
                "item": key,
                "cell": cell.digest,
                "role": cell.role,
                "method": cell.method,
                "label": cell.label,
                "options": str(dict(cell.options)),
                "budget": str(cell.budget),
                "kind": kind,
                "round": number,
                "place": place,
                "number": self.numbers[cell.digest],
                "at": time.time(),
                "attention": self.attention,
                **values,
            }
        )


@contextmanager
def _without_gc() -> Iterator[None]:
    """Garbage is collected between rounds, where it costs no cell anything."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def run_environment(about: Mapping[str, Any]) -> dict[str, Any]:
    """What environment.json holds: the machine, versions and commit, and the settings that change speed."""
    settings = about["settings"]
    return {**environment(), **{k: settings[k] for k in ("device", "dtype", "attention", "threads")}}
