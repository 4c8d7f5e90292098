"""Runs a training with transformers' Trainer: resumable, data parallel, with its loss parts logged."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
import platform
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import transformers
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback
from transformers.utils import logging as hf_logging

from visionselector_eval.baselines.contract.errors import InputError
from visionselector_eval.models.inputs import MediaSettings
from visionselector_eval.models.tiny import thread_limit
from visionselector_eval.models.training.data import Collator, Conversations, Tokeniser
from visionselector_eval.models.training.export import KINDS, Kind, read_config, write_atomically
from visionselector_eval.models.training.learners import Learner, Outcome, PredictorLearner, SelectorLearner
from visionselector_eval.models.training.records import MediaPaths
from visionselector_eval.models.training.spec import PredictorSpec, SelectorSpec, TokenFusionSpec, TrainSpec
from visionselector_eval.models.training.token_fusion import TokenFusionLearner

if TYPE_CHECKING:
    from visionselector_eval.models.backbones.base import Backbone

log = logging.getLogger(__name__)

LEARNERS: dict[str, type[Learner]] = {
    SelectorSpec.kind: SelectorLearner,
    PredictorSpec.kind: PredictorLearner,
    TokenFusionSpec.kind: TokenFusionLearner,
}
_STARTED, _CHECKPOINTS, _LOG = "started.json", "checkpoints", "log.jsonl"


class TrainingStopped(InputError):
    """A training that can't continue; the message names the last good checkpoint."""


@dataclasses.dataclass(frozen=True)
class TrainingPlan:
    """What a training is going to do.

    Attributes:
        samples: of the data, with `sha256`.
        steps: optimiser steps.
        parameters: trained ones.
        effective: samples a step.
    """

    samples: int
    sha256: str
    steps: int
    parameters: int
    effective: int


@dataclasses.dataclass(frozen=True)
class Result:
    """A finished training.

    Attributes:
        folder: with the weights, their configuration and card.
        steps: optimiser steps of the whole training.
        metrics: the last values logged.
        fresh: False where the folder held the finished training already.
        first: whether this is the process that speaks (of several).
    """

    folder: Path
    steps: int
    metrics: dict[str, float]
    fresh: bool
    first: bool = True


class _LearnerTrainer(Trainer):
    """transformers' Trainer for a `Learner`; only the learned module is in its model, optimiser and checkpoints."""

    def __init__(self, learner: Learner, notes: dict[str, Any], **kwargs: Any) -> None:
        super().__init__(model=learner, **kwargs)
        self._notes = notes
        self._sums: dict[str, Tensor] = {}
        self._counts: dict[str, int] = defaultdict(int)
        self._schedules: dict[str, float] = {}

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None, **kwargs: Any
    ) -> Any:
        if inputs["error"]:
            raise InputError(inputs["error"])
        self._note(inputs["skipped"])
        outcome: Outcome = model(inputs, self.state.global_step, self.state.max_steps)
        if not bool(torch.isfinite(outcome.loss)):
            self._stop(f"the loss is {outcome.loss.item()}", inputs["places"])
        self._note(outcome.left_out)
        for name, value in outcome.parts.items():
            self._sums[name] = self._sums[name] + value.float() if name in self._sums else value.float()
            self._counts[name] += 1
        self._schedules = outcome.schedules or self._schedules
        return outcome.loss

    def _note(self, reasons: Sequence[str]) -> None:
        self._notes["skipped"].update(reasons)
        for reason in reasons:
            log.warning("left out: %s", reason)

    def _stop(self, what: str, places: Sequence[str]) -> None:
        last = last_checkpoint(Path(str(self.args.output_dir)))
        kept = f"the last good checkpoint is {last}" if last else "no checkpoint was written yet (save_steps)"
        where = f" on {places[0]}" + (f" and {len(places) - 1} more" if len(places) > 1 else "") if places else ""
        raise TrainingStopped(
            f"{what} at step {self.state.global_step}{where}: {kept}; lower learning_rate, or look at these samples"
        )

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            names = sorted(self._sums)
            if names:
                means = torch.stack([self._sums[name] / self._counts[name] for name in names])
                means = self.accelerator.reduce(means, "mean") if self.args.world_size > 1 else means
                logs.update(zip(names, means.tolist(), strict=True))
            logs.update(self._schedules)
            self._sums.clear()
            self._counts.clear()
        super().log(logs, start_time)


