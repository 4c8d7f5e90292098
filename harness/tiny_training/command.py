"""`train tiny`: the embedded checkpoint from nothing, stage after stage."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field

from visionselector_eval.harness.tiny_training.batches import KINDS, TRAIN_SEED
from visionselector_eval.harness.tiny_training.batches import STAGES as BACKBONE_STAGES
from visionselector_eval.harness.tiny_training.checkpoint import write_checkpoint
from visionselector_eval.harness.tiny_training.network import Network
from visionselector_eval.harness.tiny_training.stages import STEPS, evaluate, train_stage, trained
from visionselector_eval.harness.training_data import write_mirrors
from visionselector_eval.models.training.export import export_checkpoint
from visionselector_eval.models.training.spec import PredictorSpec, SelectorSpec, make_train_spec
from visionselector_eval.models.training.trainer import train

Stage = Literal["vision", "language", "joint", "data", "scorer", "predictor", "checkpoint", "evaluate"]
STAGES: tuple[Stage, ...] = ("vision", "language", "joint", "data", "scorer", "predictor", "checkpoint", "evaluate")

# What the learned parts are trained with: the published settings but for the size of a step, which fits a backbone of
# this width, and the number of samples.
SCORER: dict[str, Any] = {"learning_rate": 3e-3, "batch_size": 16, "accumulation": 1, "init_std": 0.02}
PREDICTOR: dict[str, Any] = {"learning_rate": 1e-3, "batch_size": 16, "accumulation": 1, "hidden": 48}


class TinySpec(BaseModel):
    """Training of the embedded checkpoint."""

    model_config = ConfigDict(extra="forbid")

    kind: ClassVar[str] = "tiny"

    output: str = Field(default="runs/tiny", description="folder of the result; a training there goes on")
    stages: list[Stage] = Field(default=list(STAGES), description=f"some of {', '.join(STAGES)}; run in this order")
    seed: int = Field(default=0, ge=0, description="of initial weights, order of samples and random decisions")
    vision_steps: int = Field(default=STEPS["vision"], ge=1, description="steps of stage vision")
    language_steps: int = Field(default=STEPS["language"], ge=1, description="steps of stage language")
    joint_steps: int = Field(default=STEPS["joint"], ge=1, description="steps of stage joint")
    learned_steps: int = Field(default=400, ge=1, description="steps of the stages scorer and predictor")
    documents: int = Field(default=1000, ge=2, description="documents a benchmark that scorer and predictor learn from")
    check: int = Field(default=500, ge=1, description="documents a benchmark that stage evaluate asks")


Told = Callable[[str, int, int], None]


@contextmanager
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # two threads are no faster on matrices of this size
    try:
        yield
    finally:
        torch.set_num_threads(before)


def train_tiny(spec: TinySpec, told: Told | None = None) -> Path:
    """Run the stages that are not finished yet; the folder of the checkpoint.

    Parameters
    ----------
    told: of the stage, the steps done and the steps it has.
    """
    work = Path(spec.output)
    work.mkdir(parents=True, exist_ok=True)
    for stage in STAGES:
        if stage in spec.stages:
            with _one_thread():
                _run(stage, spec, work, told)
    return work / "checkpoint"


def _run(stage: Stage, spec: TinySpec, work: Path, told: Told | None) -> None:
    if stage in BACKBONE_STAGES:
        steps = getattr(spec, f"{stage}_steps")
        train_stage(stage, work, steps, spec.seed, advance=told and (lambda done: told(stage, done, steps)))
        if stage == "joint":
            write_checkpoint(trained(work, spec.seed), work / "backbone")
    elif stage == "data":
        if not (work / "data" / "train.jsonl").is_file():
            shutil.rmtree(work / "data", ignore_errors=True)
            write_mirrors(KINDS, work / "data", seed=TRAIN_SEED + 7, documents=spec.documents)
    elif stage in ("scorer", "predictor"):
        train(make_train_spec(*_learned(stage, spec, work)))
    elif stage == "checkpoint":
        shutil.rmtree(work / "with-scorer", ignore_errors=True)
        shutil.rmtree(work / "checkpoint", ignore_errors=True)
        export_checkpoint(work / "scorer", work / "with-scorer", str(work / "backbone"))
        export_checkpoint(work / "predictor", work / "checkpoint", str(work / "with-scorer"))
    else:
        net = Network(trained(work, spec.seed))
        figures = {"asked": evaluate(net, spec.check), "other": evaluate(net, min(spec.check, 200), asked=False)}
        (work / "evaluate.json").write_text(json.dumps(figures, indent=1) + "\n")


def _learned(stage: str, spec: TinySpec, work: Path) -> tuple[Any, dict[str, Any]]:
    common = {
        "pretrained": str(work / "backbone"),
        "data": str(work / "data" / "train.jsonl"),
        "output": str(work / stage),
        "max_steps": spec.learned_steps,
        "seed": 42 + spec.seed,
        "gradient_checkpointing": False,
        "report_to": ["none"],
    }
    return (SelectorSpec, {**common, **SCORER}) if stage == "scorer" else (PredictorSpec, {**common, **PREDICTOR})
