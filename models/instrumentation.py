"""What a run is doing right now, told to whoever measures it; costs nothing measurable where nobody does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Literal

Step = Literal["vision", "compressor"]
Observer = Callable[[Step], AbstractContextManager[None]]

_observer: ContextVar[Observer | None] = ContextVar("observer", default=None)
_NOTHING = nullcontext()


def step(name: Step) -> AbstractContextManager[None]:
    """Marks the block as the vision encoder's or the compressor's: choosing and merging tokens, with all it reads."""
    observer = _observer.get()
    return _NOTHING if observer is None else observer(name)


@contextmanager
def observed(observer: Observer) -> Iterator[None]:
    """While the block runs, `observer(name)` is entered around every step of this thread."""
    token = _observer.set(observer)
    try:
        yield
    finally:
        _observer.reset(token)
