"""The `local` engine: this process, one device, unit after unit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

from visionselector_eval.harness.sweep.worker import Event, WorkUnit
from visionselector_eval.models.loading import choose_device

T = TypeVar("T")


class Local:
    """Runs units one after another in this process."""

    def device(self, asked: str) -> str:
        """The device in this machine; see `choose_device`."""
        return choose_device(asked)

    def call(self, function: Callable[[WorkUnit], T], unit: WorkUnit) -> T:
        """`function(unit)`, here."""
        return function(unit)

    def __call__(
        self, units: Iterable[WorkUnit], answer: Callable[[WorkUnit], Iterator[Event]]
    ) -> Iterator[tuple[WorkUnit, Event | Exception]]:
        for unit in units:
            try:
                for event in answer(unit):
                    yield unit, event
            except Exception as error:
                yield unit, error
