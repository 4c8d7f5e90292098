"""Numbers that papers print: read and checked, and shown apart from what is measured here.

`results/published/` has one CSV for each source and `backbones.yaml`, which says what ids the backbones of the tables
have; its README explains the columns. Nothing there was measured here, and no leaderboard reads it.
"""

from __future__ import annotations

import csv
import math
import textwrap
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator
from tabulate import tabulate

from visionselector_eval.baselines.contract.budget import parse_budget
from visionselector_eval.baselines.contract.errors import InputError, unknown
from visionselector_eval.harness.report.comparison import REFERENCE
from visionselector_eval.harness.report.render import budget_text
from visionselector_eval.harness.store.files import write_atomic
from visionselector_eval.harness.store.run import Run, load_run

# Beside the packages both in a checkout and where they are installed.
FOLDER = Path(__file__).resolve().parents[2] / "results" / "published"

LABEL = "published, not measured here"
SEPARATOR = " / "
"""Between the reasons in `differs`, and between notes."""
_CERTAINTY = {"P": "read in the source", "S": "known at second hand"}
_TABLE = ["source", "place", "certainty", "backbone"]


class _Number(BaseModel):
    """One printed number; the fields are the columns of a file."""

    model_config = ConfigDict(extra="forbid", frozen=True, str_strip_whitespace=True)

    source: str = Field(min_length=1)
    place: str = Field(min_length=1)
    backbone: str = Field(min_length=1)
    method: str = Field(min_length=1)
    kept: str
    task: str = Field(min_length=1)
    metric: str = Field(min_length=1)
    value: str
    certainty: Literal["P", "S"]
    differs: str
    note: str

    @field_validator("kept")
    @classmethod
    def _kept(cls, value: str) -> str:
        return str(parse_budget(value)) if value else ""

    @field_validator("value")
    @classmethod
    def _value(cls, value: str) -> str:
        try:
            usable = math.isfinite(float(value))
        except ValueError:
            usable = False
        if not usable:
            raise InputError(f"value '{value}' is not a number: leave a row out whose number is not printed")
        return value


COLUMNS = tuple(_Number.model_fields)


def load_published(folder: str | Path = FOLDER) -> pd.DataFrame:
    """Every published number, in the order of the files: `COLUMNS` and `number`, the value as a float.

    Raises:
        InputError: no such folder, or a file in it that is not as its README says; the line is named.
    """
    folder = Path(folder)
    files = sorted(folder.glob("*.csv"))
    if not files:
        raise InputError(f"no published numbers in '{folder}': reinstall the package, or give a folder of CSV files")
    names = aliases(folder)
    rows: list[dict[str, Any]] = []
    for file in files:
        seen: dict[tuple[str, ...], int] = {}
        for line, number in _read(file):
            place = f"{file.name}, line {line}"
            if number.backbone not in names:
                raise InputError(f"{place}: {unknown('backbone', number.backbone, names)} (of backbones.yaml)")
            key = (*(getattr(number, name) for name in _TABLE), number.method, number.kept, number.task, number.metric)
            if seen.setdefault(key, line) != line:
                raise InputError(f"{place}: the same number as in line {seen[key]}: keep one of them")
            rows.append({**number.model_dump(), "number": float(number.value)})
    return pd.DataFrame(rows, columns=[*COLUMNS, "number"])


def _read(file: Path) -> Iterable[tuple[int, _Number]]:
    try:
        with file.open(newline="", encoding="utf-8") as stream:
            reader = csv.DictReader(stream, strict=True)
            header = list(reader.fieldnames or [])
            for name in header:
                if name not in COLUMNS:
                    raise InputError(f"{file.name}: {unknown('column', name, COLUMNS)}")
            if missing := [name for name in COLUMNS if name not in header]:
                raise InputError(f"{file.name}: no column {', '.join(missing)}: its columns are {', '.join(COLUMNS)}")
            for row in reader:
                if None in row or None in row.values():
                    raise InputError(
                        f"{file.name}, line {reader.line_num}: not {len(COLUMNS)} values: quote those with a comma"
                    )
                yield reader.line_num, _checked(row, f"{file.name}, line {reader.line_num}")
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{file.name} can't be read as CSV: {' '.join(str(error).split())}") from error


