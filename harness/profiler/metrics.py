"""What a profile measures: one class a metric, which says how it is measured, in which rounds, and what tables show.

A metric of your own is a class here and its name in `METRICS`.
"""

from __future__ import annotations

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import pandas as pd
import torch

from visionselector_eval.harness.profiler.flops import (
    FlopProbe,
    theoretical_decode,
    theoretical_output,
    theoretical_prefill,
)
from visionselector_eval.harness.profiler.measure import BoundCell, Profiler, Prompt
from visionselector_eval.harness.profiler.memory import MemoryProbe, memory_probe
from visionselector_eval.harness.profiler.nvml import Nvml, NvmlSampler
from visionselector_eval.harness.profiler.phases import FIRST_TOKEN, PHASES, PhaseRecorder
from visionselector_eval.harness.profiler.ratios import Ratio, by_round, median, paired_ratio
from visionselector_eval.harness.profiler.spec import FULL, LIMIT

if TYPE_CHECKING:
    from visionselector_eval.harness.profiler.store import Profile

QUANTILES = (0.1, 0.5, 0.9, 0.99)
_MIB = 2**20
# The LLM's own, where a vision encoder that no method touches does not hide what is saved.
_LLM_PHASES = ("prefill", "setup", "decode")
_FLOP_ROUNDS = 8  # of a task's documents, whose sizes differ; FLOPs of one prompt are always the same
_PUBLISHED_EVERY = 5  # rounds in which prefill is also taken as the published harness defines it

Line = Mapping[str, Any]
"""A row of the summary: one cell on one workload."""


@dataclass(frozen=True)
class ProfilePlan:
    """How often everything is run; see `ProfileSpec`."""

    repeats: int = 50
    warmup: int = 10
    memory_rounds: int = 3
    energy_seconds: float = 2.0
    new_tokens: int = 8
    seed: int = 0


@dataclass(frozen=True)
class CellRows:
    """The rows of one cell on one workload, and of those that it is compared with."""

    cell: Mapping[str, Any]
    own: pd.DataFrame
    full: pd.DataFrame
    limit: pd.DataFrame
    profile: Profile

    def of(self, kind: str, rows: pd.DataFrame | None = None) -> pd.DataFrame:
        """Rows of a metric: the cell's own, or of `rows`."""
        rows = self.own if rows is None else rows
        return rows[rows["kind"] == kind]


@dataclass(frozen=True)
class Column:
    """A column of a workload's table: its head, with the unit where the numbers need one, and its text for a row."""

    head: str
    text: Callable[[Line], str]


class Metric(ABC):
    """Something that is measured.

    Args:
        plan: how often everything is run.
        gpu: what `Nvml.find` gave.

    Attributes:
        kind: its name in the rows of a profile.
        unit: of its numbers.
        warmed_up: whether a cell is warmed up for it.
        columns: what it adds to a workload's table.
    """

    kind: ClassVar[str]
    unit: ClassVar[str]
    warmed_up: ClassVar[bool] = False
    columns: ClassVar[tuple[Column, ...]] = ()

    def __init__(self, plan: ProfilePlan | None = None, gpu: Any = None) -> None:
        self.plan, self.gpu = plan or ProfilePlan(), gpu

    def in_timed_round(self, cells: Sequence[BoundCell], number: int) -> Sequence[BoundCell]:
        """The cells that it is measured for in a timed round, among the timed answers."""
        return ()

    def own_rounds(self, items: int) -> int:
        """Rounds of its own, in which every cell is measured once, on a workload of so many items."""
        return 0

    @abstractmethod
    def measure(self, run: Profiler, bound: BoundCell, prompt: Prompt) -> dict[str, Any]:
        """Measure one cell on one prompt; the values of a row."""

    def summarise(self, rows: CellRows, line: Line) -> dict[str, Any]:
        """What the summary says of a cell.

        Args:
            line: what the metrics before this one said.
        """
        return {}


# Text of numbers ------------------------------------------------------------------------------------------------------


def number_text(value: Any, form: str = ".1f") -> str:
    """A number for a table; `-` for none."""
    return "-" if value is None or (isinstance(value, float) and math.isnan(value)) else format(value, form)


def speedup_text(line: Line) -> str:
    """The speed-up of time to first token with its interval."""
    return str(Ratio(line["speedup"], line["speedup_low"], line["speedup_high"], line["rounds"]))


def _number(key: str, form: str = ".1f") -> Callable[[Line], str]:
    return lambda line: number_text(line[key], form)


def _percent(key: str, *, of_full: str | None = None) -> Callable[[Line], str]:
    def text(line: Line) -> str:
        if of_full is not None and line["role"] == FULL:
            return of_full
        return "-" if math.isnan(line[key]) else f"{100 * line[key]:.0f}%"

    return text


