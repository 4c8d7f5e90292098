"""The commands `train`, `data` and `export`: flags, progress and what they print."""

from __future__ import annotations

import argparse
import sys
import typing
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from visionselector_eval.baselines.contract.errors import InputError, unknown
from visionselector_eval.harness.training.tiny.spec import TinySpec
from visionselector_eval.models.training.spec import SPECS, load_train_spec, make_train_spec

if TYPE_CHECKING:
    from visionselector_eval.models.training.trainer import Plan

KINDS: dict[str, Any] = {**SPECS, TinySpec.kind: TinySpec}
"""What can be trained, and the settings of each."""

DATA_ACTIONS = ("mirrors", "prepare-cambrian")
_MIRRORS = {"tasks", "documents"}
_CAMBRIAN = {"file", "image_root", "coco_share"}

# train ------------------------------------------------------------------------------------------------------------


def add_train_flags(parser: argparse.ArgumentParser, flag_type: Callable[[Any], Callable[[str], Any]]) -> None:
    """One flag for each field of the training specs, so that flags and YAML can't come to differ."""
    parser.add_argument("what", metavar="|".join(KINDS), help="what is trained")
    parser.add_argument("--spec", metavar="FILE", help="YAML with the fields below; flags win over it")
    parser.add_argument("--dry-run", action="store_true", help="check everything and say what would run; train nothing")
    parser.add_argument("--overwrite", action="store_true", help="forget the training that the output folder holds")
    names = dict.fromkeys(name for spec in KINDS.values() for name in spec.model_fields)
    for name in names:
        owners = {kind: spec.model_fields[name] for kind, spec in KINDS.items() if name in spec.model_fields}
        info = next(iter(owners.values()))
        defaults = {kind: shown_default(field) for kind, field in owners.items()}
        shown = next(iter(defaults.values()))
        if len(set(defaults.values())) > 1:
            shown = ", ".join(f"{value} for {kind}" for kind, value in defaults.items())
        only = f"; {' and '.join(owners)} only" if not set(SPECS) <= set(owners) else ""
        text = f"{info.description}{f' (default: {shown})' if shown else ''}{only}".replace("%", "%%")
        many = any(typing.get_origin(a) is list for a in (info.annotation, *typing.get_args(info.annotation)))
        parser.add_argument(
            "--" + name.replace("_", "-"),
            dest=name,
            metavar=name.upper(),
            help=text,
            **({"nargs": "+"} if many else {"type": flag_type(info.annotation)}),
        )


def shown_default(field: Any) -> str:
    """The default of a pydantic field as people write it; empty for none."""
    default = field.get_default(call_default_factory=True)
    if default is None or default == []:
        return ""
    return " ".join(map(str, default)) if isinstance(default, list) else str(default)


def spec_of(arguments: argparse.Namespace) -> Any:
    """The checked spec that flags and a YAML file make together.

    Raises:
        InputError: an unknown kind, a flag of the other kind, a value that can't be used.
    """
    if arguments.what not in KINDS:
        raise unknown("training", arguments.what, KINDS)
    kind = KINDS[arguments.what]
    names = {name for spec in KINDS.values() for name in spec.model_fields}
    given = {name: getattr(arguments, name) for name in names if getattr(arguments, name) is not None}
    for name in sorted(set(given) - set(kind.model_fields)):
        raise InputError(f"--{name.replace('_', '-')} is no setting of `train {arguments.what}`")
    return load_train_spec(kind, arguments.spec, given) if arguments.spec else make_train_spec(kind, given)


def run_train(arguments: argparse.Namespace) -> str:
    """Train; returns what to print (nothing in other processes than the first)."""
    spec = spec_of(arguments)
    if isinstance(spec, TinySpec):
        return _run_tiny(spec, arguments)
    from visionselector_eval.models.training.trainer import Plan, train

    with TrainScreen() as screen:
        made = train(
            spec,
            callbacks=[screen.callback()],
            overwrite=arguments.overwrite,
            announce=screen.announce,
            dry_run=arguments.dry_run,
        )
    if isinstance(made, Plan):
        return describe(made)
    if not made.first:
        return ""
    if not made.fresh:
        return f"{made.folder} holds this training, finished after {made.steps} steps (--overwrite trains again)"
    names = ("loss", "loss_language", "loss_mask", "loss_keep", "mask_entropy", "kept_share")
    last = ", ".join(f"{name} {made.metrics[name]:.4g}" for name in names if name in made.metrics)
    return f"{made.steps} steps; last: {last}\n{arguments.what} weights: {made.folder}"


