"""The embedded checkpoints: `TINY` and the other names of `EMBEDDED` stand wherever a path or hub id is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

TINY = "tiny"


@dataclass(frozen=True)
class Embedded:
    """An embedded checkpoint.

    Attributes
    ----------
    folder: beside this file. protocol: how sweeps show it pictures where they are not told. about: what it is.
    """

    folder: str
    protocol: str
    about: str


EMBEDDED: dict[str, Embedded] = {
    TINY: Embedded("checkpoint", "checkpoint", "Qwen2.5-VL"),
    "tiny-llava": Embedded("llava", "llava_stf", "LLaVA-1.5"),
    "tiny-llava-stf": Embedded("llava_stf", "llava_stf", "LLaVA-1.5 with trained token fusion"),
}


def checkpoint(name: str = TINY) -> Path:
    """Folder of an embedded checkpoint."""
    return Path(str(files(__package__) / EMBEDDED[name].folder))
