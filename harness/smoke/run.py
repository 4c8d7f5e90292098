"""`smoke`: a few documents of each embedded benchmark, compared with a stored expectation. For CI.

A sweep of minutes is run afresh, and its scores, kept tokens and answers are compared with a file that an earlier one
wrote. The file says what was asked for; a later run without flags asks for the same.
"""

from __future__ import annotations

import contextlib
import json
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from visionselector_eval.baselines.contract.errors import InputError, one_line
from visionselector_eval.harness.environment import cpu_model, installed
from visionselector_eval.harness.smoke.compare import Comparison, Outcome, Tolerance, compare
from visionselector_eval.harness.smoke.expectation import (
    DEFAULTS,
    EXPECTATION,
    RUN_NAME,
    Cell,
    Expectation,
    Settings,
    read,
)
from visionselector_eval.harness.smoke.junit import to_junit
from visionselector_eval.harness.store.files import write_atomic
from visionselector_eval.harness.store.run import load_run
from visionselector_eval.harness.sweep.engines import engine
from visionselector_eval.harness.sweep.run import Progress, run_sweep
from visionselector_eval.harness.sweep.spec import SweepSpec

_PACKAGES = ("visionselector-eval", "lmms-eval", "torch", "transformers")


def spec_of(given: Mapping[str, Any], expected: Settings | None = None) -> tuple[SweepSpec, Settings]:
    """The sweep to run, and its settings.

    Args:
        given: fields of `SweepSpec` that were asked for; they win over those of the expectation, and these over
            `DEFAULTS`.
        expected: the settings of the expectation, if there is one.

    Raises:
        InputError: a setting that can't be used.
    """
    fields = dict(DEFAULTS)  # tasks have no default: the suite's
    if expected is not None:
        fields |= {**expected.model_dump(), "suite": None}
    if "tasks" in given or "suite" in given:
        fields |= {"tasks": [], "suite": None}
    spec = SweepSpec.make({**fields, **given})
    # `full` is always run; named or not, it is the same sweep
    methods = [m.model_dump() for m in spec.methods if m.name != "full"] or [m.model_dump() for m in spec.methods]
    settings = Settings(
        backbones=[b.model_dump() for b in spec.backbones],
        methods=methods,
        budgets=[str(budget) for budget in spec.budgets],
        tasks=spec.task_names(),
        limit=spec.limit or DEFAULTS["limit"],
        **{n: getattr(spec, n) for n in ("seeds", "batch_size", "device", "dtype", "attn_implementation")},
    )
    return spec, settings


def observe(
    spec: SweepSpec, settings: Settings, folder: str | Path | None, progress: Progress | None = None
) -> Outcome:
    """Run the sweep afresh and note what came.

    Args:
        folder: run folder; None for one that is thrown away. Cells of this sweep that it holds are run again: they may
            come from other code of the same version.
    """
    started = time.perf_counter()
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory()) if folder is None else folder
        spec = spec.model_copy(update={"output": str(folder), "name": RUN_NAME})
        run, result = run_sweep(spec, engine=engine("local"), existing="overwrite", progress=progress)
        frames = load_run(run.folder)
        ours = frames.cells[frames.cells["digest"].isin([*result.done, *result.failed])]
        by_cell = dict(iter(frames.samples.groupby("cell", sort=False)))
    cells: list[Cell] = []
    failed, tasks, seconds, inputs = {}, {}, {}, {}
    for row in ours.to_dict("records"):
        detail = json.loads(row["settings"])
        inputs[f"weights of {row['backbone']}"] = str(row["revision"])
        inputs[f"documents of {row['task']}"] = str(detail["data"])
        inputs[f"prompts of {row['task']}"] = str(detail["prompts"])
        if detail["weights"]:
            inputs[f"weights of {row['label']}"] = str(detail["weights"])
        done = row["status"] == "done"
        rows = by_cell[row["digest"]].sort_values(["subtask", "doc_id"]).to_dict("records") if done else []
        cell = Cell(
            backbone=row["backbone"],
            method=row["label"],
            budget=row["budget"],
            task=row["task"],
            seed=row["seed"],
            metric=row["metric"],
            score=_number(row["score"]),
            scale=_number(row["scale"]),
            kept_tokens=_number(row["kept_tokens"]),
            total_tokens=_number(row["total_tokens"]),
            answers={f"{sample['subtask']}/{sample['doc_id']}": sample["answer"] for sample in rows},
        )
        tasks[cell.title], seconds[cell.title] = cell.task, float(row["seconds"])
        if done:
            cells.append(cell)
        else:
            failed[cell.title] = one_line(row["error"])
    made_with = {name: installed(name) or "not installed" for name in _PACKAGES} | {"processor": cpu_model()}
    observed = Expectation(settings=settings, made_with=made_with, inputs=dict(sorted(inputs.items())), cells=cells)
    return Outcome(observed, failed, tasks, seconds, time.perf_counter() - started)


