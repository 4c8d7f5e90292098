"""The numbers of a GPU in a few minutes: correctness first, then the cost tables in order of worth.

    python -m visionselector_eval.harness.microbenchmarks.gpu --minutes 8

Works through a list, writes after each line, and resumes when it is called again on the same day (or with `--date`):
(a) the same tokens and answers as on a CPU, for every method on every embedded checkpoint, and the picking kernel
against its loop; (b) `full` and five methods on the Qwen2.5-VL-7B shape at N = 4096 and budget 0.2, then more budgets,
sizes, methods and shapes; (c) compressors alone beside their naive forms. On a CPU the same list with small shapes is a
dry run. Everything is written to <results>/<machine>-<date>/: correctness.csv, a profile for each shape, README.md with
the targets.
"""

from __future__ import annotations

import argparse
import csv
import json
import logging
import shlex
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from visionselector_eval.baselines.contract.errors import InputError
from visionselector_eval.harness.environment import environment
from visionselector_eval.harness.microbenchmarks import compressors, correctness
from visionselector_eval.harness.microbenchmarks.measured import TimeLimitedScreen, TimeUp, machine, slug, target_table
from visionselector_eval.harness.profiler import report
from visionselector_eval.harness.profiler.run import run_profile
from visionselector_eval.harness.profiler.spec import ProfileSpec
from visionselector_eval.harness.profiler.store import load_profile
from visionselector_eval.harness.store.files import write_atomic
from visionselector_eval.models.loading import choose_device

log = logging.getLogger(__name__)

FIRST = ("visionselector", "divprune", "visionzip", "fastv", "pooling")
"""The methods of the first cost line."""


_CHECKING = 0.3  # of the time at most, before the measurements begin


@dataclass(frozen=True)
class Line:
    """One line of the cost list: a shape of --random-weights, visual tokens, budgets, and methods (none: all)."""

    shape: str
    tokens: int
    budgets: tuple[str, ...]
    methods: tuple[str, ...] = ()

    def __str__(self) -> str:
        methods = f"{len(self.methods)} methods" if self.methods else "all methods"
        return f"{self.shape}, N = {self.tokens}, budget {', '.join(self.budgets)}, {methods}"


_ALL_BUDGETS = ("0.3", "0.2", "0.1")
ON_GPU = (
    Line("qwen2_5_vl_7b", 4096, ("0.2",), FIRST),
    Line("qwen2_5_vl_7b", 4096, ("0.3", "0.1"), FIRST),
    Line("qwen2_5_vl_7b", 1024, ("0.2",), FIRST),
    Line("qwen2_5_vl_7b", 16384, ("0.2",), FIRST),
    Line("qwen2_5_vl_7b", 4096, ("0.2",)),
    Line("llava_1_5_7b", 576, ("0.2",)),
    Line("qwen2_5_vl_3b", 4096, ("0.2",), FIRST),
    Line("qwen2_5_vl_7b", 4096, _ALL_BUDGETS),
    Line("qwen2_5_vl_7b", 1024, _ALL_BUDGETS),
    Line("qwen2_5_vl_7b", 16384, _ALL_BUDGETS),
    Line("qwen2_5_vl_3b", 4096, _ALL_BUDGETS),
    Line("llava_1_5_7b", 576, _ALL_BUDGETS),
)
ON_CPU = (
    Line("qwen2_5_vl_tiny", 256, ("0.2",), FIRST),
    Line("qwen2_5_vl_tiny", 256, ("0.3", "0.1"), FIRST),
    Line("qwen2_5_vl_tiny", 64, ("0.2",), FIRST),
    Line("qwen2_5_vl_tiny", 256, ("0.2",)),
    Line("llava_tiny", 64, ("0.2",)),
)


@dataclass(frozen=True)
class Checked:
    """One row of correctness.csv; `differs` is empty where the check passed."""

    subject: str
    method: str
    check: str
    differs: str


