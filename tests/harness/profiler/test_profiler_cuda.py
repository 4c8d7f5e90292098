"""The CUDA clock and memory probe against a driver that is played: order of calls and arithmetic, without a GPU."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from visionselector_eval.harness.profiler.memory import CudaMemory, memory_probe
from visionselector_eval.harness.profiler.nvml import Nvml
from visionselector_eval.harness.profiler.phases import CudaClock, PhaseRecorder, WallClock, clock_for

DEVICE = torch.device("cuda", 0)


class Driver:
    """A stream whose work takes known milliseconds, and an allocator with peaks."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[str] = []
        self.allocated = self.reserved = self.peak = self.peak_reserved = 0

    def event(self, enable_timing: bool) -> Any:
        assert enable_timing
        made = SimpleNamespace(at=None)

        def record(stream: Any) -> None:
            made.at = self.now
            self.calls.append("record")

        made.record = record
        made.synchronize = lambda: self.calls.append("synchronize")
        made.elapsed_time = lambda other: other.at - made.at
        return made

    def allocate(self, size: int) -> None:
        self.allocated += size
        self.reserved = max(self.reserved, self.allocated)
        self.peak = max(self.peak, self.allocated)
        self.peak_reserved = max(self.peak_reserved, self.reserved)

    def reset(self, device: Any) -> None:
        self.peak, self.peak_reserved = self.allocated, self.reserved


@pytest.fixture
def driver(monkeypatch) -> Driver:
    played = Driver()
    for name, value in {
        "Event": played.event,
        "current_stream": lambda device: "stream",
        "synchronize": lambda device=None: played.calls.append("settle"),
        "empty_cache": lambda: played.calls.append("empty"),
        "memory_allocated": lambda device: played.allocated,
        "memory_reserved": lambda device: played.reserved,
        "max_memory_allocated": lambda device: played.peak,
        "max_memory_reserved": lambda device: played.peak_reserved,
        "reset_peak_memory_stats": played.reset,
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return played


def test_the_device_decides_on_the_clock() -> None:
    assert isinstance(clock_for(DEVICE), CudaClock)
    assert isinstance(clock_for(torch.device("cpu")), WallClock)


def test_phases_are_timed_by_events_that_settle_at_outer_borders(driver) -> None:
    recorder = PhaseRecorder(CudaClock(DEVICE))
    recorder.switch("vision")
    driver.now += 40
    recorder.switch("prefill")
    recorder._in_forward = True
    driver.now += 5
    with recorder.during("compressor"):
        driver.now += 2
    driver.now += 3
    recorder._in_forward = False
    recorder.switch(None)
    assert driver.calls == ["record", "synchronize"] * 2 + ["record"] * 2 + ["record", "synchronize"]
    seconds = recorder.seconds()
    assert {phase: round(1000 * s, 6) for phase, s in seconds.items() if s} == {
        "vision": 40.0,
        "prefill": 8.0,
        "compressor": 2.0,
    }


def test_memory_is_the_peak_of_each_phase_above_the_weights(driver) -> None:
    driver.allocate(1000)
    recorder = PhaseRecorder(None, [probe := memory_probe(DEVICE)])
    assert isinstance(probe, CudaMemory)
    assert "empty" in driver.calls
    recorder.switch("vision")
    driver.allocate(64)
    driver.allocate(-64)
    recorder.switch("prefill")
    driver.allocate(30)
    with recorder.during("compressor"):
        driver.allocate(16)
        driver.allocate(-16)
    driver.allocate(10)
    recorder.switch(None)
    assert probe.baseline == 1000
    assert probe.peaks["allocated"] == {"vision": 64, "prefill": 40, "compressor": 46}
    assert probe.whole == 1064
    assert set(probe.peaks["reserved"]) == {"vision", "prefill", "compressor"}


def test_nvml_without_a_driver_gives_its_reason(monkeypatch) -> None:
    import pynvml

    def broken() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", broken)
    assert str(Nvml.find(DEVICE)).startswith("NVML: ")


def test_nvml_finds_the_gpu_that_torch_means(monkeypatch) -> None:
    import pynvml

    asked = []
    monkeypatch.setattr(pynvml, "nvmlInit", lambda: None)
    monkeypatch.setattr(pynvml, "nvmlDeviceGetHandleByUUID", lambda uuid: asked.append(uuid) or "handle")
    monkeypatch.setattr(pynvml, "nvmlDeviceGetPowerUsage", lambda handle: 123_000)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid="abc-1"))
    gpu = Nvml.find(DEVICE)
    assert isinstance(gpu, Nvml)
    assert asked == ["GPU-abc-1"]
    assert gpu.watts() == 123.0
