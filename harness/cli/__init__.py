"""The command: `visionselector-eval`, the same program as `python run_eval.py`."""

from .commands import main

__all__ = ["main"]
