"""Settings of `train tiny`."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

STEPS = {"vision": 1000, "language": 2400, "joint": 500}

Stage = Literal["vision", "language", "joint", "data", "scorer", "predictor", "evaluate", "checkpoint"]
STAGES: tuple[Stage, ...] = ("vision", "language", "joint", "data", "scorer", "predictor", "evaluate", "checkpoint")


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
    learned_steps: int = Field(default=300, ge=1, description="steps of the stages scorer and predictor")
    documents: int = Field(default=1200, ge=2, description="documents a benchmark that scorer and predictor learn from")
    check: int = Field(default=500, ge=1, description="documents a benchmark that stage evaluate asks")
