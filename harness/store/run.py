"""A run folder: the only writer of it, and its two tables."""

from __future__ import annotations

import json
import logging
import math
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
from pydantic import ValidationError

from visionselector_eval.baselines.contract.errors import InputError, one_line
from visionselector_eval.harness.store.files import (
    canonical_json,
    plain,
    rename_synced,
    sync_folder,
    write_atomic,
)
from visionselector_eval.harness.store.journal import Journal
from visionselector_eval.harness.store.record import IDENTITY, JSON_COLUMNS, RECORD_COLUMNS, SAMPLE_COLUMNS, CellRecord

log = logging.getLogger(__name__)


class Run:
    """One run folder. `Run.open` makes sure that it can be used."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)

    @classmethod
    def open(cls, folder: str | Path, *, create: bool) -> Run:
        """The run in `folder`.

        Args:
            create: make the folder where it is missing and make sure that it can be written to; otherwise it must
                exist.

        Raises:
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

        Raises:
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
        """The content of a cell's `cell.json`, checked; None where there is none or it is truncated or invalid."""
        record = self._record(digest)
        return None if record is None else record.model_dump()

    def _record(self, digest: str) -> CellRecord | None:
        path = self._cell(digest) / "cell.json"
        try:
            record = CellRecord.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValidationError) as error:
            log.warning("cells/%s/cell.json is not a valid record and does not count: %s", digest, one_line(error))
            return None
        if record.digest != digest:
            log.warning("cells/%s/cell.json belongs to %s and does not count", digest, record.digest)
            return None
        return record

    def is_done(self, digest: str) -> bool:
        """Whether the cell is finished: valid record, status "done", samples with the recorded number of rows."""
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

        Args:
            samples: one row a document with at least `SAMPLE_COLUMNS`. Answers and targets that are not text are stored
                as JSON text. Columns of `IDENTITY` are not stored: they come from the record.

        Raises:
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
        rename_synced(temporary, folder / "samples.parquet")
        self._write_record(record)
        self.journal(digest).path.unlink(missing_ok=True)

    def fail(self, digest: str, record: CellRecord, reason: str) -> None:
        """Store a failed cell with its reason. Its journal stays, so that a re-run resumes from there."""
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
        """Forget a cell, finished or not; its record goes first, so that a kill leaves no half cell counted."""
        folder = self._cell(digest)
        (folder / "cell.json").unlink(missing_ok=True)
        if folder.exists():
            sync_folder(folder)
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


class RunFrames(NamedTuple):
    """A run as two tables.

    Attributes:
        cells: one row a cell: every field of `CellRecord`; `options`, `metrics` and `settings` as canonical JSON text.
        samples: one row a document of a finished cell: `IDENTITY`, then the columns of its samples.
    """

    cells: pd.DataFrame
    samples: pd.DataFrame


def load_run(path: str | Path) -> RunFrames:
    """Read a run folder as two tables: cells and samples.

    A cell whose record says "done" but whose samples are missing or short counts as failed.

    Raises:
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
        rows.append({**row, "label": _label(record), **{name: canonical_json(row[name]) for name in JSON_COLUMNS}})
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
