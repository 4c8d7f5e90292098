"""What sharing one loaded model, one image decode and one vision pass between cells saves.

    python -m visionselector_eval.harness.microbenchmarks.sharing
    python -m visionselector_eval.harness.microbenchmarks.sharing --pretrained FOLDER --task chartqa --limit 64

The same cells (methods x budgets of one task, and the full row that every sweep has) are answered and scored in four
ways, in one run of this program, and must give the same answers:

- sweep: as `run_eval.py` does, every batch decoded, preprocessed and encoded once for all cells;
- cell by cell: the same code and the same loaded model, but each cell decodes, preprocesses and encodes for itself;
- lmms-eval: the same, by lmms-eval's own evaluator with our model, one `simple_evaluate` a cell;
- processes: `run_eval.py` started once for each cell, beside one that runs all of them.

The first three take turns in this process after a warm-up, with model and task loaded before the clock starts; the
median of the repeats counts. What is saved depends on how much of a cell's time goes to images, so the table splits
it. By default images have 256 visual tokens (448 x 448 px), documents go in batches of 8 and there are 16 of them;
tasks give short answers, as benchmarks do.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tabulate import tabulate

from visionselector_eval.harness.store.run import load_run
from visionselector_eval.harness.sweep.engines import engine
from visionselector_eval.harness.sweep.run import run_sweep
from visionselector_eval.harness.sweep.spec import SweepSpec, cells_of
from visionselector_eval.harness.sweep.worker import Answerer, Event, WorkUnit, answer_unit, backbone_of, bound_task
from visionselector_eval.models.lmms_eval_models import CompressedModel
from visionselector_eval.models.loading import checkpoint_family
from visionselector_eval.tasks import lmms

METHODS, BUDGETS = ("visionselector", "divprune", "visionzip"), ("0.3", "0.2", "0.1")
TARGETS = {"cell by cell": 2.0, "processes": 4.0}

Answers = Mapping[tuple[str, str, int], str]  # by method, budget and document


@dataclasses.dataclass
class Clock:
    """Seconds of one measurement: all of it, and what of it went to images and to answers."""

    total: float = 0.0
    images: float = 0.0
    answers: float = 0.0


@contextmanager
def clocked() -> Iterator[Clock]:
    """Measure what happens inside."""
    clock = Clock()
    prepare, answer = Answerer.prepare, Answerer.answer

    def timed(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            started = time.perf_counter()
            try:
                return method(*arguments)
            finally:
                setattr(clock, name, getattr(clock, name) + time.perf_counter() - started)

        return call

    Answerer.prepare = timed("images", prepare)  # type: ignore[method-assign]
    Answerer.answer = timed("answers", answer)  # type: ignore[method-assign]
    started = time.perf_counter()
    try:
        yield clock
    finally:
        clock.total = time.perf_counter() - started
        Answerer.prepare, Answerer.answer = prepare, answer  # type: ignore[method-assign]


def one_by_one(unit: WorkUnit) -> Iterator[Event]:
    """`answer_unit` for one cell after another, so that they share the loaded model and nothing else."""
    for work in unit.cells:
        yield from answer_unit(dataclasses.replace(unit, cells=(work,)))


def swept(spec: SweepSpec, folder: Path, answer: Callable[[WorkUnit], Iterator[Event]]) -> Answers:
    """Run `spec` into a new folder; its answers."""
    run_sweep(spec.model_copy(update={"output": str(folder)}), engine=engine("local"), answer=answer)
    return answers_of(folder)


def answers_of(folder: Path) -> Answers:
    """The answers of a run folder."""
    samples = load_run(folder).samples
    return {(m, b, d): a for m, b, d, a in samples[["method", "budget", "doc_id", "answer"]].itertuples(index=False)}


def evaluated(spec: SweepSpec, unit: WorkUnit) -> Answers:
    """The cells of `spec`, each by lmms-eval's own evaluator with our model around the loaded backbone."""
    bound = bound_task(unit.task, unit.base_model, unit.limit)
    found = {}
    for cell in cells_of(spec):
        model = CompressedModel(
            backbone=backbone_of(*unit.checkpoint),
            method=cell.method,
            budget=cell.budget,
            batch_size=spec.batch_size,
            protocol="checkpoint",
            **unit.media,
        )
        with lmms.quiet():
            results = lmms.lmms_eval().simple_evaluate(
                model=model,
                tasks=list(bound.tasks.values()),
                task_manager=bound.task_manager,
                limit=spec.limit,
                bootstrap_iters=0,
                cli_args=SimpleNamespace(output_path=None, process_with_media=False),
            )
        for sample in results["samples"][unit.task]:
            found[cell.method, str(cell.budget), sample["doc_id"]] = sample["resps"][0][0]
    return found


def process(spec: SweepSpec, folder: Path, methods: Sequence[str], budgets: Sequence[str]) -> float:
    """Seconds that one `visionselector-eval sweep` takes for these cells, from start to end of the process."""
    flags = ["--pretrained", spec.backbones[0].pretrained, "--tasks", *spec.tasks, "--limit", str(spec.limit)]
    flags += ["--batch-size", str(spec.batch_size), "--device", spec.device, "--protocol", spec.protocol]
    flags += ["--min-pixels", str(spec.min_pixels), "--max-pixels", str(spec.max_pixels), "--output", str(folder)]
    program = [sys.executable, "-m", "visionselector_eval.harness.cli"]
    started = time.perf_counter()
    done = subprocess.run(
        [*program, "sweep", *flags, "--methods", *methods, "--budgets", *budgets],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        encoding="utf-8",
    )
    if done.returncode:
        raise RuntimeError(f"a sweep in a process of its own failed: {done.stderr}")
    return time.perf_counter() - started


