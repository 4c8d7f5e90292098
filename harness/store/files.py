"""Files of a run: canonical JSON, digests and writing by rename."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from visionselector_eval.baselines.contract.budget import Budget


def plain(value: Any) -> Any:
    """`value` as JSON can hold it exactly: mappings with text keys, lists, text, numbers, booleans, None.

    Raises:
        TypeError: for anything whose text might differ between two processes (objects), instead of hashing its address.
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

    Raises:
        TypeError: for what is not plain data. ValueError: for nan and infinities.
    """
    return json.dumps(plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)


def digest_of(settings: Mapping[str, Any]) -> str:
    """Name of a cell: the first 16 hex digits of the sha256 of its settings' canonical JSON."""
    return hashlib.sha256(canonical_json(settings).encode()).hexdigest()[:16]


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
    rename_synced(temporary, path)


def rename_synced(temporary: Path, path: Path) -> None:
    os.replace(temporary, path)
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    # Makes the rename itself last through a power cut. Not every file system can do it on a folder.
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