def _checked(row: Mapping[str, Any], place: str) -> _Number:
    try:
        return _Number.model_validate(row)
    except ValidationError as error:
        first = error.errors()[0]
        cause, name = first.get("ctx", {}).get("error"), first["loc"][0]
        if isinstance(cause, InputError):
            raise InputError(f"{place}: {cause}") from error
        if first["type"] == "string_too_short":
            raise InputError(f"{place}: {name} is empty: every number needs one") from error
        raise InputError(f"{place}: invalid {name} '{row[str(name)]}': expected {' or '.join(_CERTAINTY)}") from error


def aliases(folder: str | Path = FOLDER) -> dict[str, list[str]]:
    """What the last part of a backbone's id may be, in small letters, for each backbone of the tables.

    Raises:
        InputError: `backbones.yaml` is missing or no mapping of names to lists.
    """
    file = Path(folder) / "backbones.yaml"
    try:
        read = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise InputError(f"{file.name} can't be read: {' '.join(str(error).split())}") from error
    if not isinstance(read, dict) or not all(isinstance(found, list) for found in read.values()):
        raise InputError(f"{file.name} must map each backbone to a list of the last parts of its ids")
    return {str(name): [str(part).lower() for part in found] for name, found in read.items()}


def backbone_named(identity: str, names: Mapping[str, Sequence[str]]) -> str | None:
    """The backbone of the tables that a hub id or folder is, None where it is not known to be one."""
    last = identity.partition(" @ ")[0].rstrip("/").rpartition("/")[2].lower()
    return next((name for name, parts in names.items() if last in parts or last == name.lower()), None)


def chosen(
    numbers: pd.DataFrame, *, backbone: str | None = None, method: str | None = None, task: str | None = None
) -> pd.DataFrame:
    """The rows of one backbone (a name or an id), method or task.

    Raises:
        InputError: no number of those that are left has that name (with the near match).
    """
    if backbone is not None:
        backbone = backbone_named(backbone, aliases()) or backbone
    for column, value in (("backbone", backbone), ("method", method), ("task", task)):
        if value is None:
            continue
        if value not in set(numbers[column]):
            raise unknown(f"published {column}", value, sorted(set(numbers[column])))
        numbers = numbers[numbers[column] == value]
    return numbers


def beside(numbers: pd.DataFrame, cells: pd.DataFrame, names: Mapping[str, Sequence[str]]) -> pd.DataFrame:
    """The rows for the backbones, tasks and methods that occur in a run (`cells` of `load_run`), at any budget."""
    expected = pd.DataFrame(
        {
            "backbone": [backbone_named(str(identity), names) for identity in cells["backbone"]],
            "task": cells["task"],
            "method": cells["method"],
        }
    )
    found = pd.Series(False, index=numbers.index)
    for backbone, own in expected.groupby("backbone"):
        here = numbers["backbone"] == backbone
        found |= here & numbers["task"].isin(own["task"]) & numbers["method"].isin([REFERENCE, *own["method"]])
    return numbers[found]


def render(numbers: pd.DataFrame, style: str = "simple") -> str:
    """A table for each source and backbone: methods and what they keep below, tasks beside, and what to know of them.

    Args:
        style: a table format of tabulate; with "github" the titles are headings.
    """
    parts = []
    for (source, place, certainty, backbone), rows in numbers.groupby(_TABLE, sort=False):
        title = f"{backbone} ({LABEL}): {source}, {place}; {_CERTAINTY[str(certainty)]}"
        parts += [f"### {title}" if style == "github" else title, "", *_table(rows, style), ""]
    return "\n".join(parts)


