"""Run a training: its progress, and what is printed at its end."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from visionselector_eval.harness.screen import Screen
from visionselector_eval.harness.training.tiny.spec import TinySpec
from visionselector_eval.models.settings import Settings
from visionselector_eval.models.training.spec import SPECS

if TYPE_CHECKING:
    from visionselector_eval.models.training.trainer import TrainingPlan

KINDS: dict[str, type[Settings]] = {**SPECS, TinySpec.kind: TinySpec}
"""What can be trained, and the settings of each."""


def run_train(spec: Any, *, overwrite: bool = False, dry_run: bool = False) -> str:
    """Train; returns what to print (nothing in other processes than the first)."""
    if isinstance(spec, TinySpec):
        return _run_tiny(spec, overwrite, dry_run)
    from visionselector_eval.models.training.trainer import TrainingPlan, train

    with TrainScreen() as screen:
        made = train(
            spec, callbacks=[screen.callback()], overwrite=overwrite, announce=screen.announce, dry_run=dry_run
        )
    if isinstance(made, TrainingPlan):
        return describe(made)
    if not made.first:
        return ""
    if not made.fresh:
        return (
            f"{made.folder} holds this training, finished after {made.steps} steps "
            "(--existing overwrite trains from scratch)"
        )
    return f"{made.steps} steps; last: {_losses(made.metrics)}\n{spec.kind} weights: {made.folder}"


def _losses(logs: Mapping[str, float]) -> str:
    names = ("loss", "loss_language", "loss_mask", "loss_keep", "mask_entropy", "kept_share")
    return ", ".join(f"{name} {logs[name]:.4g}" for name in names if name in logs)


def _run_tiny(spec: TinySpec, overwrite: bool, dry_run: bool) -> str:
    if dry_run:
        return f"stages {', '.join(spec.stages)} into {spec.output}"
    from visionselector_eval.harness.training.tiny.command import train_tiny

    with TrainScreen() as screen:
        folder = train_tiny(spec, screen.steps, overwrite=overwrite)
    return f"checkpoint: {folder}"


def describe(plan: TrainingPlan) -> str:
    """A plan in one line."""
    return (
        f"{plan.samples} samples, {plan.steps} steps of {plan.effective} samples, "
        f"{plan.parameters:,} trained parameters (data {plan.sha256[:12]})"
    )


class TrainScreen(Screen):
    """Progress of a training: a bar with the time left, or one line for each line of the log."""

    def __init__(self) -> None:
        super().__init__("steps", "loading")

    def announce(self, plan: TrainingPlan) -> None:
        """Say what begins."""
        self.say(describe(plan))

    def steps(self, stage: str, done: int, total: int) -> None:
        """Show how far a stage has come."""
        if self.is_terminal:
            self.stage(stage, done, total)
        elif done % 100 == 0 or done == total:
            self.say(f"{stage}: step {done} of {total}")

    def callback(self) -> Any:
        """A callback of transformers that feeds the screen."""
        from transformers import TrainerCallback

        screen = self

        class Feed(TrainerCallback):
            def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if state.is_world_process_zero:
                    screen.begin(state.max_steps, state.global_step)
                    screen.describe("training")

            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if state.is_world_process_zero:
                    screen.reach(state.global_step)

            def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
                if not state.is_world_process_zero or "loss" not in (logs or {}):
                    return
                if screen.is_terminal:
                    screen.describe(f"loss {logs['loss']:.4g}")
                else:
                    screen.say(f"step {state.global_step} of {state.max_steps}: {_losses(logs)}")

        return Feed()
