"""The `local` engine: this process, one device, unit after unit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from visionselector_eval.harness.evaluate import Event, Unit


class Local:
    """Runs units one after another in this process."""

    def __call__(
        self, units: Iterable[Unit], answer: Callable[[Unit], Iterator[Event]]
    ) -> Iterator[tuple[Unit, Event | Exception]]:
        for unit in units:
            try:
                for event in answer(unit):
                    yield unit, event
            except Exception as error:
                yield unit, error
