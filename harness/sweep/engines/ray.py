"""The `ray` engine: any number of GPUs and nodes. A unit runs on one worker; only the driver writes files.

Workers stream events back as they come. When a worker or its node dies, the unit goes to another one without the
documents that were already answered.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import ray
from ray.exceptions import ActorDiedError, NodeDiedError, OutOfMemoryError, RayTaskError, WorkerCrashedError

from visionselector_eval.baselines.contract.errors import InputError
from visionselector_eval.harness.sweep.worker import Answered, Event, WorkUnit

log = logging.getLogger(__name__)

T = TypeVar("T")

_LOST = (WorkerCrashedError, NodeDiedError, ActorDiedError, OutOfMemoryError)
_TRIES = 3  # workers that one unit may lose before it is given up


class Ray:
    """Runs units on the workers of a Ray cluster: the one that RAY_ADDRESS names, else one made on this machine.

    Args:
        workers: units at once; None takes one for each GPU, or one for each two CPU cores where there is no GPU.
    """

    def __init__(self, workers: int | None = None) -> None:
        if workers is not None and workers < 1:
            raise InputError(f"invalid --workers {workers}: expected at least 1")
        if not ray.is_initialized():
            ray.init(log_to_driver=False, include_dashboard=False, logging_level=logging.WARNING)
        resources = ray.cluster_resources()
        self._gpus = int(resources.get("GPU", 0))
        cores = max(1, int(resources.get("CPU", 1)))
        self.workers = workers or self._gpus or max(1, cores // 2)
        # More workers than GPUs share them; without GPUs the cores are shared evenly.
        share = min(1.0, self._gpus / self.workers)
        self._needs: dict[str, Any] = {"num_gpus": share} if self._gpus else {"num_cpus": max(1, cores // self.workers)}

    def device(self, asked: str) -> str:
        """`auto` is CUDA where the cluster has GPUs; what was asked for is for the worker to check."""
        return ("cuda" if self._gpus else "cpu") if asked == "auto" else asked

    def call(self, function: Callable[[WorkUnit], T], unit: WorkUnit) -> T:
        """`function(unit)` on a worker."""
        try:
            return ray.get(ray.remote(**self._needs)(function).remote(unit))
        except RayTaskError as error:
            raise _cause(error) from error

    def __call__(
        self, units: Iterable[WorkUnit], answer: Callable[[WorkUnit], Iterator[Event]]
    ) -> Iterator[tuple[WorkUnit, Event | Exception]]:
        run = ray.remote(**self._needs, num_returns="streaming", max_retries=0)(answer)
        waiting = [(unit, unit, 1) for unit in units]
        running: dict[Any, tuple[WorkUnit, WorkUnit, int]] = {}
        while waiting or running:
            while waiting and len(running) < self.workers:
                given, rest, attempt = waiting.pop(0)
                running[run.remote(rest)] = (given, rest, attempt)
            ready, _ = ray.wait(list(running), num_returns=1)
            stream = ready[0]
            given, rest, attempt = running[stream]
            try:
                event = ray.get(next(stream))
            except StopIteration:
                del running[stream]
                continue
            except _LOST as error:
                del running[stream]
                if attempt < _TRIES:
                    log.warning("a worker was lost with %s (try %d of %d): %s", rest.task, attempt, _TRIES, error)
                    waiting.insert(0, (given, rest, attempt + 1))
                else:
                    yield given, RuntimeError(f"its worker was lost {_TRIES} times")
                continue
            except RayTaskError as error:
                del running[stream]
                yield given, _cause(error)
                continue
            if isinstance(event, Answered):
                running[stream] = (given, _without(rest, event), attempt)
            yield given, event


def _without(unit: WorkUnit, event: Answered) -> WorkUnit:
    """`unit` without the documents that `event` answers, for the worker that takes over after a loss."""
    documents = {(a["task"], a["doc_id"]) for a in event.answers}
    cells = tuple(
        dataclasses.replace(work, done=work.done | documents) if work.digest == event.digest else work
        for work in unit.cells
    )
    return dataclasses.replace(unit, cells=cells)


def _cause(error: RayTaskError) -> Exception:
    cause = error.cause
    return cause if isinstance(cause, Exception) else error