class _FiniteGradients(TrainerCallback):
    """Stops before a gradient that is no number reaches the weights."""

    def __init__(self) -> None:
        self.trainer: _LearnerTrainer | None = None

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        gradients = [p.grad for p in model.parameters() if p.grad is not None]
        if gradients and not bool(torch.stack([g.isfinite().all() for g in gradients]).all()):
            assert self.trainer is not None
            self.trainer._stop("the gradient is not finite", [])


def last_checkpoint(folder: Path) -> Path | None:
    """The newest complete checkpoint below `folder`; one cut off by a kill is not complete."""
    found = [p for p in folder.glob("checkpoint-*") if p.name.rpartition("-")[2].isdigit()]
    for path in sorted(found, key=lambda p: int(p.name.rpartition("-")[2]), reverse=True):
        needed = ("model.safetensors", "optimizer.pt", "scheduler.pt")
        # Written after everything else of the process that writes it.
        try:
            json.loads((path / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if all((path / name).is_file() for name in needed):
            return path
    return None


def reporters(names: Sequence[str]) -> list[str]:
    """Where the log goes beside our own file: `auto` is TensorBoard where it is installed.

    Raises:
        InputError: asked for by name, and not installed.
    """
    from transformers.integrations import is_tensorboard_available, is_wandb_available

    here: dict[str, Callable[[], bool]] = {"tensorboard": is_tensorboard_available, "wandb": is_wandb_available}
    chosen = []
    for name in names:
        if name == "auto":
            chosen += ["tensorboard"] if is_tensorboard_available() else []
        elif name != "none":
            if not here[name]():
                raise InputError(f"report_to={name} can't be used: pip install {name}, or leave it out")
            chosen.append(name)
    return list(dict.fromkeys(chosen))


def arguments_of(spec: TrainSpec) -> TrainingArguments:
    """The Trainer's own settings for a spec. Making them starts the process group under `accelerate launch`."""
    if spec.device not in ("auto", "cpu", "cuda"):
        raise InputError(f"device '{spec.device}' can't be trained on: give auto, cpu or cuda (CUDA_VISIBLE_DEVICES)")
    if spec.device == "cuda" and not torch.cuda.is_available():
        raise InputError("device cuda is not here: try device=cpu")
    cpu = spec.device == "cpu" or not torch.cuda.is_available()
    folder = spec.folder()
    return TrainingArguments(
        output_dir=str(folder / _CHECKPOINTS),
        per_device_train_batch_size=spec.batch_size,
        gradient_accumulation_steps=spec.micro_batches(int(os.environ.get("WORLD_SIZE", "1"))),
        num_train_epochs=spec.epochs,
        max_steps=spec.max_steps or -1,
        learning_rate=spec.learning_rate,
        lr_scheduler_type=spec.schedule,
        warmup_steps=spec.warmup,
        weight_decay=spec.weight_decay,
        adam_beta1=spec.beta1,
        adam_beta2=spec.beta2,
        adam_epsilon=spec.epsilon,
        max_grad_norm=spec.clip,
        seed=spec.seed,
        use_cpu=cpu,
        ddp_find_unused_parameters=False,
        # Named without a process group, it would be looked for all the same.
        ddp_backend="gloo" if cpu and int(os.environ.get("WORLD_SIZE", "1")) > 1 else None,
        dataloader_num_workers=spec.workers,
        dataloader_pin_memory=not cpu,
        remove_unused_columns=False,
        label_names=[],
        logging_strategy="steps",
        logging_steps=spec.log_steps,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=spec.save_steps,
        save_total_limit=spec.keep_checkpoints,
        report_to=reporters(spec.report_to),
        run_name=folder.name,
        disable_tqdm=True,
        # Learners choose their own precision: a scorer computes in float32, the fusion and its LLM under autocast.
        bf16=False,
        fp16=False,
    )


def read_data(spec: TrainSpec) -> Conversations:
    """The data of a spec, every record of it checked.

    Raises:
        InputError: see `Conversations`.
    """

    def missing(place: str, path: Path) -> None:
        if spec.on_bad_sample == "fail":
            raise InputError(f"{place}: '{path}' not found: is image_root right?")

    root = Path(spec.image_root) if spec.image_root else None
    if root is not None and not root.is_dir():
        raise InputError(f"invalid image_root '{root}': expected a folder")
    return Conversations(spec.data, MediaPaths(root, spec.image_paths), missing=missing)


def learner_of(spec: TrainSpec, backbone: Backbone) -> Learner:
    """The learner of a spec beside a loaded backbone, which it freezes."""
    return LEARNERS[spec.kind].build(backbone, spec)


def plan(spec: TrainSpec, learner: Learner, data: Conversations, processes: int = 1) -> TrainingPlan:
    """What the training would do."""
    accumulation = spec.micro_batches(processes)
    effective = spec.batch_size * accumulation * processes
    batches = math.ceil(len(data) / (spec.batch_size * processes))
    steps = spec.max_steps or math.ceil(spec.epochs * math.ceil(batches / accumulation))
    trained = sum(p.numel() for p in learner.parameters() if p.requires_grad)
    return TrainingPlan(len(data), data.sha256, steps, trained, effective)


def media_of(spec: TrainSpec) -> MediaSettings:
    """Pixels and frames of a spec."""
    return MediaSettings(**spec.media())


def train(
    spec: TrainSpec,
    *,
    callbacks: Sequence[TrainerCallback] = (),
    overwrite: bool = False,
    announce: Callable[[TrainingPlan], None] | None = None,
    dry_run: bool = False,
) -> Result | TrainingPlan:
    """Train what `spec` says, or resume a killed training of the same spec.

    Long because every step needs what those before it loaded; the steps themselves are functions.

    Args:
        callbacks: of transformers, for progress.
        overwrite: forget what the folder holds.
        announce: called with the plan before the first step, in the first process.
        dry_run: return the plan instead.

    Raises:
        InputError: data, backbone or folder that can't be used, a folder with another training; `TrainingStopped` for a
            loss or a gradient that is no number.
    """
    hf_logging.set_verbosity_error()
    folder, kind = spec.folder(), KINDS[spec.kind]
    arguments = arguments_of(spec)
    first = arguments.process_index == 0
    data = read_data(spec)
    if first and overwrite and folder.is_dir() and not dry_run:
        _forget(folder, kind)
    backbone = LEARNERS[spec.kind].load(spec, str(arguments.device))
    learner = learner_of(spec, backbone)
    learner.check(data)
    planned = plan(spec, learner, data, arguments.world_size)
    if dry_run:
        return planned
    course = {"spec": spec.course(), "data_sha256": data.sha256, "backbone_revision": backbone.revision}
    if first:
        _begin(folder, course, spec, arguments.world_size)
        if announce is not None:
            announce(planned)
    if (done := read_config(folder, kind)) and (folder / _STARTED).is_file() and not overwrite:
        return Result(folder, int(done.get("steps", 0)), done.get("metrics", {}), fresh=False, first=first)
    context = getattr(backbone.model.config.get_text_config(), "max_position_embeddings", 1 << 30)
    data.tokeniser = Tokeniser(backbone.processor, media_of(spec), min(context, spec.max_length or context))
    notes: dict[str, Any] = {"skipped": set()}
    finite = _FiniteGradients()
    pad = backbone.processor.tokenizer.pad_token_id
    with _tensorboard_in(folder):
        trainer = _LearnerTrainer(
            learner,
            notes,
            args=arguments,
            train_dataset=data,
            data_collator=Collator(pad, spec.padding_side, spec.on_bad_sample == "skip"),
            callbacks=[finite, *callbacks],
        )
    finite.trainer = trainer
    trainer.remove_callback(PrinterCallback)  # it prints to standard output
    trainer.accelerator.wait_for_everyone()  # the first process may have tidied the folder
    resume = last_checkpoint(folder / _CHECKPOINTS)
    with thread_limit(spec.pretrained):
        trainer.train(resume_from_checkpoint=str(resume) if resume else None)

    metrics = _last_metrics(trainer.state.log_history)
    if first:
        _finish(folder, trainer, learner, spec, course, planned, metrics, notes)
    return Result(folder, trainer.state.global_step, metrics, fresh=True, first=first)


def _last_metrics(history: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """The numbers of the last line of a log that has a loss."""
    last: Mapping[str, Any] = next((entry for entry in reversed(history) if "loss" in entry), {})
    return {k: v for k, v in last.items() if isinstance(v, int | float) and k != "step"}


@contextmanager
def _tensorboard_in(folder: Path) -> Iterator[None]:
    """Transformers' callback for TensorBoard takes its folder from this variable alone, when it is made."""
    name = "TENSORBOARD_LOGGING_DIR"
    given = os.environ.get(name)
    try:
        os.environ[name] = given or str(folder / "tensorboard")
        yield
    finally:
        if given is None:
            del os.environ[name]


def _forget(folder: Path, kind: Kind) -> None:
    """Remove what a training left, checkpoint files of a result that is a whole checkpoint included."""
    try:
        whole = read_config(folder, kind).get("files", [])
    except InputError:  # damaged: it goes as well
        whole = []
    for name in (_STARTED, _LOG, "spec.yaml", "README.md", kind.file, kind.config, *whole):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / _CHECKPOINTS, ignore_errors=True)


def _begin(folder: Path, course: dict[str, Any], spec: TrainSpec, processes: int) -> None:
    """Note what is trained here, or compare it with what was."""
    noted = folder / _STARTED
    if noted.is_file():
        try:
            before = json.loads(noted.read_text(encoding="utf-8"))
        except ValueError:
            before = {}
        now = json.loads(json.dumps(course))
        if (then := before.pop("processes", processes)) != processes:
            log.warning("begun with %d processes, resumed with %d: the order of samples changes", then, processes)
        if before != now:
            raise InputError(
                f"'{folder}' holds another training ({_difference(before, now)}): give another --output, "
                "or --existing overwrite"
            )
        return
    if folder.is_dir() and any(folder.iterdir()) and not (folder / _CHECKPOINTS).is_dir():
        raise InputError(f"output '{folder}' already exists and holds no training: give a new or empty folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "spec.yaml").write_text(spec.to_yaml(exclude_none=False), encoding="utf-8")
        write_atomically(noted, json.dumps({**course, "processes": processes}, indent=2) + "\n")
    except OSError as error:
        raise InputError(f"output '{folder}' can't be written: {error.strerror or error}") from error


def _difference(before: dict[str, Any], now: dict[str, Any]) -> str:
    one, other = before.get("spec", {}), now["spec"]
    for name in other:
        if one.get(name) != other[name]:
            return f"{name}={one.get(name)}, not {other[name]}"
    what = "data_sha256" if before.get("data_sha256") != now["data_sha256"] else "backbone_revision"
    return f"{what} has changed"


def _finish(
    folder: Path,
    trainer: Trainer,
    learner: Learner,
    spec: TrainSpec,
    course: dict[str, Any],
    planned: TrainingPlan,
    metrics: dict[str, float],
    notes: dict[str, Any],
) -> None:
    lines = [json.dumps(entry) for entry in trainer.state.log_history]
    write_atomically(folder / _LOG, "\n".join(lines) + "\n")
    defaults, values = spec.defaults(), spec.model_dump()
    backbone = learner.backbone
    about = {
        "backbone": {
            "id": backbone.id,
            "revision": backbone.revision,
            "family": backbone.model.config.model_type,
        },
        "training": {"kind": spec.kind, **values},
        "changed": {k: v for k, v in values.items() if v != defaults[k] and k not in ("output", "data")},
        "data": {
            "files": spec.data,
            "samples": planned.samples,
            "skipped": len(notes["skipped"]),  # that this process met, since it was last started
            "sha256": course["data_sha256"],
        },
        "steps": trainer.state.global_step,
        "processes": trainer.args.world_size,
        "metrics": metrics,
        "environment": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "device": torch.cuda.get_device_name() if trainer.args.device.type == "cuda" else "cpu",
        },
    }
    learner.save(folder, about)
