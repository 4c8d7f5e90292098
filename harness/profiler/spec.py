"""What a profile measures: from flags, checked before anything is loaded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from visionselector_eval.baselines.contract.budget import Budget, Share
from visionselector_eval.baselines.contract.errors import InputError
from visionselector_eval.baselines.contract.registry import available, resolve_options
from visionselector_eval.harness.store.files import digest_of
from visionselector_eval.harness.sweep.spec import (
    ASKING,
    AUTO,
    METHODS_FLAG,
    Fps,
    Jpeg,
    MaxNumFrames,
    MaxPixels,
    MethodSpec,
    MinPixels,
    ProtocolName,
    RepeatFrames,
    SystemPrompt,
    check_labels,
    one_or_many,
)
from visionselector_eval.models.settings import BudgetField, Flag, Settings
from visionselector_eval.models.tiny import TINY

FULL, LIMIT = "full", "limit"


class ProfileSpec(Settings):
    """Cells x workloads, and how often each is run."""

    subject = "the profile"

    name: str = Field(default="profile", description="its folder is profiles/<name> unless `output` is given")
    output: str | None = Field(default=None, description="folder of the profile")
    pretrained: str = Field(default=TINY, description="folder, hub id, or `tiny`, the embedded checkpoint")
    revision: str | None = Field(default=None, description="branch, tag or commit on the hub")
    random_weights: Annotated[str | None, Flag(metavar="SHAPE")] = Field(
        default=None, description="instead of a checkpoint: a model of this shape with random weights"
    )
    methods: Annotated[list[MethodSpec], METHODS_FLAG] = Field(
        default_factory=list, description="compressors; all of them when not given; `full` is always measured"
    )
    budgets: list[BudgetField] = Field(
        default=[Share(0.3), Share(0.2), Share(0.1)],
        min_length=1,
        description="shares of visual tokens to keep (0.2, 20%) or counts (64tok)",
    )
    synthetic: Annotated[list[int], Flag(metavar="N")] = Field(
        default_factory=list,
        description="images of so many visual tokens with a fixed question (default: 256, unless --task is given)",
    )
    task: str | None = Field(default=None, description="an lmms-eval task: its documents are the workload")
    limit: int | None = Field(default=None, ge=1, description="first N documents of the task (default: 8)")
    data_root: str | None = Field(default=None, description="folder with the data of real tasks, as for sweep")
    max_new_tokens: int = Field(default=8, ge=1, description="length of every answer, forced")
    repeats: int = Field(default=50, ge=1, description="timed rounds of every cell")
    warmup: int = Field(default=10, ge=0, description="rounds before them that are not kept")
    memory_rounds: int = Field(default=3, ge=0, description="rounds that measure memory instead of time")
    energy_seconds: float = Field(
        default=2.0, ge=0, description="on NVIDIA GPUs: run each cell so long while power is sampled; 0: don't"
    )
    seed: int = Field(default=0, description="of the order of cells, the image and random weights")
    threads: int | None = Field(
        default=None, ge=1, description="CPU threads of torch (default: torch's own; 1 for `tiny`)"
    )
    device: str = Field(default="auto", description="auto, cpu, cuda, cuda:1")
    dtype: str = Field(
        default="auto", description="auto (bfloat16 on CUDA, float32 on CPU), float32, bfloat16, float16"
    )
    attn_implementation: str = Field(
        default="auto", description="auto, sdpa, eager, flash_attention_2; one for all cells of a profile"
    )
    protocol: ProtocolName = AUTO
    min_pixels: MinPixels = None
    max_pixels: MaxPixels = None
    max_num_frames: MaxNumFrames = None
    fps: Fps = None
    system_prompt: SystemPrompt = None
    jpeg: Jpeg = None
    repeat_frames: RepeatFrames = None

    @field_validator("budgets", "methods", "synthetic", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return one_or_many(value)

    @field_validator("budgets")
    @classmethod
    def _each_once(cls, value: list[Budget]) -> list[Budget]:
        return list(dict.fromkeys(value))

    @field_validator("synthetic")
    @classmethod
    def _grids(cls, value: list[int]) -> list[int]:
        from visionselector_eval.harness.profiler.workloads import grid_of

        for tokens in value:
            grid_of(tokens)
        return list(dict.fromkeys(value))

    @model_validator(mode="after")
    def _check(self) -> ProfileSpec:
        if not self.methods:
            self.methods = [MethodSpec(name=name) for name in available() if name != "full"]
        if self.random_weights is not None:
            from visionselector_eval.harness.profiler.random_weights import shape_named

            shape_named(self.random_weights)
            if self.pretrained != TINY or self.revision:
                raise InputError("give --pretrained or --random-weights, not both")
            if self.task:
                raise InputError(
                    "--task with --random-weights would measure documents tokenized by another model: use --synthetic N"
                )
        if not self.task:
            for field in ("limit", "data_root", *ASKING):
                if getattr(self, field) not in (None, AUTO):
                    raise InputError(f"--{field.replace('_', '-')} goes with --task NAME")
            self.synthetic = self.synthetic or [256]
        else:
            self.limit = self.limit or 8
        check_labels(self.methods)
        return self

    @property
    def backbone(self) -> str:
        """How tables call the model."""
        return f"random:{self.random_weights}" if self.random_weights else self.pretrained

    def folder(self) -> Path:
        """Where the profile is written."""
        return Path(self.output) if self.output else Path("profiles") / self.name


@dataclass(frozen=True)
class ProfileCell:
    """One line of the table.

    Attributes:
        role: `full`, `limit` (the shorter prompt for nothing: the ideal), or `method`.
        options: complete, defaults included.
        digest: names it within the profile, or the sweep's cell.
    """

    role: str
    method: str
    label: str
    options: Mapping[str, Any]
    budget: Budget
    digest: str

    @property
    def title(self) -> str:
        """One line for people."""
        return self.label if self.role == FULL else f"{self.label} @ {self.budget}"


def cell_of(role: str, method: str, label: str, options: Mapping[str, Any], budget: Budget) -> ProfileCell:
    """A cell, with a digest of what it is."""
    shown = {k: v if isinstance(v, bool | int | float | str | None) else str(v) for k, v in options.items()}
    digest = digest_of({"role": role, "method": method, "options": shown, "budget": str(budget)})
    return ProfileCell(role, method, label, options, budget, digest)


def profile_cells(spec: ProfileSpec) -> list[ProfileCell]:
    """`full`, every method at every budget, and the limit of every budget. A budget of 1 is `full`."""
    budgets = [budget for budget in spec.budgets if budget != Share(1.0)]
    cells = [cell_of(FULL, "full", "full", resolve_options("full", {}), Share(1.0))]
    for method in spec.methods:
        if method.name == "full":
            continue
        options = resolve_options(method.name, method.options, spec.pretrained)
        cells += [cell_of("method", method.name, method.label, options, budget) for budget in budgets]
    return cells + limits(budgets)


def limits(budgets: Sequence[Budget]) -> list[ProfileCell]:
    """The ideal at each budget: evenly spread tokens, whose choosing is not counted."""
    uniform = resolve_options("uniform", {})
    return [cell_of(LIMIT, "uniform", LIMIT, uniform, budget) for budget in dict.fromkeys(budgets)]
