"""The hash of a task's data on disk."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from visionselector_eval.tasks.local.layout import LocalTask

_BIG = 32 * 2**20  # bytes; files beyond are hashed in parts


_MIB = 2**20


def content_hash(found: Iterable[LocalTask]) -> str:
    """SHA-256 that names the documents: names, splits and contents of the files, not where they lie.

    A file up to 32 MiB counts whole; of a bigger one the size, the first and last MiB and a parquet file's footer,
    which holds the statistics of every column; of images and videos the size and both ends.
    """
    sha = hashlib.sha256()
    for task in sorted(found, key=lambda t: t.upstream.task):
        sha.update(f"{task.upstream.task}\0{task.local.split}\0{task.local.kind}\0".encode())
        for file in task.local.files:
            _hash_file(sha, file, whole=_BIG, part=_MIB)
        for file in task.local.media():
            sha.update(file.relative_to(task.local.folder).as_posix().encode())
            _hash_file(sha, file, whole=2**18, part=2**16)
        for name, video in sorted((task.videos or {}).items()):
            sha.update(f"\0{name}\0".encode())
            if video is None:
                sha.update(b"missing")
            else:
                _hash_file(sha, video, whole=2**18, part=2**16)
    return sha.hexdigest()


def _hash_file(sha: Any, file: Path, whole: int, part: int) -> None:
    size = file.stat().st_size
    sha.update(f"\0{size}\0".encode())
    with file.open("rb") as data:
        if size <= whole:
            while block := data.read(_MIB):
                sha.update(block)
            return
        sha.update(data.read(part))
        tail = part
        if file.suffix == ".parquet":
            data.seek(-8, os.SEEK_END)
            tail = max(part, int.from_bytes(data.read(4), "little") + 8)
        data.seek(-min(tail, size), os.SEEK_END)
        sha.update(data.read())
