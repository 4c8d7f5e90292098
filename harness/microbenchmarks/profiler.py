"""The profiler against a model whose delays and allocations are known.

    python -m visionselector_eval.harness.microbenchmarks.profiler --repeats 20

Exit code 1 unless every phase's median is within 2 ms or 2 % of the truth, and every peak within 1 MiB. For a quiet
machine: on a busy one a sleep itself is late. With `--device cuda` the delays are kernels that spin for a known time,
and the allocations are the device's.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pandas as pd
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from visionselector_eval.baselines.contract.base import Compressor, ScoreCompressor, VisualTokens
from visionselector_eval.baselines.contract.budget import Budget, Share
from visionselector_eval.harness.profiler.measure import BoundCell, Profiler
from visionselector_eval.harness.profiler.metrics import Memory, Time, peak
from visionselector_eval.harness.profiler.phases import PHASES, Clock
from visionselector_eval.harness.profiler.spec import cell_of
from visionselector_eval.models.backbones.base import ALL_TRACES, Backbone
from visionselector_eval.models.decoder_view import LayerAccess
from visionselector_eval.models.splice import CompressedPrompt, Encoded, Prompt, VisualItem

Work = Callable[[str], None]

SECONDS = {"preprocess": 0.03, "vision": 0.05, "compressor": 0.02, "prefill": 0.06, "setup": 0.01, "decode": 0.015}
"""Truth: how long each phase lasts; `decode` a token."""
MIB = {"vision": 64, "compressor": 16, "prefill": 96, "setup": 8, "decode": 32}
"""Truth: what each phase allocates and frees again."""
NEW_TOKENS, VISUAL, TEXT = 4, 16, 8


class KnownModel(nn.Module):
    """Does `work("prefill")` for a prompt and `work("decode")` for a token."""

    def __init__(self, work: Work, device: torch.device) -> None:
        super().__init__()
        self.work = work
        self.weight = nn.Parameter(torch.zeros(4, device=device), requires_grad=False)
        self.lm_head = nn.Identity()
        self.generation_config = SimpleNamespace(eos_token_id=None)
        self.config = SimpleNamespace(get_text_config=lambda: SimpleNamespace(max_position_embeddings=4096))

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def forward(self, length: int) -> dict[str, Any]:
        self.work("prefill" if length > 1 else "decode")
        return {}


class KnownBackbone(Backbone):
    """A backbone whose phases do known work and nothing else."""

    traces = frozenset()

    def __init__(self, work: Work, device: torch.device | str = "cpu") -> None:
        self._work = work
        super().__init__(KnownModel(work, torch.device(device)), None, id="known", revision="", extra_weights={})

    @property
    def width(self) -> int:
        return 4

    @property
    def depth(self) -> int:
        return 2

    @property
    def layer_access(self) -> LayerAccess:
        raise NotImplementedError

    def encode(self, inputs: Mapping[str, Any], needs: frozenset[str] = ALL_TRACES) -> Encoded:
        self._work("vision")
        features = torch.zeros(VISUAL, self.width, device=self.device)
        return Encoded([[VisualItem(kind="image", grid=(1, 4, 4), features=features)]])

    def prompt(self, inputs: Mapping[str, Any], keys: Sequence[str]) -> Prompt:
        ids = inputs["input_ids"]
        visual = ids == 1
        return Prompt(
            input_ids=ids,
            embeds=torch.zeros(*ids.shape, self.width, device=self.device),
            attention_mask=inputs["attention_mask"],
            position_ids=torch.zeros(1, *ids.shape, dtype=torch.int64, device=self.device),
            visual=visual,
            question=~visual,
            keys=keys,
        )

    def resize(self, inputs: Mapping[str, Any], compressor: Compressor, budget: Budget) -> dict[str, Any]:
        raise NotImplementedError

    def forward(self, compressed: CompressedPrompt) -> tuple[Tensor, Tensor]:
        raise NotImplementedError

    def stock_generate(self, compressed: CompressedPrompt, **generation: Any) -> Any:
        self._work("setup")
        self.model(compressed.embeds.shape[1])
        for _ in range(generation["max_new_tokens"] - 1):
            self.model(1)
        return torch.zeros(1, generation["max_new_tokens"], dtype=torch.int64)

    def visual_totals(self, inputs: Mapping[str, Any]) -> list[int]:
        return [VISUAL]

    def inputs(self) -> dict[str, Any]:
        """A prompt of `VISUAL` visual and `TEXT` text tokens; making it is the preprocessing."""
        self._work("preprocess")
        ids = torch.tensor([[1] * VISUAL + [2] * TEXT])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@dataclass(frozen=True, kw_only=True, eq=False)
class KnownCompressor(ScoreCompressor):
    """Does known work, then keeps the first tokens."""

    name = "known"
    work: Work

    def score(self, tokens: VisualTokens) -> Tensor:
        self.work("compressor")
        return -torch.arange(len(tokens.features), dtype=torch.float32, device=tokens.features.device)


class Pause:
    """Sleeps as long as `SECONDS` says, or spins on the device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._rate = _cycles(device) if device.type == "cuda" else 0.0

    def __call__(self, phase: str) -> None:
        if self._device.type == "cuda" and phase != "preprocess":
            torch.cuda._sleep(int(SECONDS[phase] * self._rate))
        else:
            time.sleep(SECONDS[phase])


