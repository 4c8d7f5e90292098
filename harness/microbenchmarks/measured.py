"""The cost tables of results/measured: every method at three budgets on shapes with random weights.

On a machine with an NVIDIA GPU, 7B and 3B shapes in bfloat16 at N = 1024, 4096 and 16384:

    python -m visionselector_eval.harness.microbenchmarks.measured --device cuda

On a CPU, the embedded checkpoint and the 0.5B shape at N = 256:

    python -m visionselector_eval.harness.microbenchmarks.measured --device cpu --repeats 10 --warmup 2

Writes <results>/<machine>-<date>/<shape>/ and a README.md with the targets beside it. The same command on the same day
(or with `--date`) resumes where it was stopped; `--minutes` stops it by itself.
"""

from __future__ import annotations

import argparse
import logging
import re
import shlex
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import pandas as pd
import torch
from rich.console import Console

from visionselector_eval.baselines.contract.errors import InputError
from visionselector_eval.baselines.contract.registry import compressor_class
from visionselector_eval.harness.environment import cpu_model
from visionselector_eval.harness.profiler import report
from visionselector_eval.harness.profiler.run import run_profile
from visionselector_eval.harness.profiler.screen import ProfileScreen
from visionselector_eval.harness.profiler.spec import ProfileSpec
from visionselector_eval.harness.profiler.store import load_profile
from visionselector_eval.harness.store.files import write_atomic
from visionselector_eval.models.loading import choose_device
from visionselector_eval.models.tiny import TINY

log = logging.getLogger(__name__)

ON_GPU = (["qwen2_5_vl_7b", "qwen2_5_vl_3b"], [1024, 4096, 16384], "bfloat16")
ON_CPU = ([TINY, "qwen2_5_vl_0_5b"], [256], "float32")
_N, _BUDGET = 4096, "0.2"  # where the targets are


class TimeUp(Exception):
    """The minutes given are over."""


class TimeLimitedScreen(ProfileScreen):
    """Stops after a sample once the time is over; what is measured stays."""

    def __init__(self, end: float) -> None:
        super().__init__()
        self._end = end

    def measured(self, count: int) -> None:
        super().measured(count)
        if time.monotonic() > self._end:
            raise TimeUp


@dataclass(frozen=True)
class Target:
    """What is promised, what was measured (None: not measured), and whether that is enough."""

    shape: str
    what: str
    measured: str
    met: bool | None


def slug(text: str) -> str:
    """A name for a folder: lower case, letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower().replace("(r)", "").replace("(tm)", "")).strip("-")


def machine(device: str) -> str:
    """What the numbers belong to: the GPU's name, or the processor's."""
    return torch.cuda.get_device_name(device) if device.startswith("cuda") else cpu_model()


def targets(shape: str, lines: pd.DataFrame) -> list[Target]:
    """The promises for N = 4096 and budget 0.2, checked against the rows of `report.summary`."""
    own = lines[(lines["workload"] == f"synthetic-{_N}") & (lines["role"] == "method")]
    ours = own[(own["method"] == "visionselector") & (own["budget"] == _BUDGET) & (own["rounds"] > 0)]
    found: list[Target] = []

    def add(what: str, column: str, least: float, percent: bool = False) -> None:
        if ours.empty or pd.isna(ours[column].iloc[0]):
            found.append(Target(shape, what, "not measured", None))
            return
        value = float(ours[column].iloc[0])
        found.append(Target(shape, what, f"{100 * value:.0f} %" if percent else f"{value:.2f}x", value >= least))

    add("visionselector: first token at least 2.0x faster than full", "speedup", 2.0)
    add("visionselector: at least 90 % of the ideal", "of_ideal", 0.9, percent=True)
    add("visionselector: LLM's activations and cache at least 75 % smaller at their peak", "llm_saved", 0.75, True)
    add("visionselector: the same of the whole answer's peak, vision included", "memory_saved", 0.75, True)
    projector = own[own["method"].map(_stage).eq("projector") & (own["rounds"] > 0)]
    what = "every projector-stage compressor: at most 3 % of the full prefill"
    if projector.empty:
        return [*found, Target(shape, what, "not measured", None)]
    slow = projector[projector["compressor_share"] > 0.03].sort_values("compressor_share", ascending=False)
    said = ", ".join(f"{r.label} @ {r.budget} {100 * float(r.compressor_share):.1f} %" for r in slow.itertuples())  # type: ignore[arg-type]
    largest = float(projector["compressor_share"].max())
    return [*found, Target(shape, what, said or f"at most {100 * largest:.1f} %", slow.empty)]


def _stage(method: str) -> str:
    """Where a method acts; a combination of two is neither one nor the other."""
    return getattr(compressor_class(method), "stage", "") if "+" not in method else ""


def readme(folder: Path, command: str, on_gpu: bool) -> str:
    """The text beside the shapes' folders: how they were made, and the targets where there are any."""
    shapes = sorted(path.parent.name for path in folder.glob("*/profile.json"))
    lines = [
        f"# {folder.name}",
        "",
        "The last call (the settings of each shape are in its spec.yaml):",
        "",
        "```",
        command,
        "```",
        "",
        "Tables, raw rows and environment:",
        "",
    ]
    lines += [f"- [{shape}]({shape}/table.md)" for shape in shapes]
    if (folder / "compressors" / "table.md").is_file():
        lines += ["- [compressors](compressors/table.md) alone, by `harness/microbenchmarks/compressors.py`"]
    if on_gpu:
        lines += target_table(folder, shapes)
    return "\n".join(lines) + "\n"


