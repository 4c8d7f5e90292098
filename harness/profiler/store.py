"""The folder of a profile, and how it is read again.

::

    <profile>/spec.yaml         what was asked for
    <profile>/environment.json  what it ran on
    <profile>/profile.json      settings that every row shares, the device's ceiling, how memory and energy were read
    <profile>/samples.jsonl     rows as they are measured; gone once all is done
    <profile>/samples.parquet   every row, nothing left out
    <profile>/table.md, ...     made from these by `report`
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd

from visionselector_eval.baselines.contract.errors import InputError
from visionselector_eval.harness.store.files import plain, write_atomic
from visionselector_eval.harness.store.journal import Journal
from visionselector_eval.harness.store.run import Run

log = logging.getLogger(__name__)

IDENTITY = ("workload", "item", "cell", "role", "method", "label", "options", "budget", "kind", "round")
"""What every row has: `kind` is time, plain, published, memory, flops, energy or failed."""


class Profile(NamedTuple):
    """A profile as data: `rows`, one for each measurement; `about`, the content of profile.json; its `folder`."""

    rows: pd.DataFrame
    about: dict[str, Any]
    folder: Path


class ProfileFolder:
    """Where one profile is written; rows are on disk as soon as they are measured.

    Raises:
        InputError: a folder that can't be written.
    """

    def __init__(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / ".writable"
            probe.write_bytes(b"")
            probe.unlink()
        except OSError as error:
            raise InputError(
                f"cannot write to the folder '{folder}': {error.strerror or error}; give one that you may write to"
            ) from error
        self.folder = folder
        self.run = Run(folder)
        self._journal = Journal(folder / "samples.jsonl")

    def forget(self) -> None:
        """Remove everything measured."""
        for name in ("samples.jsonl", "samples.parquet", "profile.json"):
            (self.folder / name).unlink(missing_ok=True)

    def settle(self, about: Mapping[str, Any]) -> dict[str, Any]:
        """Store what every row shares, or check that it is what an earlier call stored.

        Returns:
            what is stored: that of the earlier call where there was one.

        Raises:
            InputError: the folder holds rows made with other settings.
        """
        new = plain(about)
        old = _about(self.folder)
        if old:
            mine, theirs = new["settings"], old.get("settings", {})
            if different := sorted(k for k in {*mine, *theirs} if mine.get(k) != theirs.get(k)):
                key = different[0]
                raise InputError(
                    f"'{self.folder}' holds measurements made with other settings ({', '.join(different)}: "
                    f"{theirs.get(key)!r} then, {mine.get(key)!r} now): give another --name or --output, "
                    "or --existing overwrite"
                )
            return old
        write_atomic(self.folder / "profile.json", json.dumps(new, indent=2, ensure_ascii=False) + "\n")
        return new

    def append(self, row: Mapping[str, Any]) -> None:
        """Add one row; on return it is on disk."""
        self._journal.append(int(row["round"]), [row])

    def rows(self) -> pd.DataFrame:
        """All rows so far."""
        return _rows(self.folder)

    def finish(self) -> None:
        """All is measured: rows become one table, the journal goes; without pyarrow the journal stays."""
        if find_spec("pyarrow") is None:
            log.info("pyarrow is not installed: rows stay in %s", self._journal.path)
            return
        rows = _rows(self.folder)
        table = self.folder / "samples.parquet"
        temporary = table.with_name(".samples.parquet.tmp")
        rows.to_parquet(temporary, index=False)
        temporary.replace(table)
        self._journal.path.unlink(missing_ok=True)


def _rows(folder: Path) -> pd.DataFrame:
    parts = []
    if (folder / "samples.parquet").is_file():
        parts.append(pd.read_parquet(folder / "samples.parquet"))
    fresh = [row for line in Journal(folder / "samples.jsonl").read() for row in line["answers"]]
    if fresh:
        parts.append(pd.DataFrame(fresh))
    if not parts:
        return pd.DataFrame(columns=list(IDENTITY))
    rows = pd.concat(parts, ignore_index=True) if len(parts) > 1 else parts[0]
    # Killed between the table and the journal's removal: the same rows stand in both.
    return rows.drop_duplicates(["workload", "cell", "kind", "round", "at"], ignore_index=True)


def _about(folder: Path) -> dict[str, Any]:
    try:
        value = json.loads((folder / "profile.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def load_profile(path: str | Path) -> Profile:
    """Read a profile's folder.

    Raises:
        InputError: no such folder, nothing measured in it, or rows of several attention back-ends, which no table may
            mix.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise InputError(f"there is no folder '{path}': give one that `profile` wrote, for example profiles/NAME")
    rows, about = _rows(folder), _about(folder)
    if rows.empty or not about:
        raise InputError(f"nothing is measured in '{path}': it is no profile, or has only begun")
    backends = sorted(set(rows["attention"].dropna()))
    if len(backends) > 1:
        raise InputError(
            f"'{path}' holds measurements of several attention back-ends ({', '.join(backends)}), which can't be "
            "compared: measure each in a profile of its own"
        )
    return Profile(rows, about, folder)


def save_cells(rows: pd.DataFrame, run_folder: Path, digests: Sequence[str]) -> None:
    """Write each sweep cell's own rows beside its answers: cells/<digest>/profile.parquet."""
    for digest in digests:
        own = rows[rows["cell"] == digest]
        folder = run_folder / "cells" / digest
        if len(own) and folder.is_dir():
            temporary = folder / ".profile.parquet.tmp"
            own.dropna(axis=1, how="all").to_parquet(temporary, index=False)
            temporary.replace(folder / "profile.parquet")
