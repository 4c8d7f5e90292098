"""Settings of `train tiny`."""

from __future__ import annotations

import typing
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

Family = Literal["qwen2_5_vl", "llava"]
STEPS: dict[Family, dict[str, int]] = {
    "qwen2_5_vl": {"vision": 1000, "language": 2400, "joint": 500},
    "llava": {"vision": 900, "language": 2000, "joint": 600},
}

Stage = Literal["vision", "language", "joint", "data", "scorer", "predictor", "evaluate", "checkpoint", "fusion"]
STAGES: tuple[Stage, ...] = typing.get_args(Stage)
_NOT_OF: dict[Family, tuple[Stage, ...]] = {"qwen2_5_vl": ("fusion",), "llava": ("predictor",)}


def _steps(stage: str) -> Any:
    told = "; ".join(f"{steps[stage]} for {family}" for family, steps in STEPS.items())
    return Field(default=None, ge=1, description=f"steps of stage {stage}; {told} unless given")


class TinySpec(BaseModel):
    """Training of an embedded checkpoint."""

    model_config = ConfigDict(extra="forbid")

    kind: ClassVar[str] = "tiny"

    family: Family = Field(
        default="qwen2_5_vl", description="qwen2_5_vl, the embedded `tiny`; or llava, the embedded `tiny-llava`"
    )
    output: str = Field(default="runs/tiny", description="folder of the result; a training there goes on")
    stages: list[Stage] = Field(
        default=list(STAGES),
        description=f"some of {', '.join(STAGES)}; run in this order (predictor is of qwen2_5_vl, fusion of llava)",
    )
    seed: int = Field(default=0, ge=0, description="of initial weights, order of samples and random decisions")
    vision_steps: int | None = _steps("vision")
    language_steps: int | None = _steps("language")
    joint_steps: int | None = _steps("joint")
    learned_steps: int = Field(default=300, ge=1, description="steps of the stages scorer and predictor")
    documents: int = Field(default=1200, ge=2, description="documents a benchmark that scorer and predictor learn from")
    fusion_steps: int = Field(
        default=1000, ge=1, description="of stage fusion: steps of the fusion alone, and then of fusion and LLM"
    )
    fusion_pictures: int = Field(default=3000, ge=1, description="pictures that stage fusion learns from")
    check: int = Field(default=500, ge=1, description="documents a benchmark that stage evaluate asks")

    @model_validator(mode="after")
    def _by_family(self) -> TinySpec:
        for stage, steps in STEPS[self.family].items():
            if getattr(self, f"{stage}_steps") is None:
                setattr(self, f"{stage}_steps", steps)
        self.stages = [stage for stage in self.stages if stage not in _NOT_OF[self.family]]
        return self

    def settings(self) -> dict[str, Any]:
        """What a folder's training shares with one that goes on there; only what its family has."""
        free = {"output", "stages", "check"}
        free |= {"family", "fusion_steps", "fusion_pictures"} if self.family == "qwen2_5_vl" else set()
        return self.model_dump(exclude=free)
