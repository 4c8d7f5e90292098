"""The video files of a data root."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from visionselector_eval.baselines.contract.errors import InputError
from visionselector_eval.tasks.local.upstream import Upstream

VIDEO_SUFFIXES = (".mp4", ".MP4", ".mkv", ".webm", ".avi", ".mov")


class Videos:
    """Video files below some folders, found by the name that a document gives.

    A name fits a file whose path ends with it, with or without one of the usual suffixes, so that files may lie flat
    or in upstream's sub folders. `prefer` is a sub folder that wins over others.
    """

    def __init__(self, folders: Iterable[Path], prefer: str = "", prefixes: Sequence[str] = ("",)) -> None:
        self.folders = list(folders)
        self._prefer, self._prefixes = prefer, prefixes
        self._by_name: dict[str, list[Path]] = {}
        for folder in self.folders:
            for parent, directories, files in os.walk(folder, followlinks=True):
                directories[:] = sorted(d for d in directories if not d.startswith("."))
                for name in sorted(files):
                    self._by_name.setdefault(name, []).append(Path(parent) / name)

    def __len__(self) -> int:
        return sum(map(len, self._by_name.values()))

    def find(self, value: Any) -> Path | None:
        """The file that `value` names, or None. Raises `InputError` when two different files fit equally well."""
        named = "" if value is None else str(value)
        if not PurePosixPath(named).name:
            return None
        for prefix in self._prefixes:
            for suffix in ("", *VIDEO_SUFFIXES):
                expected = PurePosixPath(named).with_name(f"{prefix}{PurePosixPath(named).name}{suffix}").as_posix()
                hits = [p for p in self._by_name.get(PurePosixPath(expected).name, ()) if _ends_with(p, expected)]
                if hits:
                    return self._one(hits, expected)
        return None

    def _one(self, hits: list[Path], wanted: str) -> Path:
        inside = ([p for p in hits if p.is_relative_to(folder)] for folder in self.folders)
        hits = next(h for h in inside if h)  # the task's own folder before the benchmark's
        exact = [folder / wanted for folder in self.folders if folder / wanted in hits]
        preferred = [p for p in hits if self._prefer and _ends_with(p, f"{self._prefer}/{wanted}")]
        best = preferred or exact or hits
        if len(best) > 1 and len({p.stat().st_size for p in best}) > 1:
            raise InputError(f"video {wanted} is ambiguous: {best[0]} and {best[1]} differ: keep one")
        return best[0]


def _ends_with(path: Path, tail: str) -> bool:
    return path.as_posix().endswith("/" + tail.lstrip("/"))


def video_folders(root: str | Path, of: Upstream) -> list[Path]:
    """Folders in which the videos of a task may lie, whether they exist or not."""
    return list(dict.fromkeys([Path(root) / of.task / "videos", Path(root) / of.family / "videos"]))
