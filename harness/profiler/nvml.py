"""Power, energy and memory of an NVIDIA GPU through NVML, sampled by a thread; where there is none, the reason."""

from __future__ import annotations

import statistics
import threading
import time
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch

INTERVAL = 0.02  # seconds between two readings


@dataclass(frozen=True)
class Reading:
    """What a GPU used over a stretch of time.

    Attributes:
        seconds: its length.
        joules: energy, from the driver's counter, else the mean power times the seconds.
        watts: mean power over the samples.
        bytes: largest memory in use on the device, by all processes.
        samples: readings.
        source: where `joules` comes from.
    """

    seconds: float
    joules: float
    watts: float
    bytes: int
    samples: int
    source: str


class Nvml:
    """One GPU as NVML sees it. `Nvml.find` gives one, or the reason why there is none."""

    def __init__(self, library: Any, handle: Any) -> None:
        self._library, self._handle = library, handle

    @classmethod
    def find(cls, device: torch.device) -> Nvml | str:
        """The GPU that torch calls `device`; else a reason for people.

        The two are matched by UUID: torch counts the devices that CUDA_VISIBLE_DEVICES leaves, NVML counts all.
        """
        if device.type != "cuda":
            return f"device is {device.type}, NVML is for NVIDIA GPUs"
        try:
            import pynvml
        except ImportError:
            return "nvidia-ml-py is not installed"
        try:
            pynvml.nvmlInit()
            uuid = str(torch.cuda.get_device_properties(device).uuid)
            handle = pynvml.nvmlDeviceGetHandleByUUID(uuid if uuid.startswith(("GPU-", "MIG-")) else f"GPU-{uuid}")
            pynvml.nvmlDeviceGetPowerUsage(handle)
        except Exception as error:  # no driver, no permission, a MIG slice: the column stays empty and says why
            return f"NVML: {error}"
        return cls(pynvml, handle)

    def watts(self) -> float:
        """Present power draw."""
        return self._library.nvmlDeviceGetPowerUsage(self._handle) / 1000

    def used_bytes(self) -> int:
        """Memory in use on the device."""
        return int(self._library.nvmlDeviceGetMemoryInfo(self._handle).used)

    def joules(self) -> float | None:
        """The driver's energy counter; None on GPUs before Volta."""
        try:
            return self._library.nvmlDeviceGetTotalEnergyConsumption(self._handle) / 1000
        except Exception:
            return None


class NvmlSampler:
    """Samples a GPU while a block runs; `reading` afterwards.

    Args:
        gpu: from `Nvml.find` (anything with watts, used_bytes and joules).
        interval: seconds between two readings.
    """

    def __init__(self, gpu: Any, interval: float = INTERVAL) -> None:
        self._gpu, self._interval = gpu, interval
        self._done = threading.Event()
        self._watts: list[float] = []
        self._bytes = 0
        self.reading: Reading | None = None

    def __enter__(self) -> Self:
        self._read()
        self._energy, self._start = self._gpu.joules(), time.perf_counter()
        self._thread = threading.Thread(target=self._watch, daemon=True, name="nvml")
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._done.wait(self._interval):
            self._read()

    def _read(self) -> None:
        self._watts.append(self._gpu.watts())
        self._bytes = max(self._bytes, self._gpu.used_bytes())

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._done.set()
        self._thread.join()
        self._read()
        seconds, energy = time.perf_counter() - self._start, self._gpu.joules()
        watts = statistics.fmean(self._watts)
        counted = energy is not None and self._energy is not None and energy > self._energy
        joules = energy - self._energy if counted else watts * seconds
        source = "energy counter" if counted else f"power sampled every {1000 * self._interval:g} ms"
        self.reading = Reading(seconds, joules, watts, self._bytes, len(self._watts), source)
