"""The run folder: what one sweep writes, and how it is read again.

::

    <run>/spec.yaml                      what was asked for
    <run>/environment.json               what it ran on (earlier machines of a resumed run under "earlier")
    <run>/cells/<digest>/answers.jsonl   journal of a cell in progress; gone once the cell is done
    <run>/cells/<digest>/samples.parquet one row a document
    <run>/cells/<digest>/cell.json       written last, by rename: the completion record

A folder by itself means nothing: a cell is done when its `cell.json` says so and its samples are all there. Only one
process writes a run folder (`Run.lock`); any number may read it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from visionselector_eval.baselines.budget import Budget, parse_budget
from visionselector_eval.baselines.errors import InputError

log = logging.getLogger(__name__)

SAMPLE_COLUMNS = ("doc_id", "answer", "target", "score", "kept_tokens", "total_tokens")
"""What every samples table has; `cluster` (documents with the same value are not independent) and more may
follow."""

IDENTITY = ("cell", "backbone", "method", "label", "budget", "task", "seed")
"""What `load_run` puts before them, from the cell's record, so that it is stored once and cannot disagree."""


# ---------------------------------------------------------------- digests


def plain(value: Any) -> Any:
    """`value` as JSON can hold it exactly: mappings with text keys, lists, text, numbers, booleans, None.

    Raises
    ------
    TypeError: for anything whose text might differ between two processes (objects), instead of hashing its
    address.
    """
    if value is None or isinstance(value, bool | str):
        return str(value) if isinstance(value, str) else value
    if isinstance(value, Mapping):
        out = {str(key): plain(item) for key, item in value.items()}
        if len(out) != len(value):
            raise TypeError(f"two keys of {list(value)} have the same text")
        return out
    if isinstance(value, set | frozenset):
        return sorted((plain(item) for item in value), key=lambda item: json.dumps(item, sort_keys=True))
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    if type(value).__module__ == "numpy" and hasattr(value, "tolist"):
        return plain(value.tolist())
    if isinstance(value, Budget):  # checked after tuples and numbers: budgets are plain dataclasses
        return str(value)
    raise TypeError(f"{value!r} of type {type(value).__name__} is not plain data")