# Metrics --------------------------------------------------------------------------------------------------------------


class Time(Metric):
    """Time by phase, and the tokens that entered the LLM."""

    kind, unit, warmed_up = "time", "ms", True
    columns = (
        Column("tokens kept", _number("visual_after")),
        Column("layer avg", _number("visual_layers")),
        Column(
            "first token ms (p10, p90)",
            lambda r: f"{number_text(r['ttft_p50'])} ({number_text(r['ttft_p10'])}, {number_text(r['ttft_p90'])})",
        ),
        Column("speed-up", lambda r: "1" if r["role"] == FULL else speedup_text(r)),
        Column("of ideal", _percent("of_ideal")),
        Column("vision", _number("vision_ms")),
        Column("compressor", _number("compressor_ms", ".2f")),
        Column("prefill", _number("prefill_ms")),
        Column("decode/token", _number("decode_token_p50")),
        Column("latency", _number("latency_p50")),
    )

    def in_timed_round(self, cells: Sequence[BoundCell], number: int) -> Sequence[BoundCell]:
        return cells

    def measure(self, run: Profiler, bound: BoundCell, prompt: Prompt) -> dict[str, Any]:
        """Milliseconds of each phase, and what entered the LLM."""
        recorder = PhaseRecorder(run.clock)
        with recorder.watching(run.backbone):
            run.settle()
            compressed, entered = run.answer(bound, prompt, recorder)
        seconds = recorder.seconds()
        steps = recorder.forwards - 1
        before = sum(compressed.totals)
        return {
            "preprocess_ms": 1000 * prompt.seconds,
            **{f"{phase}_ms": 1000 * seconds[phase] for phase in PHASES if phase != "preprocess"},
            "ttft_ms": 1000 * sum(seconds[phase] for phase in FIRST_TOKEN),
            "latency_ms": 1000 * sum(seconds.values()),
            "decode_token_ms": 1000 * seconds["decode"] / steps if steps > 0 else math.nan,
            "new_tokens": recorder.forwards,
            "visual_before": before,
            "visual_after": sum(len(kept) for kept in entered.kept),
            "visual_layers": sum(entered.layer_tokens),
            "text_tokens": int(prompt.inputs["attention_mask"].sum()) - before,
            "layer_lengths": list(entered.layer_lengths),
        }

    def summarise(self, rows: CellRows, line: Line) -> dict[str, Any]:
        time, full = rows.of("time"), rows.of("time", rows.full)
        said: dict[str, Any] = {f"{phase}_ms": median(time, f"{phase}_ms") for phase in PHASES}
        if rows.cell["role"] == LIMIT and len(time):
            time = _for_nothing(time)
            said["compressor_ms"] = 0.0
        for name in ("ttft", "latency", "decode_token", "preprocess"):
            for q in QUANTILES:
                column = f"{name}_ms"
                empty = column not in time or not time[column].notna().any()
                said[f"{name}_p{100 * q:.0f}"] = math.nan if empty else float(time[column].quantile(q))
        for prefix, column in (("", "ttft_ms"), ("latency_", "latency_ms")):
            ratio = paired_ratio(by_round(full, column), by_round(time, column))
            said |= {f"{prefix}speedup": ratio.estimate, f"{prefix}speedup_low": ratio.low}
            said |= {f"{prefix}speedup_high": ratio.high}
        limit = _for_nothing(rows.of("time", rows.limit))
        ideal = paired_ratio(by_round(limit, "ttft_ms"), by_round(time, "ttft_ms"))
        said["of_ideal"] = ideal.estimate if rows.cell["role"] == "method" else math.nan
        said["compressor_share"] = said["compressor_ms"] / median(full, "prefill_ms")
        for name in ("visual_before", "visual_after", "visual_layers", "text_tokens", "new_tokens"):
            said[name] = float(time[name].mean()) if name in time and len(time) else math.nan
        said["published_latency_ms"] = float(time["latency_ms"].mean()) if len(time) else math.nan
        said["layer_lengths"] = _runs(list(time["layer_lengths"].iloc[-1])) if len(time) else ""
        return said


class Plain(Metric):
    """Time of a whole answer without marks inside: what the profiler's own marks cost (`report.overhead`)."""

    kind, unit, warmed_up = "plain", "ms", True

    def in_timed_round(self, cells: Sequence[BoundCell], number: int) -> Sequence[BoundCell]:
        return [cells[number % len(cells)]] if cells else []  # one cell a round, in turn

    def measure(self, run: Profiler, bound: BoundCell, prompt: Prompt) -> dict[str, Any]:
        """Milliseconds of the whole answer with no marks inside, for the profiler's own overhead."""
        run.settle()
        start = run.clock.mark(True)
        run.answer(bound, prompt, None)
        return {"latency_ms": 1000 * run.clock.seconds(start, run.clock.mark(True))}