def _cycles(device: torch.device) -> float:
    """Cycles a second of the device's own spinning kernel."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    cycles = 100_000_000
    for _ in range(2):
        start.record()
        torch.cuda._sleep(cycles)
        end.record()
        torch.cuda.synchronize(device)
    return cycles / (start.elapsed_time(end) / 1000)


class Allocate:
    """Allocates what `MIB` says, touches it, and frees it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __call__(self, phase: str) -> None:
        if phase in MIB:
            torch.empty(MIB[phase] << 20, dtype=torch.uint8, device=self._device).fill_(1)


def profiler_of(work: Work, device: torch.device, clock: Clock | None = None) -> tuple[Profiler, BoundCell]:
    """A profiler of the known backbone, and its one cell."""
    backbone = KnownBackbone(work, device)
    cell = cell_of("method", "known", "known", {}, Share(0.25))
    return Profiler(backbone, NEW_TOKENS, clock), BoundCell(cell, KnownCompressor(work=work))


def true_milliseconds() -> dict[str, float]:
    """What a perfect profiler reports for each phase of one answer."""
    return {p: 1000 * SECONDS[p] * (NEW_TOKENS - 1 if p == "decode" else 1) for p in PHASES}


def measured_milliseconds(repeats: int, device: torch.device) -> dict[str, float]:
    """Medians of the phases over `repeats` answers."""
    profiler, bound = profiler_of(Pause(device), device)
    backbone = profiler.backbone
    assert isinstance(backbone, KnownBackbone)
    rows = []
    for _ in range(repeats):
        rows.append(Time().measure(profiler, bound, profiler.preprocess(backbone.inputs, "known")))
    return {phase: statistics.median(row[f"{phase}_ms"] for row in rows) for phase in PHASES}


def measured_mib(device: torch.device) -> dict[str, float]:
    """Peaks of the phases above what stood before, in MiB, by the same rule over three rounds as in the tables."""
    profiler, bound = profiler_of(Allocate(device), device)
    backbone = profiler.backbone
    assert isinstance(backbone, KnownBackbone)
    prompt = profiler.preprocess(backbone.inputs, "known")
    Memory().measure(profiler, bound, prompt)  # the first answer brings code pages in
    rows = pd.DataFrame([Memory().measure(profiler, bound, prompt) for _ in range(3)]).assign(item="known")
    measure = "allocated" if device.type == "cuda" else "rss"
    return {phase: peak(rows, measure, (phase,)) / 2**20 for phase in MIB}


def parser() -> argparse.ArgumentParser:
    """The flags of this module."""
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    made.add_argument("--repeats", type=int, default=20)
    made.add_argument("--device", default="cpu")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of this module; returns the exit code."""
    chosen = parser().parse_args(arguments)
    device = torch.device(chosen.device)
    table = Table("phase", "true", "reported", "error", "")
    wrong = 0
    times, truth = measured_milliseconds(chosen.repeats, device), true_milliseconds()
    for phase in PHASES:
        error = times[phase] - truth[phase]
        good = abs(error) <= max(2.0, 0.02 * truth[phase])
        wrong += not good
        table.add_row(
            phase, f"{truth[phase]:.1f} ms", f"{times[phase]:.2f} ms", f"{error:+.2f} ms", "" if good else "!"
        )
    peaks = measured_mib(device)
    for phase, true in MIB.items():
        error = peaks[phase] - true
        good = abs(error) <= 1.0
        wrong += not good
        table.add_row(phase, f"{true} MiB", f"{peaks[phase]:.2f} MiB", f"{error:+.2f} MiB", "" if good else "!")
    Console(width=80).print(table)
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