def canonical_json(value: Any) -> str:
    """One text for one value: sorted keys, no spaces, ASCII, floats by `repr` (so 1 and 1.0 differ).

    Raises
    ------
    TypeError: for what is not plain data. ValueError: for nan and infinities.
    """
    return json.dumps(plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def digest_of(settings: Mapping[str, Any]) -> str:
    """Name of a cell: the first 16 hex digits of the sha256 of its settings' canonical JSON."""
    return hashlib.sha256(canonical_json(settings).encode()).hexdigest()[:16]


# ---------------------------------------------------------------- atomic files


def write_atomic(path: Path, data: bytes | str) -> None:
    """Write a file so that a reader sees the old one or the new one, whole, even after a crash.

    The temporary name is fixed, so what a killed writer left is overwritten by the next one instead of
    staying.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with open(temporary, "wb") as file:
        file.write(data.encode() if isinstance(data, str) else data)
        file.flush()
        os.fsync(file.fileno())
    _rename(temporary, path)


def _rename(temporary: Path, path: Path) -> None:
    os.replace(temporary, path)
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    # Makes the rename itself last through a power cut. Not every file system can do it on a folder.
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


# ---------------------------------------------------------------- records


class CellRecord(BaseModel):
    """The completion record of one cell, the content of `cell.json`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    digest: str = Field(description="name of the cell: `digest_of(settings)`")
    backbone: str = Field(description="path or hub id of the backbone")
    revision: str = Field(default="", description="commit or weights' hash of the backbone")
    remark: str = Field(
        default="", description="what tables say beside the backbone's name, such as that its LLM was retrained"
    )
    method: str = Field(description="name of the compressor")
    label: str = Field(default="", description="how tables call method + options; the method's name when empty")
    options: dict[str, Any] = Field(default_factory=dict, description="the compressor's options, defaults included")
    budget: str = Field(description="canonical text of the budget: 0.2 or 64tok")
    task: str
    seed: int = 0
    metric: str = Field(default="", description="name of the headline metric")
    score: float | None = Field(default=None, description="the headline metric; None where it could not be computed")
    metrics: dict[str, float | None] = Field(default_factory=dict, description="every metric that the task reported")
    metric_note: str = Field(default="", description="why the headline metric is a guess; empty where it is none")
    higher_is_better: bool = True
    scale: float | None = Field(default=1.0, description="largest possible score: 1, 100, 2000 (MME); None: not known")
    mean_of_documents: bool = Field(
        default=True,
        description="whether `score` is the mean of the samples' scores (false for F1, MME, corpus metrics)",
    )
    cluster_key: str | None = Field(default=None, description="field of the document that the samples' `cluster` holds")
    n_documents: int = 0
    needs_submission: bool = Field(default=False, description="scored by the benchmark's server: a file was written")
    n_skipped: int = Field(default=0, description="documents that could not be read and count as unanswered")
    kept_tokens: float | None = Field(default=None, description="mean over documents that have visual tokens, measured")
    total_tokens: float | None = Field(
        default=None, description="the same mean of the visual tokens before compression"
    )
    layer_tokens: float | None = Field(
        default=None, description="the same mean of the visual tokens averaged over the LLM's layers"
    )
    status: Literal["done", "failed"] = "done"
    error: str | None = Field(default=None, description="why the cell failed")
    seconds: float = 0.0
    version: str = Field(default="", description="version of visionselector-eval")
    finished_at: str = Field(default="", description="UTC, ISO 8601")
    context: str = Field(
        default="",
        description="digest of the settings that a cell must share with the full row it is compared with; "
        "cells whose contexts are given and differ are never compared",
    )
    settings: dict[str, Any] = Field(default_factory=dict, description="everything that the digest covers")

    @field_validator("budget", mode="before")
    @classmethod
    def _budget(cls, value: Any) -> str:
        return str(parse_budget(value))

    @field_validator("score", "kept_tokens", "total_tokens", "layer_tokens", mode="after")
    @classmethod
    def _finite(cls, value: float | None) -> float | None:
        # JSON has no nan; None says the same: there is no number.
        return value if value is None or math.isfinite(value) else None

    @field_validator("metrics", mode="after")
    @classmethod
    def _finite_values(cls, value: dict[str, float | None]) -> dict[str, float | None]:
        return {key: cls._finite(number) for key, number in value.items()}

    @field_validator("options", "settings", mode="before")
    @classmethod
    def _plain(cls, value: Any) -> Any:
        return plain(value)


RECORD_COLUMNS = tuple(CellRecord.model_fields)
_JSON_COLUMNS = ("options", "metrics", "settings")


# ---------------------------------------------------------------- journal


class Journal:
    """Answers of a cell in progress: append-only JSON lines, one line a batch.

    A line is written by one system call and synced, so a killed process leaves whole lines and at most one torn last
    one. Reading ignores a torn end; the next append cuts it off first.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._clean = False  # whether this object has seen to it that the file ends with a whole line

    def append(self, batch: int, answers: Sequence[Mapping[str, Any]]) -> None:
        """Add one batch; on return it is on disk.

        Parameters
        ----------
        batch: the batch's number in the cell's plan.
        answers: one mapping of plain data for each document of the batch.
        """
        entry = {"batch": int(batch), "answers": [plain(answer) for answer in answers]}
        # nan is allowed here, unlike in digests: an answer's own numbers (probabilities) come back as they
        # were.
        line = json.dumps(entry, separators=(",", ":"), ensure_ascii=True).encode() + b"\n"
        if not self._clean:
            self._repair()
        handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            size = os.fstat(handle).st_size
            try:
                written = os.write(handle, line)
                if written != len(line):  # a full disk
                    raise OSError(f"only {written} of {len(line)} bytes could be written to {self.path.name}")
                os.fsync(handle)
            except OSError:
                with suppress(OSError):
                    os.ftruncate(handle, size)
                raise
        finally:
            os.close(handle)

    def read(self) -> list[dict[str, Any]]:
        """The whole batches, in the order of writing: `{"batch": int, "answers": [...]}` each."""
        return self._parse()[0]

    def _parse(self) -> tuple[list[dict[str, Any]], int]:
        """The valid entries and the length in bytes of the part of the file that holds them."""
        try:
            data = self.path.read_bytes()
        except FileNotFoundError:
            return [], 0
        entries: list[dict[str, Any]] = []
        end = 0
        while (stop := data.find(b"\n", end)) >= 0:
            try:
                entry = json.loads(data[end:stop])
            except ValueError:
                break  # a power cut can leave a block of zeros: what follows cannot be trusted either
            if not (
                isinstance(entry, dict)
                and isinstance(entry.get("batch"), int)
                and isinstance(entry.get("answers"), list)
            ):
                break
            entries.append(entry)
            end = stop + 1
        return entries, end

    def _repair(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        _, length = self._parse()
        if self.path.exists() and self.path.stat().st_size > length:
            log.info("%s ended in a torn line, which is cut off; its batch is answered again", self.path.name)
            os.truncate(self.path, length)
        self._clean = True


# ---------------------------------------------------------------- the run folder


class Run:
    """One run folder. `Run.open` makes sure that it can be used."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)

    @classmethod
    def open(cls, folder: str | Path, *, create: bool) -> Run:
        """The run in `folder`.

        Parameters
        ----------
        create: make the folder where it is missing and make sure that it can be written to; otherwise it
        must exist.

        Raises
        ------
        InputError: missing (without `create`), not a folder, or not writable (with it).
        """
        run = cls(Path(folder))
        if not create:
            if not run.folder.is_dir():
                raise _no_run(run.folder)
            return run
        try:
            (run.folder / "cells").mkdir(parents=True, exist_ok=True)
            probe = run.folder / ".writable"
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise InputError(
                f"cannot write to the run folder '{folder}': {error.strerror or error}; "
                "give a folder that you may write to"
            ) from error
        return run

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Keeps a second writer out while inside; a killed process leaves no lock behind.

        Raises
        ------
        InputError: another process is writing this run.
        """
        try:
            import fcntl
        except ImportError:  # no advisory locks on this system
            yield
            return
        handle = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        try:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise InputError(
                    f"another process is writing the run folder '{self.folder}': wait for it, or give another folder"
                ) from None
            except OSError:  # a network file system without locks: better unlocked than unusable
                log.debug("no lock on %s", self.folder, exc_info=True)
            yield
        finally:
            os.close(handle)

    def write_spec(self, yaml_text: str) -> None:
        """Store what was asked for."""
        write_atomic(self.folder / "spec.yaml", yaml_text)

    def write_environment(self, environment: Mapping[str, Any]) -> None:
        """Store what the run runs on. A resumed run keeps the other environments it had, under `earlier`."""
        path = self.folder / "environment.json"
        new = plain(environment)
        earlier: list[Any] = []
        if old := self.environment():
            earlier = old.pop("earlier", [])
            if old != new:
                earlier = [entry for entry in earlier if entry != new]
                earlier.append(old)
        if earlier:
            new = {**new, "earlier": earlier}
        write_atomic(path, json.dumps(new, indent=2, ensure_ascii=False) + "\n")

    def environment(self) -> dict[str, Any]:
        """What `write_environment` stored, or an empty dict."""
        try:
            value = json.loads((self.folder / "environment.json").read_bytes())
        except (OSError, ValueError):
            return {}
        return value if isinstance(value, dict) else {}

    def digests(self) -> list[str]:
        """Sorted names of all cell folders, whatever their state."""
        try:
            return sorted(entry.name for entry in (self.folder / "cells").iterdir() if entry.is_dir())
        except OSError:
            return []

    def record(self, digest: str) -> dict[str, Any] | None:
        """The content of a cell's `cell.json`, checked; None where there is none or it is torn or invalid."""
        record = self._record(digest)
        return None if record is None else record.model_dump()

    def _record(self, digest: str) -> CellRecord | None:
        path = self._cell(digest) / "cell.json"
        try:
            record = CellRecord.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValidationError) as error:
            log.warning("cells/%s/cell.json is not a valid record and does not count: %s", digest, _first_line(error))
            return None
        if record.digest != digest:
            log.warning("cells/%s/cell.json belongs to %s and does not count", digest, record.digest)
            return None
        return record

    def is_done(self, digest: str) -> bool:
        """Whether the cell is finished: valid record, status "done", samples present with the recorded
        number of rows."""
        record = self._record(digest)
        return record is not None and record.status == "done" and self._complete(record)

    def _complete(self, record: CellRecord) -> bool:
        import pyarrow as pa  # a profile on a machine without network does without it
        import pyarrow.parquet as pq

        try:
            rows = pq.read_metadata(self._cell(record.digest) / "samples.parquet").num_rows
        except (OSError, pa.ArrowException):
            return False
        return rows == record.n_documents

    def journal(self, digest: str) -> Journal:
        """The journal of a cell; its file appears with the first batch."""
        return Journal(self._cell(digest) / "answers.jsonl")

    def finish(self, digest: str, record: CellRecord, samples: pd.DataFrame) -> None:
        """Store a finished cell: samples first, the record last, then the journal is removed.

        Parameters
        ----------
        samples: one row a document with at least `SAMPLE_COLUMNS`. Answers and targets that are not text are
        stored
            as JSON text. Columns of `IDENTITY` are not stored: they come from the record.

        Raises
        ------
        ValueError: the record is of another cell, or does not fit the samples.
        """
        if record.digest != digest:
            raise ValueError(f"a record of {record.digest} was given for cell {digest}")
        if record.status != "done":
            raise ValueError("finish() takes a record of status 'done'; use fail() for a failed cell")
        if missing := [name for name in SAMPLE_COLUMNS if name not in samples.columns]:
            raise ValueError(f"samples have no column {', '.join(missing)}")
        if len(samples) != record.n_documents:
            raise ValueError(f"{len(samples)} samples for {record.n_documents} documents")
        folder = self._cell(digest)
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / ".samples.parquet.tmp"
        _storable(samples).to_parquet(temporary, index=False)
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        _rename(temporary, folder / "samples.parquet")
        self._write_record(record)
        self.journal(digest).path.unlink(missing_ok=True)

    def fail(self, digest: str, record: CellRecord, reason: str) -> None:
        """Store a failed cell with its reason. Its journal stays, so that a re-run goes on from there."""
        if record.digest != digest:
            raise ValueError(f"a record of {record.digest} was given for cell {digest}")
        self._cell(digest).mkdir(parents=True, exist_ok=True)
        self._write_record(record.model_copy(update={"status": "failed", "error": reason.strip() or "unknown reason"}))

    def _write_record(self, record: CellRecord) -> None:
        # round trip first: what could not be read back must not become a completion record
        text = record.model_dump_json(indent=2)
        CellRecord.model_validate_json(text)
        write_atomic(self._cell(record.digest) / "cell.json", text + "\n")

    def remove(self, digest: str) -> None:
        """Forget a cell, finished or not. Its record goes first, so that a kill in between leaves no half
        cell counted."""
        folder = self._cell(digest)
        (folder / "cell.json").unlink(missing_ok=True)
        if folder.exists():
            _sync_folder(folder)
            shutil.rmtree(folder)

    def _cell(self, digest: str) -> Path:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", digest):
            raise ValueError(f"{digest!r} is not a cell's digest")
        return self.folder / "cells" / digest


