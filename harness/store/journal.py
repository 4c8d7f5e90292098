"""The journal of a cell: answers are appended as they are produced, so that a killed sweep resumes inside a cell."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from visionselector_eval.harness.store.files import plain

log = logging.getLogger(__name__)


class Journal:
    """Answers of a cell in progress: append-only JSON lines, one line a batch.

    A line is written by one system call and synced, so a killed process leaves whole lines and at most one truncated
    last one. Reading ignores a truncated end; the next append cuts it off first.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._clean = False  # whether this object has seen to it that the file ends with a whole line

    def append(self, batch: int, answers: Sequence[Mapping[str, Any]]) -> None:
        """Add one batch; on return it is on disk.

        Args:
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
            log.info("%s ended in a truncated line, which is cut off; its batch is answered again", self.path.name)
            os.truncate(self.path, length)
        self._clean = True