def target_table(folder: Path, shapes: Sequence[str]) -> list[str]:
    """Markdown lines: each shape's targets, what was measured, and whether that is enough."""
    lines = ["", f"## Targets at N = {_N}, budget {_BUDGET}", ""]
    lines += ["| shape | target | measured | met |", "|---|---|---|---|"]
    for shape in shapes:
        profile = load_profile(folder / shape)
        for t in [*targets(shape, report.summary(profile)), overhead_target(shape, profile.rows)]:
            met = "-" if t.met is None else "yes" if t.met else "no"
            lines.append(f"| {t.shape} | {t.what} | {t.measured} | {met} |")
    return lines


def overhead_target(shape: str, rows: pd.DataFrame) -> Target:
    """The profiler's own cost, all workloads of a shape together."""
    what = "the profiler's own overhead: at most 1 % of the latency"
    ratio = report.overhead(rows)
    if pd.isna(ratio.estimate):
        return Target(shape, what, "not measured", None)
    return Target(shape, what, f"{100 * (ratio.estimate - 1):+.1f} %", ratio.estimate <= 1.01)


def parser() -> argparse.ArgumentParser:
    """The flags of this module."""
    made = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    made.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1")
    made.add_argument("--shapes", nargs="+", help=f"`{TINY}` or shapes of --random-weights (default: by device)")
    made.add_argument("--synthetic", nargs="+", type=int, metavar="N", help="visual tokens (default: by device)")
    made.add_argument("--methods", nargs="+", help="compressors (default: all)")
    made.add_argument("--budgets", nargs="+", default=["0.3", "0.2", "0.1"])
    made.add_argument("--dtype", help="default: bfloat16 on a GPU, else float32")
    made.add_argument("--repeats", type=int, default=50)
    made.add_argument("--warmup", type=int, default=10)
    made.add_argument("--max-new-tokens", type=int, default=8)
    made.add_argument("--energy-seconds", type=float, default=2.0)
    made.add_argument("--threads", type=int)
    made.add_argument("--results", type=Path, default=Path("results/measured"), help="where the folder is made")
    made.add_argument("--date", default=f"{datetime.now(UTC):%Y-%m-%d}", help="of the folder, to resume an older one")
    made.add_argument("--minutes", type=float, help="stop after so long; the same command resumes")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of this module; returns the exit code: 0 done, 2 bad input, 3 some cells could not be measured."""
    chosen = parser().parse_args(arguments)
    console = Console()
    try:
        device = choose_device(chosen.device)
        shapes, tokens, dtype = ON_GPU if device.startswith("cuda") else ON_CPU
        folder = chosen.results / f"{slug(machine(device))}-{chosen.date}"
        end = time.monotonic() + 60 * chosen.minutes if chosen.minutes else float("inf")
        failed, stopped = 0, False
        for shape in chosen.shapes or shapes:
            spec = ProfileSpec.make(
                {
                    "output": str(folder / shape),
                    **({"pretrained": TINY} if shape == TINY else {"random_weights": shape}),
                    **({"methods": chosen.methods} if chosen.methods else {}),
                    "budgets": chosen.budgets,
                    "synthetic": chosen.synthetic or tokens,
                    "device": device,
                    "dtype": chosen.dtype or dtype,
                    "repeats": chosen.repeats,
                    "warmup": chosen.warmup,
                    "max_new_tokens": chosen.max_new_tokens,
                    "energy_seconds": chosen.energy_seconds,
                    "threads": chosen.threads,
                }
            )
            try:
                with TimeLimitedScreen(end) as screen:
                    failed += len(run_profile(spec, progress=screen).failed)
            except TimeUp:
                stopped = True
                report.write(folder / shape)
                break
            finally:
                (folder / shape / ".lock").unlink(missing_ok=True)
    except InputError as error:
        Console(stderr=True).print(f"measured: {error}", markup=False, highlight=False, soft_wrap=True)
        return 2
    given = list(sys.argv[1:] if arguments is None else arguments)
    command = f"python -m visionselector_eval.harness.microbenchmarks.measured {shlex.join(given)}".rstrip()
    text = readme(folder, command, device.startswith("cuda"))
    write_atomic(folder / "README.md", text)
    console.print(text, markup=False, highlight=False, soft_wrap=True)
    if stopped:
        console.print("stopped after the minutes given; the same command resumes")
    return 3 if failed else 0


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    sys.exit(main())