def _table(rows: pd.DataFrame, style: str) -> list[str]:
    """Numbers that can be compared with ours, apart from them those that differ, and what is to be known of both."""
    equal, other = rows[rows["differs"] == ""], rows[rows["differs"] != ""]
    lines = [*_grid(equal, style, []), ""] if len(equal) else []
    if len(other):
        remarks = list(dict.fromkeys(reason for text in other["differs"] for reason in text.split(SEPARATOR)))
        lines += ["Not to be compared with ours:", ""] if len(equal) else []
        lines += [*_grid(other, style, remarks), ""]
        lines += _listed([f"[{number}] differs from ours: {text}" for number, text in enumerate(remarks, 1)], style)
    notes: dict[str, list[Mapping[Any, Any]]] = {}
    for row in rows.to_dict("records"):
        for note in filter(None, row["note"].split(SEPARATOR)):
            notes.setdefault(note, []).append(row)
    return lines + _listed([f"{_about(group, rows)}: {note}" for note, group in notes.items()], style)


def _listed(lines: list[str], style: str) -> list[str]:
    return [f"- {line}" for line in lines] if style == "github" else lines


def _about(group: Sequence[Mapping[Any, Any]], rows: pd.DataFrame) -> str:
    """What a note is about: methods where it holds for all of their tasks, else tasks."""
    methods = list(dict.fromkeys(row["method"] for row in group))
    whole = len(group) == rows["method"].isin(methods).sum()
    return ", ".join(methods if whole else dict.fromkeys(row["task"] for row in group))


def _grid(rows: pd.DataFrame, style: str, remarks: list[str]) -> list[str]:
    """Methods and what they keep below, tasks beside; a remark's number stands where all that it is about does.

    Args:
        remarks: the reasons in `differs`, by their number from 1.
    """
    records = rows.to_dict("records")
    for row in records:
        row["reasons"] = set(filter(None, row["differs"].split(SEPARATOR)))
        row["column"], row["line"] = (row["task"], row["metric"]), (row["method"], row["kept"])

    def shared(key: str) -> dict[Any, set[str]]:
        """The reasons that all numbers of a column or a line have."""
        found: dict[Any, set[str]] = {}
        for row in records:
            found[row[key]] = found.get(row[key], row["reasons"]) & row["reasons"]  # a set of its own
        return found

    def marked(text: str, reasons: set[str]) -> str:
        numbers = ",".join(str(n) for n, reason in enumerate(remarks, 1) if reason in reasons)
        return f"{text} [{numbers}]" if numbers else text

    columns, lines = shared("column"), shared("line")
    # What holds for all of both is said of that which has more numbers.
    size = Counter(row[key] for row in records for key in ("column", "line"))
    for row in records:
        less, more = (lines[row["line"]], columns[row["column"]])
        if size[row["line"]] > size[row["column"]]:
            less, more = more, less
        less -= more
    head = []
    for (task, metric), reasons in columns.items():
        title = marked(task, reasons)
        head.append(f"{title} / {metric}" if style == "github" else "\n".join([title, *textwrap.wrap(metric, 16)]))
    body = []
    for (method, kept), reasons in lines.items():
        values = {
            row["column"]: marked(row["value"], row["reasons"] - reasons - columns[row["column"]])
            for row in records
            if row["line"] == (method, kept)
        }
        budget = budget_text(str(kept)) if kept else "?"
        body.append([marked(method, reasons), budget, *(values.get(column, "-") for column in columns)])
    align = ["left", *["right"] * (len(columns) + 1)]
    return tabulate(body, ["method", "kept", *head], tablefmt=style, disable_numparse=True, colalign=align).splitlines()


def write(run_folder: str | Path) -> str:
    """Published numbers for what a run measured, as text for the terminal; also written to its `published.md`.

    Raises:
        InputError: no run there, or the folder cannot be written to.
    """
    found = beside(load_published(), load_run(run_folder).cells, aliases())
    run = Run.open(run_folder, create=True)
    if found.empty:
        (run.folder / "published.md").unlink(missing_ok=True)
        return f"{LABEL}: nothing for the backbones, tasks and methods of this run (see `list published`)\n"
    about = (
        "Printed by the sources named, under their own prompts, images and scoring: not measured here, not ranked, "
        "and in other units than the leaderboard's."
    )
    write_atomic(run.folder / "published.md", f"# Published numbers\n\n{about}\n\n{render(found, 'github').strip()}\n")
    return f"{about}\n\n{render(found)}"