def _run_tiny(spec: TinySpec, arguments: argparse.Namespace) -> str:
    if arguments.dry_run:
        return f"stages {', '.join(spec.stages)} into {spec.output}"
    from visionselector_eval.harness.training.tiny.command import train_tiny

    with TrainScreen() as screen:
        folder = train_tiny(spec, screen.steps, overwrite=arguments.overwrite)
    return f"checkpoint: {folder}"


def describe(plan: Plan) -> str:
    """A plan in one line."""
    return (
        f"{plan.samples} samples, {plan.steps} steps of {plan.effective} samples, "
        f"{plan.parameters:,} trained parameters (data {plan.sha256[:12]})"
    )


class TrainScreen:
    """Progress of a training on stderr: a bar with the time left, or one line for each line of the log."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        self._console = Console(stderr=True)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("steps"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=self._console,
        )
        self._task: Any = None
        self._stage = ""

    def __enter__(self) -> TrainScreen:
        return self

    def __exit__(self, *error: object) -> None:
        if self._bar.live.is_started:
            self._bar.stop()

    def announce(self, plan: Plan) -> None:
        """Say what begins."""
        self._console.print(describe(plan), markup=False, highlight=False, soft_wrap=True)

    def steps(self, stage: str, done: int, total: int) -> None:
        """Show how far a stage has come."""
        if self._console.is_terminal:
            if self._task is None or self._stage != stage:
                self._task, self._stage = self._bar.add_task(stage, total=total), stage
                self._bar.start()
            self._bar.update(self._task, completed=done)
        elif done % 100 == 0 or done == total:
            self._console.print(f"{stage}: step {done} of {total}", markup=False, highlight=False, soft_wrap=True)

    def callback(self) -> Any:
        """A callback of transformers that feeds the screen."""
        from transformers import TrainerCallback

        screen = self

        class Feed(TrainerCallback):
            def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if state.is_world_process_zero and screen._console.is_terminal:
                    screen._task = screen._bar.add_task("training", total=state.max_steps, completed=state.global_step)
                    screen._bar.start()

            def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
                if screen._task is not None:
                    screen._bar.update(screen._task, completed=state.global_step)

            def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
                if not state.is_world_process_zero or "loss" not in (logs or {}):
                    return
                wanted = ("loss", "loss_language", "loss_mask", "loss_keep", "mask_entropy", "kept_share")
                text = ", ".join(f"{name} {logs[name]:.4g}" for name in wanted if name in logs)
                if screen._task is not None:
                    screen._bar.update(screen._task, description=f"loss {logs['loss']:.4g}")
                else:
                    line = f"step {state.global_step} of {state.max_steps}: {text}"
                    screen._console.print(line, markup=False, highlight=False, soft_wrap=True)

        return Feed()


# data and export --------------------------------------------------------------------------------------------------


def add_data_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of `data`."""
    parser.add_argument("action", metavar="|".join(DATA_ACTIONS), help="one of these")
    parser.add_argument("file", nargs="?", help="prepare-cambrian: Cambrian737k.jsonl")
    parser.add_argument("--output", metavar="FOLDER", help="where the files go")
    parser.add_argument(
        "--image-root", metavar="FOLDER", help="prepare-cambrian: folder that the records' image paths start from"
    )
    parser.add_argument(
        "--coco-share", type=float, metavar="SHARE", help="prepare-cambrian: share of COCO's records (default: 0.1)"
    )
    parser.add_argument(
        "--tasks", nargs="+", metavar="TASK", help="mirrors: embedded benchmarks (default: all of suite `tiny`)"
    )
    parser.add_argument(
        "--documents", type=int, metavar="N", help="mirrors: documents of each benchmark (default: 500)"
    )
    parser.add_argument(
        "--seed", type=int, metavar="SEED", help="mirrors: not 0 (default: 1000003); prepare-cambrian: default 42"
    )


