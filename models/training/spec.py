"""What a training is: one checked record from flags or YAML. Published hyper-parameters are the defaults."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from visionselector_eval.baselines.contract.budget import Budget, Share
from visionselector_eval.baselines.contract.errors import InputError, unknown
from visionselector_eval.models.settings import BudgetField, Flag, Settings
from visionselector_eval.models.tiny import EMBEDDED, TINY

# At most 64 tokens an image: what the published recipe trains with (arXiv 2510.16598).
_PUBLISHED_PIXELS = {"min_pixels": 784, "max_pixels": 50_176}


class TrainSpec(Settings):
    """What all trainings have in common."""

    subject = "the training spec"
    kind: ClassVar[str] = ""

    output: str = Field(default="runs/training", description="folder of the result, and of the checkpoints on the way")
    pretrained: str = Field(default=TINY, description="frozen backbone: folder, hub id, or `tiny` (embedded)")
    revision: str | None = Field(default=None, description="branch, tag or commit on the hub")
    data: list[str] = Field(
        default_factory=list,
        description="conversation JSONL files (`image`, `conversations`), or parquet files (`image`, `question`, "
        "`answer`)",
    )
    image_root: str | None = Field(
        default=None, description="folder that relative image paths start from; by default that of the JSONL file"
    )
    image_paths: Literal["relative", "absolute"] = Field(
        default="relative",
        description="relative: image paths stay below image_root, others are refused; absolute: only absolute paths",
    )
    on_bad_sample: Literal["fail", "skip"] = Field(
        default="fail",
        description="a sample that can't be used (unreadable image, longer than max_length, too few visual tokens): "
        "stop, or leave it out and count it",
    )
    epochs: float = Field(default=1.0, gt=0, description="passes over the data")
    max_steps: int | None = Field(default=None, ge=1, description="optimiser steps, instead of epochs")
    batch_size: int = Field(default=16, ge=1, description="samples of a micro-batch on each device")
    learning_rate: float = Field(default=5e-5, gt=0, description="highest learning rate of AdamW")
    schedule: Literal["cosine", "linear", "constant", "constant_with_warmup"] = Field(
        default="cosine", description="course of the learning rate"
    )
    warmup: float = Field(default=0.03, ge=0, lt=1, description="share of all steps in which the learning rate rises")
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW's weight decay")
    beta1: float = Field(default=0.9, ge=0, lt=1, description="AdamW's decay of the mean of gradients")
    beta2: float = Field(default=0.999, ge=0, lt=1, description="AdamW's decay of the mean of their squares")
    epsilon: float = Field(default=1e-8, gt=0, description="AdamW's epsilon")
    clip: float = Field(default=1.0, ge=0, description="largest norm of the gradient; 0 does not clip")
    init: str | None = Field(
        default=None, description="start from these weights (folder, .safetensors file or hub id), not from random ones"
    )
    seed: int = Field(default=42, ge=0, description="of initial weights, order of samples and random decisions")
    system_prompt: Annotated[str | None, Flag(free_text=True)] = Field(
        default=None, description="first turn of every conversation"
    )
    max_length: int | None = Field(
        default=None, ge=2, description="longest sample in tokens; by default the backbone's context"
    )
    padding_side: Literal["left", "right"] = Field(default="left", description="where short samples are padded")
    device: str = Field(default="auto", description="auto (each process its own CUDA device, else CPU), cpu, cuda")
    dtype: str = Field(
        default="auto",
        description="of the frozen backbone: auto (bfloat16 on CUDA, float32 on CPU), float32, bfloat16, float16; "
        "what is trained is float32",
    )
    attn_implementation: str = Field(default="auto", description="auto, sdpa, eager, flash_attention_2")
    gradient_checkpointing: bool = Field(
        default=True, description="compute the LLM's activations again in the backward pass instead of keeping them"
    )
    workers: int = Field(default=0, ge=0, description="processes that read samples, for each device")
    log_steps: int = Field(default=10, ge=1, description="optimiser steps between two lines of the log")
    save_steps: int = Field(default=100, ge=1, description="optimiser steps between two checkpoints to resume from")
    keep_checkpoints: int = Field(default=2, ge=1, description="checkpoints that are kept")
    report_to: list[str] = Field(
        default=["auto"], description="auto (tensorboard where installed), tensorboard, wandb, none"
    )

    @field_validator("data", "report_to", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("report_to")
    @classmethod
    def _reporters(cls, value: list[str]) -> list[str]:
        for name in value:
            if name not in (known := ["auto", "tensorboard", "wandb", "none"]):
                raise unknown("report_to", name, known)
        return value

    @model_validator(mode="after")
    def _whole(self) -> TrainSpec:
        if not self.data:
            raise InputError(
                "training on which data? give --data FILE (conversation JSONL, or parquet with image, question, "
                "answer); `data mirrors` makes some"
            )
        for name, value in self.published().items():
            if name not in self.model_fields_set:
                object.__setattr__(self, name, value)
        return self

    def published(self) -> dict[str, Any]:
        """Published values that depend on other fields, for fields that were not given."""
        return {}

    def defaults(self) -> dict[str, Any]:
        """What the fields are unless given."""
        fields = type(self).model_fields
        return {name: info.get_default(call_default_factory=True) for name, info in fields.items()} | self.published()

    def micro_batches(self, processes: int) -> int:
        """Micro-batches of an optimiser step, on each of several processes."""
        raise NotImplementedError

    def media(self) -> dict[str, Any]:
        """Fields of `MediaSettings`: how images and videos become pixels."""
        return {"system_prompt": self.system_prompt}

    def folder(self) -> Path:
        """Where the result is written."""
        return Path(self.output)

    def course(self) -> dict[str, Any]:
        """The fields that change the weights that come out, as plain data: what a resumed training must share."""
        free = {"output", "device", "workers", "log_steps", "save_steps", "keep_checkpoints", "report_to"}
        return {"kind": self.kind, **self.model_dump(exclude=free)}


class CompressorSpec(TrainSpec):
    """Training of a module that chooses among visual tokens, beside a frozen backbone."""

    budget: BudgetField = Field(
        default=Share(0.2), description="share of visual tokens to keep while training, or a count (16tok)"
    )
    upstream_exact: bool = Field(default=False, description="the published implementation's scope and rounding")
    accumulation: int = Field(default=4, ge=1, description="micro-batches of an optimiser step")
    min_pixels: int | None = Field(
        default=None,
        ge=1,
        description="smallest area of an image; 784 unless given, for `tiny` the checkpoint's own",
    )
    max_pixels: int | None = Field(
        default=None,
        ge=1,
        description="largest area of an image; 50176 (64 tokens) unless given, for `tiny` the checkpoint's own",
    )
    max_num_frames: int = Field(default=32, ge=1, description="most frames of a video")

    @field_validator("budget")
    @classmethod
    def _budget(cls, value: Budget) -> Budget:
        if value == Share(1.0):
            raise InputError("budget 1.0 keeps every visual token: there is nothing to learn, give less (e.g. 0.2)")
        return value

    @model_validator(mode="after")
    def _bounds(self) -> CompressorSpec:
        if self.min_pixels and self.max_pixels and self.min_pixels > self.max_pixels:
            raise InputError(f"invalid pixel bounds {self.min_pixels}..{self.max_pixels}: expected min <= max")
        return self

    def published(self) -> dict[str, Any]:
        return {} if self.pretrained in EMBEDDED else dict(_PUBLISHED_PIXELS)

    def micro_batches(self, processes: int) -> int:
        return self.accumulation

    def media(self) -> dict[str, Any]:
        return {
            **super().media(),
            "min_pixels": self.min_pixels,
            "max_pixels": self.max_pixels,
            "video_min_pixels": self.min_pixels,
            "video_max_pixels": self.max_pixels,
            "max_num_frames": self.max_num_frames,
        }


class SelectorSpec(CompressorSpec):
    """Training of VisionSelector's scorer: CE + lambda * BCE(soft top-k, hard top-k), arXiv 2510.16598."""

    kind: ClassVar[str] = "visionselector"

    output: str = Field(default="runs/visionselector", description=TrainSpec.model_fields["output"].description)
    upstream_exact: bool = Field(
        default=False,
        description="score and choose among all images of a micro-batch at once, k = int(r * N), as published; "
        "canonically each image is a scope of its own",
    )
    lambda_start: float = Field(default=0.1, ge=0, description="weight of the mask loss at the first step")
    lambda_end: float = Field(default=2.0, ge=0, description="weight of the mask loss at the last step, linear between")
    hidden: int | None = Field(default=None, ge=1, description="size of the scorer's projections; half the width")
    init_std: float = Field(
        default=1e-4, gt=0, description="deviation of the initial weights; small, so that every score begins at about 0"
    )