class Published(Metric):
    """Prefill as the published harness takes it."""

    kind, unit = "published", "ms"

    def in_timed_round(self, cells: Sequence[BoundCell], number: int) -> Sequence[BoundCell]:
        return cells if number % _PUBLISHED_EVERY == 0 else ()

    def measure(self, run: Profiler, bound: BoundCell, prompt: Prompt) -> dict[str, Any]:
        """Milliseconds of prefill as the published harness takes it.

        Around one forward: token embeddings, vision encoder, compression, LLM, and logits of all positions.
        """
        head = run.backbone.model.get_output_embeddings()
        run.settle()
        with torch.no_grad():
            start = run.clock.mark(True)
            out = run.backbone.run_llm(run.compress(bound, prompt))
            head(out.hidden)
            return {"published_prefill_ms": 1000 * run.clock.seconds(start, run.clock.mark(True))}

    def summarise(self, rows: CellRows, line: Line) -> dict[str, Any]:
        own = rows.of("published")
        known = "published_prefill_ms" in own
        return {"published_prefill_ms": float(own["published_prefill_ms"].mean()) if known else math.nan}


class Memory(Metric):
    """Peak memory of each phase above what stood before, and the cache after the prompt.

    Args:
        probe: makes what watches the memory of a device.
    """

    kind, unit = "memory", "bytes"
    columns = (
        Column("KV MiB", _number("kv_mib")),
        Column("peak MiB", _number("memory_mib")),
        Column("LLM's", _number("llm_mib")),
        Column("saved", _percent("memory_saved", of_full="-")),
        Column("LLM's saved", _percent("llm_saved", of_full="-")),
    )

    def __init__(
        self,
        plan: ProfilePlan | None = None,
        gpu: Any = None,
        probe: Callable[[torch.device], MemoryProbe] = memory_probe,
    ) -> None:
        super().__init__(plan, gpu)
        self._probe = probe

    def own_rounds(self, items: int) -> int:
        return self.plan.memory_rounds

    def measure(self, run: Profiler, bound: BoundCell, prompt: Prompt) -> dict[str, Any]:
        """Peak bytes of each phase above what stood before, and the cache after the prompt."""
        watch = self._probe(run.device)
        recorder = PhaseRecorder(None, [watch])
        try:
            with recorder.watching(run.backbone, cache=True):
                run.answer(bound, prompt, recorder)
                run.settle()
        finally:
            watch.close()
        cached = recorder.prompt_cache
        peaks = {
            f"{measure}_{phase}_bytes": value
            for measure, found in watch.peaks.items()
            for phase, value in found.items()
        }
        highest = {f"{measure}_bytes": max(found.values(), default=0) for measure, found in watch.peaks.items()}
        return {
            **peaks,
            **highest,
            "baseline_bytes": watch.baseline,
            "whole_bytes": watch.whole,
            "memory_method": watch.method,
            "kv_bytes": cached[0] if cached else None,
            "cache_lengths": cached[1] if cached else None,
        }

    def summarise(self, rows: CellRows, line: Line) -> dict[str, Any]:
        memory, full = rows.of("memory"), rows.of("memory", rows.full)
        every = rows.profile.rows
        # Device memory where there is one.
        device = "allocated_bytes" in every and every["allocated_bytes"].notna().any()
        measure = "allocated" if device else "rss"
        said = {
            "kv_mib": median(memory, "kv_bytes") / _MIB,
            "reserved_mib": median(memory, "reserved_bytes") / _MIB,
            "whole_gib": float(memory["whole_bytes"].mean()) / 2**30 if "whole_bytes" in memory else math.nan,
        }
        for prefix, phases in (("memory", PHASES), ("llm", _LLM_PHASES)):
            own, whole = peak(memory, measure, phases), peak(full, measure, phases)
            said[f"{prefix}_mib"] = own / _MIB
            said[f"{prefix}_saved"] = 1 - own / whole if whole else math.nan
        return said


