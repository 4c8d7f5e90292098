"""The run folder: its files, its records, and how they are read again (`load_run`)."""

from .run import Run, RunFrames, load_run

__all__ = ["Run", "RunFrames", "load_run"]