class Correctness:
    """correctness.csv: rows are on disk as soon as they are known, and known rows are not checked again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[Checked] = []
        if path.is_file():
            with path.open(newline="", encoding="utf-8") as file:
                self.rows = [Checked(**row) for row in csv.DictReader(file)]

    def known(self, subject: str, method: str, check: str) -> bool:
        return any((row.subject, row.method, row.check) == (subject, method, check) for row in self.rows)

    def add(self, row: Checked) -> None:
        new = not self.path.is_file()
        with self.path.open("a", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(asdict(row)))
            if new:
                writer.writeheader()
            writer.writerow(asdict(row))
        self.rows.append(row)

    def text(self) -> str:
        """What passed, and each row that did not."""
        failed = [row for row in self.rows if row.differs]
        lines = [f"{len(self.rows) - len(failed)} of {len(self.rows)} checks pass ([rows](correctness.csv))."]
        lines += [f"- {row.subject}, {row.method}, {row.check}: {row.differs}" for row in failed]
        return "\n".join(lines)


def check_all(table: Correctness, device: str, end: float) -> None:
    """Every check that `table` does not hold yet, until `end` (of `time.monotonic`).

    Raises:
        TimeUp: checks remain.
    """

    def checks() -> Iterator[tuple[str, str, str, Callable[[], str]]]:
        if device.startswith("cuda"):
            for n in correctness.KERNEL_SIZES:
                run = partial(correctness.kernel_equals_loop, n, device)
                yield f"N={n}", "kernel", "picks equal the loop's", run
        for checkpoint in correctness.checkpoints():
            pair = correctness.Pair(checkpoint, device)
            for method in correctness.methods_of(pair):
                for name, check in correctness.CHECKS.items():
                    yield checkpoint, method, name, partial(check, pair, method)

    for subject, method, name, check in checks():
        if table.known(subject, method, name):
            continue
        if time.monotonic() > end:
            raise TimeUp
        try:
            differs = check()
        except Exception as error:  # a check that breaks is a finding, too, and the others continue
            log.debug("a check failed", exc_info=error)
            differs = f"{type(error).__name__}: {' '.join(str(error).split())}"
        table.add(Checked(subject, method, name, differs))


def _checked(table: Correctness, device: str, end: float) -> bool:
    """Whether all checks are done by `end`; what is left of them comes after the measurements."""
    try:
        check_all(table, device, end)
    except TimeUp:
        return False
    return True


def readme(folder: Path, command: str, remaining: Sequence[Line], table: Correctness) -> str:
    """The page of the folder: what ran, what is not measured yet, the targets."""
    shapes = sorted(path.parent.name for path in folder.glob("*/profile.json"))
    lines = [f"# {folder.name}", "", "The last call:", "", "```", command, "```", "", "## Correctness", ""]
    lines += [table.text(), "", "## Cost", ""]
    lines += [f"- [{shape}]({shape}/table.md)" for shape in shapes]
    if (folder / "compressors" / "table.md").is_file():
        lines += ["- [compressors alone, beside their naive forms](compressors/table.md)"]
    lines += ["", "Attention: sdpa; environment and commit: [environment.json](environment.json).", ""]
    lines += [f"Not measured yet: {line}." for line in remaining]
    lines += target_table(folder, shapes)
    return "\n".join(lines).rstrip() + "\n"


def parser() -> argparse.ArgumentParser:
    """The flags of this module."""
    made = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n\n")[0],
        epilog="example: python -m visionselector_eval.harness.microbenchmarks.gpu --minutes 8",
    )
    made.add_argument("--minutes", type=float, default=8.0, help="stop after so long; the same command resumes")
    made.add_argument("--device", default="auto", help="auto, cuda, cuda:1; cpu for a dry run with small shapes")
    made.add_argument("--repeats", type=int, default=50, help="timed rounds (3 on a CPU at most)")
    made.add_argument("--warmup", type=int, default=10, help="rounds before them (1 on a CPU at most)")
    made.add_argument("--results", type=Path, default=Path("results/measured"), help="where the folder is made")
    made.add_argument("--date", default=f"{datetime.now(UTC):%Y-%m-%d}", help="of the folder, to resume an older one")
    made.add_argument("--commit", help="of the code, where it runs from an installed package instead of a checkout")
    made.add_argument("--skip-correctness", action="store_true", help="begin with the cost lines")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line of this module: 0 done, 2 bad input, 3 a check failed, a cell failed, or time is up."""
    flags = parser()
    chosen = flags.parse_args(arguments)
    console = Console(width=160, soft_wrap=True)
    begin = time.monotonic()
    end = begin + 60 * chosen.minutes
    try:
        if chosen.minutes <= 0 or chosen.repeats < 1 or chosen.warmup < 0:
            raise InputError("--minutes and --repeats start above 0, --warmup at 0")
        device = choose_device(chosen.device)
    except InputError as error:
        flags.error(str(error))
    on_gpu = device.startswith("cuda")
    given = list(sys.argv[1:] if arguments is None else arguments)
    command = f"python -m visionselector_eval.harness.microbenchmarks.gpu {shlex.join(given)}".rstrip()
    folder = chosen.results / f"{slug(machine(device))}-{chosen.date}"
    folder.mkdir(parents=True, exist_ok=True)
    around = environment()
    around["commit"] = around["commit"] or chosen.commit
    write_atomic(folder / "environment.json", json.dumps(around, indent=2) + "\n")
    table = Correctness(folder / "correctness.csv")
    remaining = list(ON_GPU if on_gpu else ON_CPU)
    failed, stopped = 0, False

    def page() -> str:
        text = readme(folder, command, remaining, table)
        write_atomic(folder / "README.md", text)
        return text

    try:
        checked = chosen.skip_correctness or _checked(table, device, min(end, begin + _CHECKING * (end - begin)))
        page()
        while remaining:
            failed += _measure(remaining[0], folder, device, chosen, end)
            remaining.pop(0)
            page()
        sizes = compressors.LARGE if on_gpu else compressors.SMALL
        _compressors(folder, device, sizes, around)
        if not checked:
            check_all(table, device, end)
    except TimeUp:
        stopped = True
    console.print(page(), markup=False, highlight=False)
    if stopped:
        console.print("stopped after the minutes given; the same command resumes")
    return 3 if failed or stopped or any(row.differs for row in table.rows) else 0