class Flops(Metric):
    """Operations of each phase, counted and as the shapes ask for, and the attention kernels that ran."""

    kind, unit = "flops", "FLOPs"

    def own_rounds(self, items: int) -> int:
        return min(items, _FLOP_ROUNDS)

    def measure(self, run: Profiler, bound: BoundCell, prompt: Prompt) -> dict[str, Any]:
        """Counted operations of each phase, those that the shapes ask for, and the attention kernels that ran."""
        probe = FlopProbe()
        recorder = PhaseRecorder(None, [probe])
        with probe, recorder.watching(run.backbone):
            _, entered = run.answer(bound, prompt, recorder)
        whole = run.backbone.model.config
        config, lengths = whole.get_text_config(), entered.layer_lengths
        same_image = bound.compressor.stage != "pixels"
        layers = theoretical_prefill(config, lengths)
        return {
            **{f"{phase}_flops": n for phase, n in probe.flops.items()},
            "layer_flops": layers,
            "theory_vision_flops": run.backbone.vision_flops(prompt.inputs) if same_image else None,
            "theory_prefill_flops": sum(layers) + theoretical_output(config),
            "theory_decode_flops": theoretical_decode(config, lengths, recorder.forwards),
            "attention_kernels": sorted(probe.kernels.get("prefill", ())),
        }

    def summarise(self, rows: CellRows, line: Line) -> dict[str, Any]:
        own, said = rows.of("flops"), {}
        for phase in ("vision", "compressor", "prefill", "decode"):
            said[f"{phase}_gflop"] = median(own, f"{phase}_flops") / 1e9
        for phase in ("vision", "prefill", "decode"):
            said[f"theory_{phase}_gflop"] = median(own, f"theory_{phase}_flops") / 1e9
            seconds = line[f"{phase}_ms"] / 1000
            rate = 1e9 * said[f"{phase}_gflop"] / seconds if seconds else math.nan
            said[f"{phase}_of_ceiling"] = rate / rows.profile.about["ceiling_flops"]
        kernels = own["attention_kernels"].iloc[-1] if "attention_kernels" in own and len(own) else []
        return {**said, "attention_kernels": " ".join(str(k).rpartition(".")[2] for k in kernels)}


class Energy(Metric):
    """Joules of one answer, from as many as fit into the plan's seconds; on NVIDIA GPUs."""

    kind, unit = "energy", "J"
    columns = (Column("J", _number("joules")),)

    def own_rounds(self, items: int) -> int:
        return int(isinstance(self.gpu, Nvml) and self.plan.energy_seconds > 0)

    def measure(self, run: Profiler, bound: BoundCell, prompt: Prompt) -> dict[str, Any]:
        """Joules of one answer, from as many as fit into `seconds`."""
        answers, end = 0, time.perf_counter() + self.plan.energy_seconds
        run.settle()
        with NvmlSampler(self.gpu) as sampler:
            while answers == 0 or time.perf_counter() < end:
                run.answer(bound, prompt, None)
                run.settle()
                answers += 1
        reading = sampler.reading
        assert reading is not None
        return {
            "joules": reading.joules / answers,
            "watts": reading.watts,
            "device_bytes": reading.bytes,
            "energy_answers": answers,
            "energy_source": reading.source,
        }

    def summarise(self, rows: CellRows, line: Line) -> dict[str, Any]:
        own, full = rows.of("energy"), rows.of("energy", rows.full)
        joules = median(own, "joules")
        return {
            "joules": joules,
            "watts": median(own, "watts"),
            "energy_saved": 1 - joules / median(full, "joules"),
        }


METRICS: tuple[type[Metric], ...] = (Time, Plain, Published, Memory, Flops, Energy)
"""All metrics, in the order of their rounds and of the tables' columns."""


def peak(memory: pd.DataFrame, measure: str, phases: Sequence[str]) -> float:
    """Bytes: the largest peak among `phases`, each the smallest of its rounds; median over the items of a workload.

    Args:
        memory: one row a round, with `item` and `<measure>_<phase>_bytes`.
        measure: allocated, reserved or rss.

    Returns:
        nan without rows, or without any of the columns.

        What an allocator holds beside an answer's own tensors (scratch memory that a library kept, pages of another
        phase) comes and goes between rounds of the same answer, and twice the peak is nothing rare on a CPU. Peaks that
        are sampled can be missed as well, so there it is the median.
    """
    columns = [c for p in phases if (c := f"{measure}_{p}_bytes") in memory]
    if not columns or memory.empty:
        return math.nan
    sampled = memory["memory_method"].astype(str).str.contains("sampled").any() if "memory_method" in memory else False
    by_item = memory.groupby("item")[columns].agg("median" if sampled else "min")
    return float(by_item.max(axis=1).median())


def _for_nothing(time: pd.DataFrame) -> pd.DataFrame:
    """Timed rows of a limit, without its compressor: the whole vision pass, and the LLM over the shorter prompt."""
    if not len(time):
        return time
    spent = time["compressor_ms"]
    return time.assign(ttft_ms=time["ttft_ms"] - spent, latency_ms=time["latency_ms"] - spent, compressor_ms=0.0)


def _runs(lengths: Sequence[int]) -> str:
    """Tokens entering each layer, equal neighbours together: `311 x2, 107 x26`."""
    runs: list[list[int]] = []
    for length in lengths:
        if runs and runs[-1][0] == int(length):
            runs[-1][1] += 1
        else:
            runs.append([int(length), 1])
    return ", ".join(f"{length} x{count}" for length, count in runs)
