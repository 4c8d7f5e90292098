"""Engines: where the units of a sweep run. An engine turns units into events; it writes nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Protocol, TypeVar

from visionselector_eval.baselines.contract.errors import InputError, unknown
from visionselector_eval.harness.sweep.worker import Event, WorkUnit

__all__ = ["ENGINES", "Engine", "engine"]


T = TypeVar("T")


class Engine(Protocol):
    """Runs `answer` on units, anywhere, and gives the events of each as they come."""

    def device(self, asked: str) -> str:
        """The device that units run on: `auto` made definite.

        Raises:
            InputError: where it is known not to be there.
        """
        ...

    def call(self, function: Callable[[WorkUnit], T], unit: WorkUnit) -> T:
        """`function(unit)` where units run; its errors are raised here."""
        ...

    def __call__(
        self, units: Iterable[WorkUnit], answer: Callable[[WorkUnit], Iterator[Event]]
    ) -> Iterator[tuple[WorkUnit, Event | Exception]]:
        """Pairs of unit and event; an exception ends its unit, the others continue."""
        ...


ENGINES = ("local", "ray")


def engine(name: str, workers: int | None = None) -> Engine:
    """The engine of that name.

    Raises:
        InputError: unknown name, or `ray` where it is not installed.
    """
    if name == "local":
        from visionselector_eval.harness.sweep.engines.local import Local

        return Local()
    if name == "ray":
        try:
            from visionselector_eval.harness.sweep.engines.ray import Ray
        except ImportError:
            raise InputError(
                "engine=ray needs Ray, which is not installed: pip install 'visionselector-eval[ray]', or use local"
            ) from None
        return Ray(workers)
    raise unknown("engine", name, ENGINES)
