"""Peak memory of each phase above what stood before: device memory on CUDA, the process's resident memory on a CPU."""

from __future__ import annotations

import ctypes
import gc
import os
import re
import threading
from contextlib import suppress
from pathlib import Path
from typing import Protocol

import psutil
import torch

_SAMPLING_SECONDS = 0.002
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of mallopt(3)
_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class MemoryProbe(Protocol):
    """A probe for `PhaseRecorder`.

    Attributes:
        method: how the peak is found, with its interval where it is sampled.
        baseline: bytes before the answer: weights, libraries, inputs.
        whole: largest absolute bytes seen.
        peaks: {measure: {phase: bytes above the baseline}}: `allocated` and `reserved` on CUDA, `rss` on a CPU.
    """

    method: str
    baseline: int
    whole: int
    peaks: dict[str, dict[str, int]]

    def begin(self, phase: str) -> None: ...

    def end(self, phase: str) -> None: ...

    def close(self) -> None:
        """Stop watching."""


class CudaMemory:
    """The caching allocator's own peaks, exact; its cache is emptied first, so that `reserved` means something."""

    method = "peaks of the caching allocator"

    def __init__(self, device: torch.device) -> None:
        self._device = device
        gc.collect()
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
        self.baseline = self.whole = torch.cuda.memory_allocated(device)
        self._reserved = torch.cuda.memory_reserved(device)
        self.peaks: dict[str, dict[str, int]] = {"allocated": {}, "reserved": {}}

    def begin(self, phase: str) -> None:
        torch.cuda.reset_peak_memory_stats(self._device)

    def end(self, phase: str) -> None:
        allocated = torch.cuda.max_memory_allocated(self._device)
        self.whole = max(self.whole, allocated)
        _raise(self.peaks["allocated"], phase, allocated - self.baseline)
        _raise(self.peaks["reserved"], phase, torch.cuda.max_memory_reserved(self._device) - self._reserved)

    def close(self) -> None:
        pass


class ResidentMemory:
    """The kernel's own high-water mark of this process's resident memory, reset at every border (Linux).

    While it watches, glibc gives every tensor of 64 KiB and more pages of its own and takes them back at once. From its
    heap, which tensors of up to 32 MiB come from in a process that has freed some, holes between them would be counted,
    too, as many as what ran before happened to leave.
    """

    method = "VmHWM, reset at each border"

    def __init__(self) -> None:
        _own_pages(from_bytes=1 << 16)
        settle_heap()
        self._reset()
        self.baseline = self.whole = _status("VmRSS")
        self.peaks: dict[str, dict[str, int]] = {"rss": {}}

    @staticmethod
    def usable() -> bool:
        """Whether the mark can be read and reset here."""
        try:
            ResidentMemory._reset()
            return _status("VmHWM") > 0
        except OSError:
            return False

    @staticmethod
    def _reset() -> None:
        _CLEAR.write_text("5", encoding="utf-8")

    def begin(self, phase: str) -> None:
        trim_heap()
        self._reset()

    def end(self, phase: str) -> None:
        peak = _status("VmHWM")
        self.whole = max(self.whole, peak)
        _raise(self.peaks["rss"], phase, peak - self.baseline)

    def close(self) -> None:
        # Where glibc's own rule, which can't be switched on again, ends up in a process that frees large tensors.
        _own_pages(from_bytes=1 << 25)


class SampledMemory:
    """Resident memory read again and again by a thread: for systems where the kernel's mark can't be reset.

    Args:
        interval: seconds between two readings; a peak that is shorter can be missed.
    """

    def __init__(self, interval: float = _SAMPLING_SECONDS) -> None:
        self.method = f"resident memory sampled every {1000 * interval:g} ms"
        settle_heap()
        self._process = psutil.Process()
        self.baseline = self.whole = self._process.memory_info().rss
        self.peaks: dict[str, dict[str, int]] = {"rss": {}}
        self._phase: str | None = None
        self._lock = threading.Lock()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, args=(interval,), daemon=True, name="resident-memory")
        self._thread.start()

    def _watch(self, interval: float) -> None:
        while not self._done.wait(interval):
            self._read()

    def _read(self) -> None:
        with self._lock:
            now = self._process.memory_info().rss
            self.whole = max(self.whole, now)
            if self._phase is not None:
                _raise(self.peaks["rss"], self._phase, now - self.baseline)

    def begin(self, phase: str) -> None:
        trim_heap()
        with self._lock:
            self._phase = phase

    def end(self, phase: str) -> None:
        self._read()
        with self._lock:
            self._phase = None

    def close(self) -> None:
        self._done.set()
        self._thread.join()


def memory_probe(device: torch.device) -> MemoryProbe:
    """The most exact probe that works on this device and system."""
    if device.type == "cuda":
        return CudaMemory(device)
    return ResidentMemory() if ResidentMemory.usable() else SampledMemory()


def trim_heap() -> None:
    """Give free memory back to the system (glibc keeps it else), so that what one phase freed is not the next one's."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _own_pages(from_bytes: int) -> None:
    """Have glibc map what is at least so large by itself, and keep at most twice as much of what is freed."""
    with suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(_M_MMAP_THRESHOLD, from_bytes)
        libc.mallopt(_M_TRIM_THRESHOLD, 2 * from_bytes)


def settle_heap() -> None:
    """Collect garbage and give free memory back, so that the next answer's pages count as its own."""
    gc.collect()
    trim_heap()


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes of all parameters and buffers, shared ones once."""
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in _tensors(model)}
    return sum(storages.values())


def _tensors(model: torch.nn.Module) -> list[torch.Tensor]:
    return [*model.parameters(), *model.buffers()]


def _raise(peaks: dict[str, int], phase: str, value: int) -> None:
    peaks[phase] = max(peaks.get(phase, 0), value)


def _status(field: str) -> int:
    """A size from /proc/self/status in bytes."""
    with open(_STATUS, "rb", buffering=0) as file:
        found = re.search(rb"^%s:\s+(\d+) kB" % os.fsencode(field), file.read(), re.MULTILINE)
    if found is None:
        raise OSError(f"{_STATUS} has no {field}")
    return int(found[1]) * 1024