def _measure(line: Line, folder: Path, device: str, chosen: argparse.Namespace, end: float) -> int:
    """Measure what the shape's profile does not hold yet of one line; returns how many cells failed."""
    if time.monotonic() > end:
        raise TimeUp
    on_gpu = device.startswith("cuda")
    output = folder / line.shape
    spec = ProfileSpec.make(
        {
            "output": str(output),
            "random_weights": line.shape,
            **({"methods": list(line.methods)} if line.methods else {}),
            "budgets": list(line.budgets),
            "synthetic": [line.tokens],
            "device": device,
            "dtype": "bfloat16" if on_gpu else "float32",
            "attn_implementation": "sdpa",
            "repeats": chosen.repeats if on_gpu else min(chosen.repeats, 3),
            "warmup": chosen.warmup if on_gpu else min(chosen.warmup, 1),
            "memory_rounds": 2 if on_gpu else 1,
            "max_new_tokens": 4,
            "energy_seconds": 1.0,
        }
    )
    try:
        with TimeLimitedScreen(end) as screen:
            failed = len(run_profile(spec, progress=screen).failed)
    except TimeUp:
        report.write(output)
        raise
    finally:
        if on_gpu:
            torch.cuda.empty_cache()
    report.write(output)
    assert not load_profile(output).rows.empty
    return failed


def _compressors(folder: Path, device: str, sizes: Sequence[int], around: dict[str, object]) -> None:
    """Compressors alone, once; written to the same folder whatever the day."""
    if (folder / "compressors" / "table.md").is_file():
        return
    flags = ["--tokens", *map(str, sizes), "--device", device, "--output", str(folder / "compressors")]
    flags += ["--repeats", "5", "--naive-seconds", "5"]
    if not device.startswith("cuda"):
        flags += ["--width", "128", "--naive-seconds", "1"]
    compressors.main(flags)
    write_atomic(folder / "compressors" / "environment.json", json.dumps(around, indent=2) + "\n")


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    sys.exit(main())