def _text(value: Any) -> str:
    if isinstance(value, str):
        return value.encode("utf-8", "replace").decode()  # a lone surrogate cannot be stored
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    try:
        return json.dumps(plain(value), ensure_ascii=False)
    except (TypeError, ValueError):
        return str(value)


def _storable(samples: pd.DataFrame) -> pd.DataFrame:
    """A copy whose columns have one type each, as parquet needs, independent of the order of work."""
    out = samples.drop(columns=[name for name in IDENTITY if name in samples.columns]).reset_index(drop=True)
    out = out[[*SAMPLE_COLUMNS, *(name for name in out.columns if name not in SAMPLE_COLUMNS)]].copy()
    for name in ("answer", "target"):
        out[name] = [_text(value) for value in out[name]]
    out["score"] = pd.to_numeric(out["score"], errors="coerce").astype("float64")
    for name in ("kept_tokens", "total_tokens"):
        out[name] = pd.to_numeric(out[name]).fillna(0).astype("int64")
    for name in ("doc_id", *(name for name in out.columns if name not in SAMPLE_COLUMNS)):
        if out[name].dtype == object:
            kinds = {type(value) for value in out[name]}
            if kinds != {int} and kinds != {bool} and not kinds <= {float, int, type(None)}:
                out[name] = [None if value is None else _text(value) for value in out[name]]
    return out


