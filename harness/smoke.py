"""`smoke`: a few documents of each embedded benchmark, compared with a stored expectation. For CI.

A sweep of minutes is run afresh, and its scores, kept tokens and answers are held against a file that an earlier one
wrote. The file says what was asked for; a later run without flags asks for the same.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import re
import tempfile
import time
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from visionselector_eval.baselines.errors import InputError
from visionselector_eval.baselines.registry import BUILTIN

from .engines import engine
from .environment import cpu_model, installed
from .spec import SweepSpec, load_spec, make_spec
from .store import canonical_json, load_run, write_atomic
from .sweep import Progress, run_sweep

EXPECTATION = "smoke.expected.json"
"""Where the expectation is, in the current folder, unless `--expect` names another file."""

SUITE = "smoke"
"""The suite that is asked for by default: every embedded benchmark."""

# What a run without flags and without an expectation asks for. Device, precision and attention are definite: an
# expectation made on a machine with a GPU must hold on one without. Two documents a batch, so that batching is covered.
DEFAULTS: dict[str, Any] = {
    "backbones": ["tiny"],
    "methods": [name for name in BUILTIN if name != "full"],
    "budgets": ["0.2"],
    "suite": SUITE,
    "limit": 4,
    "seeds": [0],
    "batch_size": 2,
    "device": "cpu",
    "dtype": "float32",
    "attn_implementation": "sdpa",
}

OTHER_TORCH_SHARE = 0.1
"""Answers that may differ by default where another torch made the expectation: other kernels add in another order, and
where two tokens are all but equally likely the other one is then chosen."""

_PACKAGES = ("visionselector-eval", "lmms-eval", "torch", "transformers")
_NAME = "smoke"  # of the run, by which a folder is known to be ours
_SHOWN_ANSWERS = 3
_EPSILON = 1e-9


# ---------------------------------------------------------------- records


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Settings(_Strict):
    """What a smoke run asks for; names are those of the flags of `sweep`."""

    backbones: list[dict[str, Any]]
    methods: list[dict[str, Any]]
    budgets: list[str]
    tasks: list[str]
    limit: int
    seeds: list[int]
    batch_size: int
    device: str
    dtype: str
    attn_implementation: str

    def differing(self, other: Settings) -> list[str]:
        """Names of the settings that are not the same; the order of a list does not matter."""
        return [name for name in type(self).model_fields if self._items(name) != other._items(name)]

    def shown(self, name: str) -> str:
        """One setting as flag and value; a method by its name in tables."""
        flag = {"backbones": "pretrained"}.get(name, name).replace("_", "-")
        value = getattr(self, name)
        items = [_short(item) for item in value] if isinstance(value, list) else [value]
        return f"--{flag} {' '.join(map(str, items))}"

    def _items(self, name: str) -> list[str]:
        value = getattr(self, name)
        return sorted(map(canonical_json, value if isinstance(value, list) else [value]))


def _short(item: Any) -> str:
    if not isinstance(item, Mapping):
        return str(item)
    if "pretrained" in item:
        return str(item["pretrained"]) + (f" --revision {item['revision']}" if item.get("revision") else "")
    # a label of one's own does not say which options it stands for
    options = f" {item['options']}" if item.get("options") and "[" not in item["label"] else ""
    return f"{item['label']}{options}"


class Cell(_Strict):
    """What is compared of one cell."""

    backbone: str
    method: str = Field(description="the method's name in tables, options included")
    budget: str
    task: str
    seed: int
    metric: str
    score: float | None
    scale: float | None = Field(description="largest possible score; None: not known")
    kept_tokens: float | None = Field(description="mean over the documents that have visual tokens")
    total_tokens: float | None
    answers: dict[str, str] = Field(description="by lmms-eval task and document number")

    @property
    def title(self) -> str:
        """The cell in one line."""
        seed = f" seed {self.seed}" if self.seed else ""
        return f"{self.backbone} {self.method} @ {self.budget} on {self.task}{seed}"


class Expectation(_Strict):
    """The content of the expectation file: what was asked for, with what, and what came."""

    format: Literal[1] = 1
    settings: Settings
    made_with: dict[str, str] = Field(description="versions and processor")
    inputs: dict[str, str] = Field(
        description="hashes of checkpoints, documents and prompts; they explain a difference"
    )
    cells: list[Cell]


@dataclass(frozen=True)
class Tolerance:
    """How far a run may move.

    Attributes
    ----------
    score: in shares of the metric's largest value (0.01: one point of 100).
    kept: in tokens, for the means of kept and of all visual tokens.
    answers: share of all answers that may differ; None: none, or `OTHER_TORCH_SHARE` where another torch made the
        expectation.
    """

    score: float = 0.0
    kept: float = 0.0
    answers: float | None = None


@dataclass(frozen=True)
class Outcome:
    """A finished smoke run.

    Attributes
    ----------
    observed: what came, in the form of the expectation. failed: reasons of failed cells, by title.
    tasks, seconds: of every cell, by title. wall_seconds: of the whole run.
    """

    observed: Expectation
    failed: Mapping[str, str] = field(default_factory=dict)
    tasks: Mapping[str, str] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    wall_seconds: float = 0.0


@dataclass(frozen=True)
class Comparison:
    """What moved.

    Attributes
    ----------
    moved: lines that say what was expected and what came, by the cell's title; cells as expected are not in it.
    remarks: what else is not as it was when the expectation was made; no difference by itself.
    answers: number of answers compared. differing: how many differ. allowed: the share that may.
    """

    moved: Mapping[str, list[str]]
    remarks: list[str]
    answers: int
    differing: int
    allowed: float


# ---------------------------------------------------------------- asking


def spec_of(given: Mapping[str, Any], expected: Settings | None = None) -> tuple[SweepSpec, Settings]:
    """The sweep to run, and its settings.

    Parameters
    ----------
    given: fields of `SweepSpec` that were asked for; they win over those of the expectation, and these over `DEFAULTS`.
    expected: the settings of the expectation, if there is one.

    Raises
    ------
    InputError: a setting that can't be used.
    """
    fields = dict(DEFAULTS)  # tasks have no default: the suite's
    if expected is not None:
        fields |= {**expected.model_dump(), "suite": None}
    if "tasks" in given or "suite" in given:
        fields |= {"tasks": [], "suite": None}
    spec = make_spec({**fields, **given})
    # `full` is always run; named or not, it is the same sweep
    methods = [m.model_dump() for m in spec.methods if m.name != "full"] or [m.model_dump() for m in spec.methods]
    settings = Settings(
        backbones=[b.model_dump() for b in spec.backbones],
        methods=methods,
        budgets=spec.budgets,
        tasks=spec.task_names(),
        limit=spec.limit or DEFAULTS["limit"],
        **{n: getattr(spec, n) for n in ("seeds", "batch_size", "device", "dtype", "attn_implementation")},
    )
    return spec, settings


def observe(
    spec: SweepSpec, settings: Settings, folder: str | Path | None, progress: Progress | None = None
) -> Outcome:
    """Run the sweep afresh and note what came.

    Parameters
    ----------
    folder: run folder; None for one that is thrown away. Cells of this sweep that it holds are run again: they may come
        from other code of the same version.
    """
    started = time.perf_counter()
    with contextlib.ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory()) if folder is None else folder
        spec = spec.model_copy(update={"output": str(folder), "name": _NAME})
        run, result = run_sweep(spec, engine=engine("local"), overwrite=True, progress=progress)
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
            failed[cell.title] = " ".join(str(row["error"]).split())
    made_with = {name: installed(name) or "not installed" for name in _PACKAGES} | {"processor": cpu_model()}
    observed = Expectation(settings=settings, made_with=made_with, inputs=dict(sorted(inputs.items())), cells=cells)
    return Outcome(observed, failed, tasks, seconds, time.perf_counter() - started)


def _number(value: Any) -> float | None:
    return None if value is None or value != value else float(value)


# ---------------------------------------------------------------- comparing


def compare(expected: Expectation, outcome: Outcome, tolerance: Tolerance) -> Comparison:
    """Hold a run against an expectation with the same settings."""
    observed = outcome.observed
    wanted, came = ({cell.title: cell for cell in e.cells} for e in (expected, observed))
    remarks = [
        f"{name}: {old} when the expectation was made, {new} now"
        for name, old, new in _changed(expected.made_with, observed.made_with)
    ]
    remarks += [f"{name} changed" for name, _, _ in _changed(expected.inputs, observed.inputs)]
    same_torch = _release(expected.made_with.get("torch")) == _release(observed.made_with.get("torch"))
    allowed = tolerance.answers
    if allowed is None:
        allowed = 0.0 if same_torch else OTHER_TORCH_SHARE
    other = {
        title: [key for key, text in cell.answers.items() if came[title].answers.get(key) != text]
        for title, cell in wanted.items()
        if title in came
    }
    total = sum(len(wanted[title].answers) for title in other)
    differing = sum(map(len, other.values()))
    beyond = differing > allowed * total + _EPSILON
    moved: dict[str, list[str]] = {title: [f"failed: {reason}"] for title, reason in outcome.failed.items()}
    for title in [*wanted, *(title for title in came if title not in wanted)]:
        if title in moved:
            continue
        if title not in came or title not in wanted:
            moved[title] = ["expected, but it was not run" if title in wanted else "it is not in the expectation"]
            continue
        lines = _moved_numbers(wanted[title], came[title], tolerance)
        if set(came[title].answers) - set(wanted[title].answers):
            lines.append("documents: more than expected")
        if beyond and other[title]:
            lines += _moved_answers(wanted[title], came[title], other[title])
        if lines:
            moved[title] = lines
    return Comparison(moved, remarks, total, differing, allowed)


def _changed(old: Mapping[str, str], new: Mapping[str, str]) -> list[tuple[str, str, str]]:
    names = sorted({*old, *new})
    return [(n, old.get(n, "-"), new.get(n, "-")) for n in names if old.get(n) != new.get(n)]


def _release(version: str | None) -> str:
    # what follows the plus says how torch was built (cpu, cu128), not which kernels a CPU runs
    return (version or "").partition("+")[0]


def _moved_numbers(wanted: Cell, came: Cell, tolerance: Tolerance) -> list[str]:
    lines = []
    if wanted.metric != came.metric:
        lines.append(f"metric: expected {wanted.metric}, got {came.metric}")
    bounds = {"score": tolerance.score * (wanted.scale or 1.0), "kept_tokens": tolerance.kept}
    for name in ("score", "kept_tokens", "total_tokens"):
        old, new, bound = getattr(wanted, name), getattr(came, name), bounds.get(name, tolerance.kept)
        if old is None or new is None:
            same = old is new
        else:
            same = abs(new - old) <= bound + _EPSILON * max(1.0, abs(old))
        if not same:
            within = f" (allowed: {bound:g} more or less)" if bound else ""
            lines.append(f"{name}: expected {_text(old)}, got {_text(new)}{within}")
    return lines


def _text(value: float | None) -> str:
    return "no number" if value is None else f"{value:.6g}"


def _moved_answers(wanted: Cell, came: Cell, keys: Sequence[str]) -> list[str]:
    lines = [f"answers: {len(keys)} of {len(wanted.answers)} differ"]
    for key in keys[:_SHOWN_ANSWERS]:
        got = repr(came.answers[key]) if key in came.answers else "no such document"
        lines.append(f"  {key}: expected {wanted.answers[key]!r}, got {got}")
    if len(keys) > _SHOWN_ANSWERS:
        lines.append(f"  and {len(keys) - _SHOWN_ANSWERS} more")
    return lines


# ---------------------------------------------------------------- the command

_METAVARS = {"methods": "NAME[:OPTION=VALUE,...]", "backbones": "PATH_OR_ID"}
_HELP = {
    "suite": "a named list of tasks",
    "tasks": "tasks, beside or instead of a suite",
    "limit": "first N documents of each task; an even number where mme is among them",
}


def add_flags(parser: argparse.ArgumentParser) -> None:
    """The flags of `smoke`. Those that are fields of `SweepSpec` are None where they are not given."""
    for name in (*DEFAULTS, "tasks"):
        info = SweepSpec.model_fields[name]
        default = DEFAULTS.get(name)
        shown = (
            f" (default: {' '.join(map(str, default)) if isinstance(default, list) else default})" if default else ""
        )
        parser.add_argument(
            "--" + {"backbones": "pretrained"}.get(name, name).replace("_", "-"),
            dest=name,
            nargs="+" if name in ("backbones", "methods", "budgets", "tasks", "seeds") else None,
            metavar=_METAVARS.get(name, name.upper().rstrip("S")),
            type=int if name in ("limit", "seeds", "batch_size") else str,
            help=f"{_HELP.get(name, info.description)}{shown}".replace("%", "%%"),
        )
    parser.add_argument("--expect", metavar="FILE", default=EXPECTATION, help="the expectation (default: %(default)s)")
    parser.add_argument("--update", action="store_true", help="write the expectation instead of comparing with it")
    parser.add_argument(
        "--score-tolerance",
        metavar="SHARE",
        type=float,
        default=0.0,
        help="how far a score may move, as a share of the metric's largest value (default: 0)",
    )
    parser.add_argument(
        "--kept-tolerance",
        metavar="TOKENS",
        type=float,
        default=0.0,
        help="how far a cell's mean kept and total tokens may move (default: 0)",
    )
    parser.add_argument(
        "--answers",
        metavar="exact|ignore|SHARE",
        help="how many of all answers may differ (default: exact; "
        f"{OTHER_TORCH_SHARE:g} where another torch made the expectation)",
    )
    parser.add_argument("--junit", metavar="FILE", help="write a JUnit report, a test case for each cell")
    parser.add_argument("--output", metavar="FOLDER", help="keep the run folder here (default: thrown away)")


def tolerance_of(score: float, kept: float, answers: str | None) -> Tolerance:
    """A tolerance from what the command line says; `answers` is exact, ignore, or a share (0.05, 5%).

    Raises
    ------
    InputError: a value that is none.
    """
    for flag, value in (("--score-tolerance", score), ("--kept-tolerance", kept)):
        if not 0 <= value < math.inf:
            raise InputError(f"{flag} {value:g} is not usable: give 0 or more")
    share = {"exact": 0.0, "ignore": 1.0}.get(answers or "")
    if answers is not None and share is None:
        try:
            share = float(answers[:-1]) / 100 if answers.endswith("%") else float(answers)
        except ValueError:
            share = math.nan
        if not 0 <= share <= 1:
            raise InputError(
                f"--answers '{answers}' is not usable: give exact, ignore, or the share of answers that may differ, "
                "0.05 or 5%"
            )
    return Tolerance(score, kept, share)


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

    Parameters
    ----------
    given: fields of `SweepSpec` that were asked for.
    expect: the expectation file. update: write it instead of comparing with it.
    junit: file for a JUnit report. output: run folder to keep.

    Raises
    ------
    InputError: settings that can't be used, an expectation that is missing, unreadable or made with other settings, or
        a file that can't be written.
    """
    path = Path(expect)
    expected = None if update and not path.exists() else read(path)
    spec, settings = spec_of(given, expected.settings if expected else None)
    if expected is not None and not update and (names := expected.settings.differing(settings)):
        there = " ".join(expected.settings.shown(name) for name in names)
        here = " ".join(settings.shown(name) for name in names)
        raise InputError(
            f"the expectation '{path}' was made with other settings ({', '.join(names)}): {there}; "
            f"asked for here: {here}; leave them out, or make it anew with --update"
        )
    for file in [path, *([] if junit is None else [Path(junit)])]:
        if file.is_dir() or not file.absolute().parent.is_dir():
            raise InputError(f"cannot write '{file}': give a file name in a folder that exists")
    if (
        output is not None
        and (Path(output) / "spec.yaml").exists()
        and load_spec(Path(output) / "spec.yaml").name != _NAME
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


def read(path: Path) -> Expectation:
    """The expectation in a file.

    Raises
    ------
    InputError: missing, or not what `smoke --update` writes.
    """
    try:
        return Expectation.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        raise InputError(
            f"there is no expectation '{path}' to compare with: make one with `smoke --update` and commit it"
        ) from None
    except OSError as error:
        raise InputError(f"the expectation '{path}' can't be read: {error.strerror}") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InputError(
            f"'{path}' is not an expectation that this version reads ({f'{where}: ' if where else ''}{first['msg']}): "
            "delete it and make it anew with `smoke --update`"
        ) from error


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


# What XML 1.0 can't hold, escaped or not.
_NOT_XML = re.compile("[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]")


def to_junit(outcome: Outcome, comparison: Comparison | None) -> str:
    """A JUnit report with a test case for each cell: a failure where it moved, an error where it failed.

    Parameters
    ----------
    comparison: None where nothing was compared (`--update`).
    """
    moved = dict(comparison.moved) if comparison else {title: [reason] for title, reason in outcome.failed.items()}
    titles = [*dict.fromkeys([*outcome.tasks, *moved])]
    counts = {
        "tests": str(len(titles)),
        "failures": str(len(set(moved) - set(outcome.failed))),
        "errors": str(len(outcome.failed)),
    }
    suites = ET.Element("testsuites", counts)
    attributes = {**counts, "name": "visionselector-eval smoke", "time": f"{outcome.wall_seconds:.3f}"}
    suite = ET.SubElement(suites, "testsuite", attributes)
    properties = ET.SubElement(suite, "properties")
    for name, value in outcome.observed.made_with.items():
        ET.SubElement(properties, "property", {"name": name, "value": _xml(value)})
    for title in titles:
        name = f"smoke.{outcome.tasks[title]}" if title in outcome.tasks else "smoke"
        seconds = f"{outcome.seconds.get(title, 0.0):.3f}"
        case = ET.SubElement(suite, "testcase", {"classname": _xml(name), "name": _xml(title), "time": seconds})
        if lines := moved.get(title):
            kind = "error" if title in outcome.failed else "failure"
            problem = ET.SubElement(case, kind, {"message": _xml("; ".join(line.strip() for line in lines))})
            problem.text = _xml("\n".join(lines))
    ET.indent(suites)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ET.tostring(suites, encoding="unicode") + "\n"


def _xml(text: str) -> str:
    return _NOT_XML.sub("\ufffd", text)