def measure(spec: SweepSpec, repeats: int, processes: bool) -> str:
    """Run everything; the report."""
    name = spec.backbones[0].pretrained
    unit = WorkUnit(
        pretrained=name,
        revision=None,
        device=engine("local").device(spec.device),
        dtype=spec.dtype,
        attn_implementation=spec.attn_implementation,
        media=spec.media(spec.backbones[0]),
        task=spec.tasks[0],
        base_model=checkpoint_family(name).lmms_eval,
        limit=spec.limit,
        generation={},
        batch_size=spec.batch_size,
        on_bad_document="fail",
        cells=(),
    )
    n_cells, found = len(cells_of(spec)), {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        ways: dict[str, Callable[[Path], Answers]] = {
            "sweep": lambda out: swept(spec, out, answer_unit),
            "cell by cell": lambda out: swept(spec, out, one_by_one),
            "lmms-eval": lambda out: evaluated(spec, unit),
        }
        few = spec.model_copy(update={"limit": min(spec.batch_size, spec.limit or spec.batch_size)})
        swept(few, folder / "warm-up", answer_unit)
        bound_task(unit.task, unit.base_model, unit.limit)
        clocks: dict[str, list[Clock]] = {way: [] for way in ways}
        for number in range(repeats):
            for way, run in ways.items():
                with clocked() as clock:
                    found[way] = run(folder / f"{way} {number}")
                clocks[way].append(clock)
        together, alone = None, []
        if processes:
            methods = [m.name for m in spec.methods]
            together = process(spec, folder / "together", methods, list(map(str, spec.budgets)))
            # One folder for all, so that the full row is answered once here, too.
            alone = [process(spec, folder / "alone", [m], [str(b)]) for m in methods for b in spec.budgets]
            found["processes"] = answers_of(folder / "alone")
    for way, answers in found.items():
        if answers != found["sweep"]:
            raise RuntimeError(f"'{way}' and 'sweep' answered differently: they are not the same work")

    return _report(spec, repeats, clocks, n_cells, together, alone)


def _report(
    spec: SweepSpec,
    repeats: int,
    clocks: Mapping[str, Sequence[Clock]],
    n_cells: int,
    together: float | None,
    alone: Sequence[float],
) -> str:
    """The table of all ways; `together`, `alone`: seconds of the processes, where they were run."""
    middle = {way: sorted(of, key=lambda c: c.total)[len(of) // 2] for way, of in clocks.items()}
    first = middle["sweep"].total
    rows: list[list[Any]] = [
        [way, c.total, c.images, c.answers, c.total - c.images - c.answers, c.total / first, TARGETS.get(way)]
        for way, c in middle.items()
    ]
    if together is not None:
        rows.append(["one process, all cells", together, None, None, None, None, None])
        ratio = sum(alone) / together
        rows.append([f"{len(alone)} processes", sum(alone), None, None, None, ratio, TARGETS["processes"]])
    head = ["", "seconds", "images", "answers", "rest", "ratio", "target"]
    what = f"{spec.backbones[0].pretrained} on {spec.tasks[0]}"
    lines = [
        f"{what}: {n_cells - 1} cells and the full row, {spec.limit} documents, "
        f"batches of {spec.batch_size}, {spec.min_pixels} to {spec.max_pixels} pixels an image, "
        f"median of {repeats}",
        "",
        tabulate(rows, head, floatfmt=".2f"),
        "",
        "images: decode, preprocess, vision encoder; answers: compress, prefill, generate; rest: scoring, files.",
        "ratio: over `sweep`; of processes over the one process that runs all cells. All ways gave the same answers.",
    ]
    if alone:
        lines.append(f"seconds of each process: {', '.join(f'{s:.1f}' for s in alone)}")
        lines.append(f"median {statistics.median(alone):.1f}")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line of this module."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pretrained", default="tiny", help="checkpoint (default: the embedded one)")
    parser.add_argument("--task", default="tiny_chartqa", help="task of all cells (default: tiny_chartqa)")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), metavar="NAME")
    parser.add_argument("--budgets", nargs="+", default=list(BUDGETS), metavar="BUDGET")
    parser.add_argument("--limit", type=int, default=16, help="documents (default: 16)")
    parser.add_argument("--batch-size", type=int, default=8, help="documents answered together (default: 8)")
    parser.add_argument("--tokens", type=int, default=256, help="visual tokens of an image (default: 256)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--repeats", type=int, default=3, help="of what is measured in this process (default: 3)")
    parser.add_argument("--no-processes", action="store_true", help="leave out the runs as processes of their own")
    given = parser.parse_args(arguments)
    pixels = given.tokens * 28 * 28
    spec = SweepSpec.make(
        {
            "backbones": [given.pretrained],
            "methods": given.methods,
            "budgets": given.budgets,
            "tasks": [given.task],
            "limit": given.limit,
            "batch_size": given.batch_size,
            "device": given.device,
            "protocol": "checkpoint",
            "min_pixels": pixels,
            "max_pixels": pixels,
        }
    )
    sys.stdout.write(measure(spec, given.repeats, not given.no_processes) + "\n")


if __name__ == "__main__":
    main()
