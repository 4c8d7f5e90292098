"""The profiler on a model whose delays and allocations are known; `microbenchmarks.profiler` is the strict form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from battery import PROMPTS

from visionselector_eval.baselines import build
from visionselector_eval.baselines.contract.budget import Share
from visionselector_eval.baselines.contract.decoder import ScoreDecoder
from visionselector_eval.harness.microbenchmarks import profiler as known
from visionselector_eval.harness.profiler.measure import BoundCell, Profiler, Prompt
from visionselector_eval.harness.profiler.memory import ResidentMemory, SampledMemory, weight_bytes
from visionselector_eval.harness.profiler.metrics import Flops, Memory, Plain, Time
from visionselector_eval.harness.profiler.phases import FIRST_TOKEN, PHASES, PhaseRecorder
from visionselector_eval.harness.profiler.spec import cell_of
from visionselector_eval.models.inputs import MediaSettings, build_inputs

CPU = torch.device("cpu")


class FakeClock:
    """Time that only known work moves on."""

    def __init__(self) -> None:
        self.now = 0.0
        self.settled: list[bool] = []

    def mark(self, settle: bool) -> float:
        self.settled.append(settle)
        return self.now

    def seconds(self, start: float, end: float) -> float:
        return end - start


def cell(method: str, role: str = "method") -> Any:
    return cell_of(role, method, method, {}, Share(0.25))


def test_every_phase_is_reported_exactly() -> None:
    clock = FakeClock()

    def work(phase: str) -> None:
        clock.now += known.SECONDS[phase]

    profiler, bound = known.profiler_of(work, CPU, clock)
    row = Time().measure(profiler, bound, Prompt("document", profiler.backbone.inputs()))
    truth = {**known.true_milliseconds(), "preprocess": None}
    for phase in PHASES[1:]:
        assert row[f"{phase}_ms"] == pytest.approx(truth[phase])
    assert row["ttft_ms"] == pytest.approx(sum(truth[phase] for phase in FIRST_TOKEN))
    assert row["latency_ms"] == pytest.approx(sum(truth[phase] for phase in PHASES[1:]))
    assert row["decode_token_ms"] == pytest.approx(1000 * known.SECONDS["decode"])
    assert (row["new_tokens"], row["visual_before"], row["visual_after"]) == (known.NEW_TOKENS, known.VISUAL, 4)
    assert row["text_tokens"] == known.TEXT
    assert row["layer_lengths"] == [known.TEXT + 4] * 2
    assert all(clock.settled), "the device settles at every border outside the LLM"
    assert Plain().measure(profiler, bound, Prompt("document", profiler.backbone.inputs()))[
        "latency_ms"
    ] == pytest.approx(row["latency_ms"])


def test_real_delays_are_at_least_what_they_are() -> None:
    times, truth = known.measured_milliseconds(2, CPU), known.true_milliseconds()
    for phase in PHASES:
        assert times[phase] >= truth[phase] - 0.1, phase


def test_hooks_are_gone_afterwards(tiny) -> None:
    inputs = build_inputs(tiny.processor, PROMPTS["one image"](), MediaSettings())
    bound = BoundCell(cell("fastv"), tiny.bind(build("fastv")))
    before = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in tiny.model.modules()]
    profiler = Profiler(tiny, 2)
    Time().measure(profiler, bound, Prompt("document", inputs))
    Memory().measure(profiler, bound, Prompt("document", inputs))
    Flops().measure(profiler, bound, Prompt("document", inputs))
    with pytest.raises(RuntimeError, match="broken"), PhaseRecorder(None).watching(tiny):
        raise RuntimeError("broken")
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in tiny.model.modules()] == before


def test_the_marks_change_no_answer(tiny) -> None:
    inputs = build_inputs(tiny.processor, PROMPTS["one image"](), MediaSettings())
    for name in ("divprune", "fastv", "downsample"):
        bound = BoundCell(cell(name), tiny.bind(build(name)))
        profiler = Profiler(tiny, 3)
        _, plain = profiler.answer(bound, Prompt("document", inputs), None)
        recorder = PhaseRecorder(FakeClock())
        with recorder.watching(tiny):
            _, marked = profiler.answer(bound, Prompt("document", inputs), recorder)
        assert plain.layer_lengths == marked.layer_lengths
        assert [k.tolist() for k in plain.kept] == [k.tolist() for k in marked.kept]


@dataclass(frozen=True, kw_only=True, eq=False)
class SlowInside(ScoreDecoder):
    """Takes known time where it chooses, at two layers of the LLM."""

    name = "slow"
    clock: FakeClock

    def layers(self, depth: int) -> tuple[int, ...]:
        return (1, 2)

    def counts(self, n: int, budget: Any, depth: int, total: int) -> tuple[int, ...]:
        return (n // 2, n // 4)

    def score(self, view: Any) -> Any:
        self.clock.now += 0.5
        return torch.arange(len(view.hidden)).float()


def test_a_method_inside_the_llm_interrupts_prefill(tiny) -> None:
    clock = FakeClock()
    inputs = tiny.to_device(build_inputs(tiny.processor, PROMPTS["one image"](), MediaSettings()))
    visual = tiny.visual_totals(inputs)[0]
    bound = BoundCell(cell("slow"), SlowInside(clock=clock))
    row = Time().measure(Profiler(tiny, 2, clock), bound, Prompt("document", inputs))
    assert row["compressor_ms"] == 1000.0
    assert row["prefill_ms"] == 0.0
    assert False in clock.settled, "borders inside the forward do not wait for the device"
    text = row["text_tokens"]
    seen = [visual, visual // 2, *[visual // 4] * 4]
    assert row["layer_lengths"] == [text + n for n in seen]
    assert row["visual_layers"] == pytest.approx(sum(seen) / 6)
    assert row["visual_after"] == visual // 4


def test_the_downsampling_control_pays_for_its_own_smaller_vision_pass(tiny) -> None:
    seen = []

    class Probe:
        def begin(self, phase: str) -> None:
            seen.append(phase)

        def end(self, phase: str) -> None:
            pass

    inputs = build_inputs(tiny.processor, PROMPTS["one image"](), MediaSettings())
    recorder = PhaseRecorder(None, [Probe()])
    with recorder.watching(tiny):
        Profiler(tiny, 2).answer(
            BoundCell(cell("downsample"), tiny.bind(build("downsample"))), Prompt("d", inputs), recorder
        )
    shown = [phase for phase in seen if phase in ("vision", "compressor")]
    assert shown[:2] == ["compressor", "vision"]
    assert shown.count("vision") == 1


# memory ---------------------------------------------------------------------------------------------------------------


def warmed_up(work: known.Work) -> tuple[Profiler, BoundCell]:
    """A profiler after an answer that nobody measures: a process's first one also brings in the pages of code that it
    runs, 10 to 40 MiB of the libraries. A profile has its own warm-up rounds for that."""
    profiler, bound = known.profiler_of(work, CPU)
    Memory().measure(profiler, bound, Prompt("warm-up", profiler.backbone.inputs()))
    return profiler, bound


@pytest.mark.skipif(not ResidentMemory.usable(), reason="the kernel's mark of resident memory can't be reset here")
def test_known_allocations_are_reported_within_a_mebibyte() -> None:
    found = known.measured_mib(CPU)
    for phase, true in known.MIB.items():
        assert found[phase] == pytest.approx(true, abs=1.0), phase


@pytest.mark.skipif(not ResidentMemory.usable(), reason="the kernel's mark of resident memory can't be reset here")
def test_holes_in_the_heap_are_no_part_of_a_peak() -> None:
    ResidentMemory().close()  # from here on tensors of less than 32 MiB come from the heap
    profiler, bound = warmed_up(Holes())
    for _ in range(2):
        row = Memory().measure(profiler, bound, Prompt("d", profiler.backbone.inputs()))
        assert row["rss_decode_bytes"] / 2**20 == pytest.approx(20, abs=1)


class Holes:
    """Leaves a hole of nearly 20 MiB behind every 20 MiB of a token."""

    def __init__(self) -> None:
        self.kept: list[torch.Tensor] = []

    def __call__(self, phase: str) -> None:
        if phase == "decode":
            large = torch.empty(20 << 20, dtype=torch.uint8).fill_(1)
            self.kept.append(torch.zeros(10_000))
            del large
            self.kept.append(torch.zeros(5_000))


def test_sampled_memory_sees_what_lasts_longer_than_its_interval() -> None:
    profiler, bound = warmed_up(Lingering())
    row = Memory(probe=lambda _: SampledMemory(0.001)).measure(profiler, bound, Prompt("d", profiler.backbone.inputs()))
    assert row["rss_vision_bytes"] / 2**20 == pytest.approx(known.MIB["vision"], abs=4)
    assert "every 1 ms" in row["memory_method"]


class Lingering:
    """Holds each phase's allocation for a moment."""

    def __call__(self, phase: str) -> None:
        import time

        if phase in known.MIB:
            held = torch.empty(known.MIB[phase] << 20, dtype=torch.uint8).fill_(1)
            time.sleep(0.03)
            del held


def test_weights_are_counted_once(tiny) -> None:
    tied = sum(p.numel() * p.element_size() for p in tiny.model.parameters())
    assert weight_bytes(tiny.model) == pytest.approx(tied, rel=0.01)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_known_delays_and_allocations_on_a_gpu() -> None:
    device = torch.device("cuda")
    times, truth = known.measured_milliseconds(5, device), known.true_milliseconds()
    for phase in PHASES:
        assert times[phase] == pytest.approx(truth[phase], abs=max(2.0, 0.02 * truth[phase])), phase
    found = known.measured_mib(device)
    for phase, true in known.MIB.items():
        assert found[phase] == pytest.approx(true, abs=1.0), phase
