"""`train tiny`: the embedded checkpoint from scratch, stage after stage."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from visionselector_eval.baselines.contract.errors import InputError
from visionselector_eval.harness.training.data import write_mirrors
from visionselector_eval.harness.training.tiny import fusion
from visionselector_eval.harness.training.tiny.batches import KINDS, TRAIN_SEED
from visionselector_eval.harness.training.tiny.batches import STAGES as BACKBONE_STAGES
from visionselector_eval.harness.training.tiny.checkpoint import finish_checkpoint, write_checkpoint
from visionselector_eval.harness.training.tiny.llava_network import LlavaNetwork
from visionselector_eval.harness.training.tiny.network import IMAGE_PROCESSOR, Network
from visionselector_eval.harness.training.tiny.spec import STAGES, Stage, TinySpec
from visionselector_eval.harness.training.tiny.stages import evaluate, train_stage, trained
from visionselector_eval.models.loading import load_backbone
from visionselector_eval.models.tiny import TINY, thread_limit
from visionselector_eval.models.training.export import export_checkpoint
from visionselector_eval.models.training.spec import PredictorSpec, SelectorSpec, TokenFusionSpec, TrainSpec
from visionselector_eval.models.training.trainer import train

# What the learned parts are trained with: the published settings but for what a backbone of this width needs. A tenth
# of its 64 to 144 visual tokens is as many as a document has fields, so that is what they learn to choose.
LEARNED: dict[str, Any] = {
    "budget": "0.1",
    "learning_rate": 1e-3,
    "batch_size": 16,
    "accumulation": 1,
    "gradient_checkpointing": False,
    "report_to": ["none"],
}
HIDDEN = 48  # of the predictor

NETWORKS: dict[str, type[Network]] = {network.family: network for network in (Network, LlavaNetwork)}

Told = Callable[[str, int, int], None]


class _Told(TrainerCallback):
    def __init__(self, stage: str, told: Told) -> None:
        self._stage, self._told = stage, told

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._told(self._stage, state.global_step, state.max_steps)


def train_tiny(spec: TinySpec, told: Told | None = None, overwrite: bool = False) -> Path:
    """Run the stages that are not finished yet; the folder of the checkpoint.

    Args:
        told: of the stage, the steps done and the steps it has.
        overwrite: forget what the folder holds.

    Raises:
        InputError: a folder that can't be written, or that holds a training with other settings.
    """
    work = Path(spec.output)
    _begin(spec, work, overwrite)
    for stage in STAGES:
        if stage in spec.stages:
            with thread_limit(TINY):
                _run(stage, spec, work, told)
    return work / "checkpoint"


def _begin(spec: TinySpec, work: Path, overwrite: bool) -> None:
    settings = json.dumps(spec.settings(), indent=1) + "\n"
    note = work / "tiny.json"
    try:
        if overwrite and note.is_file():
            shutil.rmtree(work)
        if work.is_dir() and any(work.iterdir()) and not note.is_file():
            raise InputError(f"output '{work}' holds something else: give a new or empty folder")
        work.mkdir(parents=True, exist_ok=True)
        if note.is_file() and note.read_text(encoding="utf-8") != settings:
            raise InputError(
                f"'{work}' holds a training with other settings: give another output, or --existing overwrite"
            )
        note.write_text(settings, encoding="utf-8")
    except OSError as error:
        raise InputError(f"output '{work}' can't be written: {error.strerror or error}") from error


def _run(stage: Stage, spec: TinySpec, work: Path, told: Told | None) -> None:
    family = NETWORKS[spec.family]
    if stage in BACKBONE_STAGES:
        steps = getattr(spec, f"{stage}_steps")
        train_stage(
            stage, work, steps, spec.seed, advance=told and (lambda done: told(stage, done, steps)), family=family
        )
        if stage == "joint":
            write_checkpoint(trained(work, spec.seed, family), work / "backbone", family)
    elif stage == "data":
        if not (work / "data" / "train.jsonl").is_file():
            shutil.rmtree(work / "data", ignore_errors=True)
            documents = spec.documents or 0
            if family.clips:
                write_mirrors(KINDS, work / "data", seed=TRAIN_SEED + 7, documents=documents)
            else:
                fusion.write_lessons(work / "data", documents * len(fusion.SHARES))
    elif stage in ("scorer", "predictor"):
        callback = told and _Told(stage, told)
        train(_learned(stage, spec, work), callbacks=[callback] if callback else [])
    elif stage == "evaluate":
        _evaluate(family(trained(work, spec.seed, family)), spec.check, work / "evaluate.json")
    elif stage == "fusion":
        _fuse(spec, work, told)
    else:
        assemble(work, family=spec.family)


def _evaluate(net: Network, check: int, file: Path) -> None:
    figures = {"asked": evaluate(net, check), "other": evaluate(net, min(check, 200), asked=False)}
    file.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")


def _fuse(spec: TinySpec, work: Path, told: Told | None) -> None:
    """Trained token fusion, up to the folder `checkpoint-stf`."""
    start, *parts = fusion.STAGES
    if not (work / start / "fusion_config.json").is_file():
        steps = spec.fusion_steps
        fusion.begin(work, steps, spec.seed, advance=told and (lambda done: told(start, done, steps)))
    for part in parts:
        callback = told and _Told(part, told)
        settings = fusion.settings(part, work, spec.fusion_steps, spec.seed)
        train(TokenFusionSpec.make(settings), callbacks=[callback] if callback else [])
    model = load_backbone(str(work / parts[-1]), device="cpu").model.bfloat16().float()  # as it will be stored
    _evaluate(fusion.FusedNetwork(model), spec.check, work / "evaluate-stf.json")
    assemble_fused(work)


def assemble(work: Path, note: str = "", family: str = Network.family) -> Path:
    """Put the backbone of a work folder and what was learned beside it into its folder `checkpoint`, with card and log.

    `note` goes into the card: what was not as `train tiny` does it.
    """
    folder, whole = work / "checkpoint", work / "backbone"
    learned = ("scorer", "predictor") if NETWORKS[family].clips else ("scorer",)
    for part in learned:
        target = folder if part == learned[-1] else work / f"with-{part}"
        shutil.rmtree(target, ignore_errors=True)
        export_checkpoint(work / part, target, str(whole))
        whole = target
    for part in learned[:-1]:
        shutil.rmtree(work / f"with-{part}")
    logs = {stage: work / f"{stage}.jsonl" for stage in BACKBONE_STAGES}
    logs |= {stage: work / stage / "log.jsonl" for stage in learned}
    finish_checkpoint(folder, logs, work / "evaluate.json", note, family)
    return folder


def assemble_fused(work: Path, note: str = "") -> Path:
    """Put the fused model of a work folder into its folder `checkpoint-stf`, with card and log."""
    folder, source = work / "checkpoint-stf", work / fusion.STAGES[-1]
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for name in json.loads((source / "fusion_config.json").read_text(encoding="utf-8"))["files"]:
        shutil.copyfile(source / name, folder / name)
    logs = {stage: work / stage / "log.jsonl" for stage in fusion.STAGES}
    finish_checkpoint(folder, logs, work / "evaluate-stf.json", note, "llava_stf")
    return folder


def _learned(stage: str, spec: TinySpec, work: Path) -> TrainSpec:
    bounds = {name: IMAGE_PROCESSOR[name] for name in ("min_pixels", "max_pixels")}  # LLaVA's tower has one size
    common = {
        "pretrained": str(work / "backbone"),
        **bounds,
        "data": str(work / "data" / "train.jsonl"),
        "output": str(work / stage),
        "max_steps": spec.learned_steps,
        "seed": 42 + spec.seed,
        **LEARNED,
    }
    return SelectorSpec.make(common) if stage == "scorer" else PredictorSpec.make({**common, "hidden": HIDDEN})
