"""Where the time of one answer goes: marks at the borders of its phases, set by hooks that are gone afterwards.

At any moment exactly one phase is running, so the phases sum to the whole and nothing is counted twice. The borders:

- `vision` and `compressor`: the steps of `models.steps`; a method inside the LLM interrupts `prefill` at its layers.
- `setup`: the host's work of `generate()` before the LLM's first forward; the same for every method.
- `prefill`: token embeddings, positions and assembly of the shorter prompt, then the LLM's first forward with the
  logits of the last position.
- `decode`: everything after it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol

import torch

from visionselector_eval.models.generation import kv_cache
from visionselector_eval.models.instrumentation import Step, observed

if TYPE_CHECKING:
    from visionselector_eval.models.backbones.base import Backbone

PHASES = ("preprocess", "vision", "compressor", "prefill", "setup", "decode")
"""All phases, in the order of plots. Time to first token is vision + compressor + prefill."""
FIRST_TOKEN = ("vision", "compressor", "prefill")


class Clock(Protocol):
    """A source of marks in time."""

    def mark(self, settle: bool) -> Any:
        """The present moment. `settle`: wait until the device has done what it was given."""

    def seconds(self, start: Any, end: Any) -> float:
        """Time between two marks; may wait for the device."""


class WallClock:
    """`perf_counter`, for the CPU."""

    def mark(self, settle: bool) -> float:
        return time.perf_counter()

    def seconds(self, start: float, end: float) -> float:
        return end - start


class CudaClock:
    """CUDA events on the current stream of `device`.

    A border that settles waits for the device after its event: the next phase then begins with an idle device, and its
    launches are its own. Borders inside the LLM's forward do not wait, so that the queue of launches is what it is
    without a profiler; their events still stand between the right kernels.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def mark(self, settle: bool) -> torch.cuda.Event:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        if settle:
            event.synchronize()
        return event

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        end.synchronize()
        return start.elapsed_time(end) / 1000


def clock_for(device: torch.device) -> Clock:
    """The clock of a device: events on CUDA, `perf_counter` elsewhere."""
    return CudaClock(device) if device.type == "cuda" else WallClock()


class Probe(Protocol):
    """Something else than time that is measured phase by phase."""

    def begin(self, phase: str) -> None:
        """A phase starts."""

    def end(self, phase: str) -> None:
        """It ends, or is interrupted by another one."""


class PhaseRecorder:
    """Marks the borders of the phases of one answer.

    Args:
        clock: for time; None measures none.
        probes: are told of every border.
    """

    def __init__(self, clock: Clock | None, probes: Sequence[Probe] = ()) -> None:
        self._clock = clock
        self._probes = list(probes)
        self._segments: list[tuple[str, Any, Any]] = []
        self._phase: str | None = None
        self._since: Any = None
        self._in_forward = False
        self.forwards = 0
        self.prompt_cache: Any = None
        """Bytes and lengths of the cache after the prompt, where `watching(..., cache=True)`."""

    def switch(self, phase: str | None, *, settle: bool = True) -> None:
        """End the present phase and begin another; None ends the recording."""
        now = self._clock.mark(settle) if self._clock is not None else None
        if self._phase is not None:
            self._segments.append((self._phase, self._since, now))
            for probe in self._probes:
                probe.end(self._phase)
        self._phase, self._since = phase, now
        if phase is not None:
            for probe in self._probes:
                probe.begin(phase)

    @contextmanager
    def during(self, phase: str) -> Iterator[None]:
        """`phase` interrupts the present one for the length of the block."""
        before, settle = self._phase, not self._in_forward
        self.switch(phase, settle=settle)
        try:
            yield
        finally:
            self.switch(before, settle=settle)

    @contextmanager
    def watching(self, backbone: Backbone, *, cache: bool = False) -> Iterator[None]:
        """Hooks for one answer: the steps of the run, and the LLM's first forward.

        Args:
            cache: look at the cache after the prompt; takes time, so not while time is measured.
        """

        def before(module: Any, args: Any, kwargs: Any) -> None:
            if self.forwards == 0:
                self.switch("prefill")
                self._in_forward = True

        def after(module: Any, args: Any, kwargs: Any, output: Any) -> None:
            if self.forwards == 0:
                self._in_forward = False
                self.switch("decode")
                if cache:
                    self.prompt_cache = cache_state(kv_cache(output))
            self.forwards += 1

        def enter(name: Step) -> Any:
            return self.during(name)

        handles = [
            backbone.model.register_forward_pre_hook(before, with_kwargs=True),
            backbone.model.register_forward_hook(after, with_kwargs=True),
        ]
        try:
            with observed(enter):
                yield
        finally:
            for handle in handles:
                handle.remove()

    def seconds(self) -> dict[str, float]:
        """Seconds of every phase; 0 for those that did not occur."""
        total = dict.fromkeys(PHASES, 0.0)
        if self._clock is not None:
            for phase, start, end in self._segments:
                total[phase] += self._clock.seconds(start, end)
        return total


def cache_state(cache: Any) -> tuple[int, list[int]] | None:
    """Bytes of all keys and values, and the tokens held by each layer; None where there is no cache to look at."""
    layers = getattr(cache, "layers", None)
    if not layers:
        return None
    held = [(layer.keys, layer.values) for layer in layers if getattr(layer, "keys", None) is not None]
    size = sum(t.numel() * t.element_size() for pair in held for t in pair)
    return size, [keys.shape[-2] for keys, _ in held]