class PredictorSpec(CompressorSpec):
    """Training of Dynamic-Qwen's predictor: CE + weight * (mean keep - r)^2, arXiv 2412.00876."""

    kind: ClassVar[str] = "dynamic-qwen"

    output: str = Field(default="runs/dynamic-qwen", description=TrainSpec.model_fields["output"].description)
    upstream_exact: bool = Field(
        default=False,
        description="judge all images of a micro-batch together, and let forbidden keys keep their share of epsilon, "
        "as published; canonically each image is judged alone",
    )
    batch_size: int = Field(default=8, ge=1, description=TrainSpec.model_fields["batch_size"].description)
    learning_rate: float = Field(default=2e-4, gt=0, description=TrainSpec.model_fields["learning_rate"].description)
    tau_start: float = Field(default=1.0, gt=0, description="temperature of the random decisions at the first step")
    tau_end: float = Field(default=0.1, gt=0, description="temperature at the last step, geometric between")
    keep_weight: float = Field(default=100.0, ge=0, description="weight of (mean keep - r)^2")
    keep_mean: Literal["batch", "sample"] = Field(
        default="batch",
        description="mean over all tokens of the batch (Dynamic-Qwen) or of each sample (Dynamic-LLaVA)",
    )
    layer: int = Field(default=2, ge=1, description="the predictor reads the input of this LLM layer (0-based)")
    hidden: int = Field(default=512, ge=8, description="size inside the predictor, a multiple of 8")
    blocks: int = Field(default=2, ge=1, description="transformer blocks of the predictor")

    @field_validator("budget")
    @classmethod
    def _share(cls, value: Budget) -> Budget:
        if not isinstance(value, Share):
            raise InputError(f"invalid budget {value} for training dynamic-qwen: expected a ratio, e.g. 0.2")
        return value


