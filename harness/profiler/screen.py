"""What people see while a profile runs."""

from __future__ import annotations

from visionselector_eval.harness.profiler.rounds import Progress
from visionselector_eval.harness.profiler.spec import ProfileCell
from visionselector_eval.harness.screen import Screen


class ProfileScreen(Screen, Progress):
    """A progress bar that keeps still while something is timed; cells that can't be measured are named as they fail."""

    def __init__(self) -> None:
        super().__init__("samples", "warming up", steady=True)

    def start(self, samples: int) -> None:
        self.begin(samples)

    def workload(self, name: str) -> None:
        self.describe(name)

    def measured(self, count: int) -> None:
        self.advance(count)

    def failed(self, workload: str, cell: ProfileCell, reason: str) -> None:
        self.say(f"failed: {cell.title} on {workload}: {reason}")
