"""The embedded checkpoints: `TINY` and the other names of `EMBEDDED` stand wherever a path or hub id is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

TINY = "tiny"


@dataclass(frozen=True)
class Embedded:
    """An embedded checkpoint.

    Attributes:
        folder: beside this file.
        protocol: how it is asked where nothing else is said.
        about: what it is.
    """

    folder: str
    protocol: str
    about: str


EMBEDDED: dict[str, Embedded] = {
    TINY: Embedded("checkpoint", "checkpoint", "Qwen2.5-VL"),
    "tiny-llava": Embedded("llava", "llava_stf", "LLaVA-1.5"),
    "tiny-llava-stf": Embedded("llava_stf", "llava_stf", "LLaVA-1.5 with trained token fusion"),
}


def embedded(source: str) -> Embedded | None:
    """The embedded checkpoint that `source` names or is the folder of, if it is one."""
    return next((e for name, e in EMBEDDED.items() if source == name or Path(source) == checkpoint(name)), None)


def checkpoint(name: str = TINY) -> Path:
    """Folder of an embedded checkpoint."""
    return Path(str(files(__package__) / EMBEDDED[name].folder))


@contextmanager
def thread_limit(pretrained: str, threads: int | None = None) -> Iterator[None]:
    """CPU threads of torch for a model: `threads`, or by default one for an embedded checkpoint, all for any other.

    The tensors of an embedded checkpoint are so small that a second thread only waits for the first; where other
    programs need the cores, too, that made a run ten times as long. And sums of one thread are the same on any machine.
    """
    import torch  # `list` and the flags of `sweep` need not wait for it

    before = torch.get_num_threads()
    number = threads or (1 if pretrained in EMBEDDED else before)
    try:
        torch.set_num_threads(number)
        yield
    finally:
        torch.set_num_threads(before)