class TokenFusionSpec(TrainSpec):
    """Training of LLaVA-STF's token fusion: in stage 1 the fusion alone, in stage 2 the LLM with it (2506.07138)."""

    kind: ClassVar[str] = "token-fusion"

    output: str = Field(default="runs/token-fusion", description=TrainSpec.model_fields["output"].description)
    pretrained: str = Field(
        default="llava-hf/llava-1.5-7b-hf",
        description="stage 1: a plain LLaVA-1.5 (folder or hub id), to which the fusion is added; stage 2: the result "
        "of stage 1, or a checkpoint with token fusion",
    )
    stage: Literal[1, 2] = Field(default=1, description="1: the fusion alone is trained; 2: with it the whole LLM")
    learning_rate: float = Field(
        default=1e-3, gt=0, description=f"{TrainSpec.model_fields['learning_rate'].description}; 2e-5 in stage 2"
    )
    total_batch: int = Field(
        default=256,
        ge=1,
        description="samples of an optimiser step, over all devices and micro-batches; 128 in stage 2",
    )
    layers: list[int] | None = Field(
        default=None,
        min_length=1,
        description="hidden states of the vision tower that are fused, in this order, 0 is the embeddings; "
        "-2 21 18 15 12 9 6 3 unless given",
    )
    fusion_hidden: int | None = Field(
        default=None, ge=1, description="size inside the fusion of blocks; 4 times the tower's width"
    )
    spatial_hidden: int | None = Field(
        default=None, ge=1, description="size inside the fusion of windows; 16 times the tower's width"
    )
    pad_square: bool = Field(default=True, description="pad images to a square, as published")
    template: Literal["vicuna", "checkpoint"] = Field(
        default="vicuna",
        description="form of conversations that is trained and saved: vicuna (LLaVA-1.5's own), or checkpoint (the "
        "checkpoint's chat template)",
    )
    dtype: str = Field(
        default="auto",
        description="of computation and of what is frozen: auto (bfloat16 on CUDA, float32 on CPU), float32, bfloat16; "
        "weights that are trained are float32",
    )

    @field_validator("stage", mode="before")
    @classmethod
    def _stage(cls, value: Any) -> Any:
        return int(value) if value in ("1", "2") else value  # a flag's text

    @field_validator("dtype")
    @classmethod
    def _dtype(cls, value: str) -> str:
        if value not in (known := ["auto", "float32", "bfloat16"]):
            raise unknown("dtype of token-fusion", value, known)
        return value

    def published(self) -> dict[str, Any]:
        return {"learning_rate": 2e-5, "total_batch": 128} if self.stage == 2 else {}

    def micro_batches(self, processes: int) -> int:
        once = self.batch_size * processes
        if self.total_batch % once:
            raise InputError(
                f"total_batch {self.total_batch} can't be made of micro-batches of {self.batch_size} on {processes} "
                f"device{'s' if processes > 1 else ''}: give a batch_size that divides it"
            )
        return self.total_batch // once

    def media(self) -> dict[str, Any]:
        return {**super().media(), "pad_square": self.pad_square}


SPECS: dict[str, type[TrainSpec]] = {spec.kind: spec for spec in (SelectorSpec, PredictorSpec, TokenFusionSpec)}