# ---------------------------------------------------------------- reading


class RunFrames(NamedTuple):
    """A run as two tables.

    Attributes
    ----------
    cells: one row a cell: every field of `CellRecord`; `options`, `metrics` and `settings` as canonical JSON
    text.
    samples: one row a document of a finished cell: `IDENTITY`, then the columns of its samples.
    """

    cells: pd.DataFrame
    samples: pd.DataFrame


def load_run(path: str | Path) -> RunFrames:
    """Read a run folder: `cells, samples = load_run("runs/mine")`.

    A cell whose record says "done" but whose samples are missing or short counts as failed.

    Raises
    ------
    InputError: there is no such folder, or no recorded cell in it.
    """
    run = Run.open(path, create=False)
    rows: list[dict[str, Any]] = []
    frames: list[pd.DataFrame] = []
    for digest in run.digests():
        record = run._record(digest)
        if record is None:
            continue
        if record.status == "done" and not run._complete(record):
            log.warning("cells/%s is recorded as done but its samples are not all there", digest)
            record = record.model_copy(
                update={
                    "status": "failed",
                    "score": None,
                    "error": "its samples.parquet is missing or incomplete",
                }
            )
        if record.status == "done":
            table = pd.read_parquet(run._cell(digest) / "samples.parquet")
            for place, name in enumerate(IDENTITY):
                value = digest if name == "cell" else _label(record) if name == "label" else getattr(record, name)
                table.insert(place, name, value)
            frames.append(table)
        row = record.model_dump()
        rows.append({**row, "label": _label(record), **{name: canonical_json(row[name]) for name in _JSON_COLUMNS}})
    if not rows:
        raise InputError(f"no finished or failed cell in '{path}': it is no run folder, or its sweep has only begun")
    cells = pd.DataFrame(rows, columns=list(RECORD_COLUMNS))
    for name in ("score", "kept_tokens", "total_tokens", "layer_tokens", "seconds", "scale"):
        cells[name] = cells[name].astype("float64")
    order = ["backbone", "task", "label", "budget", "seed", "digest"]
    cells = cells.sort_values(order, kind="stable", ignore_index=True)
    if frames:
        samples = pd.concat(frames, ignore_index=True)
    else:
        samples = pd.DataFrame(columns=[*IDENTITY, *SAMPLE_COLUMNS])
    return RunFrames(cells, samples)


def _label(record: CellRecord) -> str:
    return record.label or record.method


def _no_run(folder: Path) -> InputError:
    return InputError(f"there is no run folder '{folder}': give the folder that a sweep wrote, for example runs/NAME")


def _first_line(error: Exception) -> str:
    return str(error).strip().split("\n")[0]