def run_data(arguments: argparse.Namespace) -> tuple[str, bool]:
    """Make training data; what to print, and whether everything asked for is there."""
    from visionselector_eval.harness.training import data as training_data

    if arguments.action not in DATA_ACTIONS:
        raise unknown("action of data", arguments.action, DATA_ACTIONS)
    foreign = _CAMBRIAN if arguments.action == "mirrors" else _MIRRORS
    for name in sorted(foreign):
        if getattr(arguments, name) is not None:
            shown = f"'{arguments.file}'" if name == "file" else f"--{name.replace('_', '-')}"
            raise InputError(f"data {arguments.action} takes no {shown}")
    if not arguments.output:
        raise InputError(f"data {arguments.action} where to? give --output FOLDER")
    if arguments.action == "mirrors":
        from visionselector_eval.tasks.suites import suite

        tasks = arguments.tasks or suite("tiny")
        documents = 500 if arguments.documents is None else arguments.documents
        with _progress("drawing", documents * len(tasks)) as advance:
            made = training_data.write_mirrors(
                tasks,
                arguments.output,
                seed=1_000_003 if arguments.seed is None else arguments.seed,
                documents=documents,
                advance=advance,
            )
        also = f"; {made.left_out} that sweeps show were left out" if made.left_out else ""
        return f"{made.samples} conversations: {made.file}{also}", True
    if not arguments.file or not arguments.image_root:
        raise InputError(
            "data prepare-cambrian needs the file and its pictures: Cambrian737k.jsonl --image-root FOLDER"
        )
    size = Path(arguments.file).stat().st_size if Path(arguments.file).is_file() else 0
    with _progress("reading", size) as advance:
        report = training_data.prepare_cambrian(
            arguments.file,
            arguments.image_root,
            arguments.output,
            coco_share=0.1 if arguments.coco_share is None else arguments.coco_share,
            seed=42 if arguments.seed is None else arguments.seed,
            advance=advance,
        )
    return report.render(), report.complete


class _progress:
    """A bar on stderr where that is a terminal; gives the function that advances it."""

    def __init__(self, title: str, total: int) -> None:
        self.title, self.total = title, total

    def __enter__(self) -> Callable[[int], None]:
        from rich.console import Console
        from rich.progress import Progress

        self._bar = Progress(console=Console(stderr=True), disable=not sys.stderr.isatty())
        self._bar.start()
        task = self._bar.add_task(self.title, total=self.total)
        return lambda done: self._bar.advance(task, done)

    def __exit__(self, *error: object) -> None:
        self._bar.stop()


def add_export_flags(parser: argparse.ArgumentParser) -> None:
    """Flags of `export`."""
    parser.add_argument(
        "source",
        help="result folder of a training, or a LLaVA folder in the original layout; with --to scorer, predictor or "
        "fusion: a full checkpoint",
    )
    parser.add_argument("output", help="new folder")
    parser.add_argument(
        "--to",
        default="checkpoint",
        metavar="checkpoint|scorer|predictor|fusion",
        help="checkpoint: the backbone's files with the trained weights among them, as released; scorer, predictor, "
        "fusion: these weights alone, out of a checkpoint (default: checkpoint)",
    )
    parser.add_argument(
        "--pretrained", metavar="FOLDER_OR_ID", help="backbone of the checkpoint (default: the one it was trained with)"
    )


def run_export(arguments: argparse.Namespace) -> str:
    """Export; returns what to print."""
    from visionselector_eval.models.training import export

    ways = {kind.name: kind for kind in export.KINDS.values()}
    if arguments.to == "checkpoint":
        folder = export.export_checkpoint(arguments.source, arguments.output, arguments.pretrained)
        return f"full checkpoint: {folder}"
    if arguments.to not in ways:
        raise unknown("export --to", arguments.to, ["checkpoint", *ways])
    if arguments.pretrained:
        raise InputError(f"export --to {arguments.to} takes no --pretrained: the checkpoint is what is read")
    folder = export.extract_learned(arguments.source, arguments.output, ways[arguments.to])
    return f"{arguments.to}: {folder}"
