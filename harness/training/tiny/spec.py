"""Settings of `train tiny`."""

from __future__ import annotations

import typing
from typing import Any, ClassVar, Literal

from pydantic import Field, model_validator

from visionselector_eval.models.settings import Settings

Family = Literal["qwen2_5_vl", "llava"]
SIZES: dict[Family, dict[str, int]] = {
    "qwen2_5_vl": {"vision_steps": 1000, "language_steps": 2400, "joint_steps": 500, "documents": 1200},
    "llava": {"vision_steps": 900, "language_steps": 2000, "joint_steps": 600, "documents": 1200},
}

Stage = Literal["vision", "language", "joint", "data", "scorer", "predictor", "evaluate", "checkpoint", "fusion"]
STAGES: tuple[Stage, ...] = typing.get_args(Stage)
_NOT_OF: dict[Family, tuple[Stage, ...]] = {"qwen2_5_vl": ("fusion",), "llava": ("predictor",)}


def _by_family(name: str, what: str) -> Any:
    told = ", ".join(f"{sizes[name]} for {family}" for family, sizes in SIZES.items())
    return Field(default=None, ge=1, description=f"{what}; {told} unless given")


class TinySpec(Settings):
    """Training of an embedded checkpoint."""

    subject = "the training spec"
    kind: ClassVar[str] = "tiny"

    family: Family = Field(
        default="qwen2_5_vl", description="qwen2_5_vl, the embedded `tiny`; or llava, the embedded `tiny-llava`"
    )
    output: str = Field(default="runs/tiny", description="folder of the result; a training there is resumed")
    stages: list[Stage] = Field(
        default=list(STAGES),
        description=f"some of {', '.join(STAGES)}; run in this order (predictor is of qwen2_5_vl, fusion of llava)",
    )
    seed: int = Field(default=0, ge=0, description="of initial weights, order of samples and random decisions")
    vision_steps: int | None = _by_family("vision_steps", "steps of stage vision")
    language_steps: int | None = _by_family("language_steps", "steps of stage language")
    joint_steps: int | None = _by_family("joint_steps", "steps of stage joint")
    learned_steps: int = Field(default=300, ge=1, description="steps of the stages scorer and predictor")
    documents: int | None = _by_family("documents", "documents a benchmark that is learned from after stage joint")
    fusion_steps: int = Field(
        default=300,
        ge=1,
        description="of stage fusion: steps of its start and of the fusion alone; five times as many with the LLM",
    )
    check: int = Field(default=500, ge=1, description="documents a benchmark that stage evaluate asks")

    @model_validator(mode="after")
    def _of_family(self) -> TinySpec:
        for name, size in SIZES[self.family].items():
            if getattr(self, name) is None:
                setattr(self, name, size)
        self.stages = [stage for stage in self.stages if stage not in _NOT_OF[self.family]]
        return self

    def settings(self) -> dict[str, Any]:
        """What a folder's training shares with one that resumes it; only what its family has."""
        free = {"output", "stages", "check"}
        free |= {"family", "fusion_steps"} if self.family == "qwen2_5_vl" else set()
        return self.model_dump(exclude=free)
