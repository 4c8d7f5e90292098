"""The embedded checkpoint: `TINY` is its name wherever a path or hub id is asked for."""

from __future__ import annotations

from importlib.resources import files
from pathlib import Path

TINY = "tiny"


def checkpoint() -> Path:
    """Folder of the embedded Qwen2.5-VL checkpoint."""
    return Path(str(files(__package__) / "checkpoint"))