def _number(value: Any) -> float | None:
    return None if value is None or value != value else float(value)


@dataclass(frozen=True)
class Report:
    """What the command prints, and whether everything was as it should be."""

    text: str
    as_expected: bool


def smoke(
    given: Mapping[str, Any],
    *,
    expect: str | Path = EXPECTATION,
    update: bool = False,
    tolerance: Tolerance | None = None,
    junit: str | Path | None = None,
    output: str | Path | None = None,
    progress: Progress | None = None,
) -> Report:
    """Run, compare or store, report.

    Args:
        given: fields of `SweepSpec` that were asked for.
        expect: the expectation file.
        update: write it instead of comparing with it.
        junit: file for a JUnit report.
        output: run folder to keep.

    Raises:
        InputError: settings that can't be used, an expectation that is missing, unreadable or made with other settings,
            or a file that can't be written.
    """
    path = Path(expect)
    expected = None if update and not path.exists() else read(path)
    spec, settings = spec_of(given, expected.settings if expected else None)
    if expected is not None and not update and (names := expected.settings.differing(settings)):
        there = " ".join(expected.settings.shown(name) for name in names)
        here = " ".join(settings.shown(name) for name in names)
        raise InputError(
            f"the expectation '{path}' was made with other settings ({', '.join(names)}): {there}; "
            f"asked for here: {here}; leave them out, or make a new one with --update"
        )
    for file in [path, *([] if junit is None else [Path(junit)])]:
        if file.is_dir() or not file.absolute().parent.is_dir():
            raise InputError(f"cannot write '{file}': give a file name in a folder that exists")
    if (
        output is not None
        and (Path(output) / "spec.yaml").exists()
        and SweepSpec.load(Path(output) / "spec.yaml").name != RUN_NAME
    ):
        raise InputError(f"'{output}' is the run folder of a sweep, whose cells would be lost: give another --output")
    outcome = observe(spec, settings, output, progress)
    comparison = None
    if update:
        if not outcome.failed:
            _write(path, outcome.observed.model_dump_json(indent=1) + "\n")
        report = _updated(path, outcome)
    else:
        assert expected is not None
        comparison = compare(expected, outcome, tolerance or Tolerance())
        report = _compared(path, outcome, comparison)
    if junit is not None:
        _write(Path(junit), to_junit(outcome, comparison))
    return report


def _write(path: Path, text: str) -> None:
    try:
        write_atomic(path, text)
    except OSError as error:
        raise InputError(f"cannot write '{path}': {error.strerror or error}") from error


def _updated(path: Path, outcome: Outcome) -> Report:
    if not outcome.failed:
        return Report(f"{_summary(outcome)}; written to {path}", True)
    lines = [f"{title}\n  failed: {reason}" for title, reason in outcome.failed.items()]
    return Report(
        "\n\n".join([*lines, f"{_summary(outcome)}; {len(outcome.failed)} failed, so {path} is left as it was"]),
        False,
    )


def _compared(path: Path, outcome: Outcome, comparison: Comparison) -> Report:
    moved, parts = comparison.moved, []
    for title, lines in moved.items():
        parts.append("\n".join([title, *(f"  {line}" for line in lines)]))
    if comparison.remarks and (moved or comparison.differing):
        parts.append(
            "\n".join(["not as it was when the expectation was made:", *(f"  {r}" for r in comparison.remarks)])
        )
    number = f"{len(moved)} cells are" if len(moved) > 1 else "1 cell is"
    verdict = f"{number} not as expected" if moved else "as expected"
    lines = [f"{_summary(outcome)}; {verdict} ({path})"]
    if comparison.differing:
        lines.append(
            f"{comparison.differing} of {comparison.answers} answers differ (allowed: {100 * comparison.allowed:g} %)"
        )
    if moved:
        lines.append("If this is what you meant, run it again with --update and commit the file.")
    return Report("\n\n".join([*parts, "\n".join(lines)]), not moved)


def _summary(outcome: Outcome) -> str:
    cells = outcome.observed.cells
    answers = sum(len(cell.answers) for cell in cells)
    return f"{len(cells) + len(outcome.failed)} cells, {answers} answers in {outcome.wall_seconds:.1f} s"
