"""What a sweep is: a grid of cells, from flags or YAML, checked before anything is loaded."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from visionselector_eval.baselines.budget import Budget, Share, parse_budget
from visionselector_eval.baselines.errors import InputError, unknown
from visionselector_eval.baselines.registry import options_of, resolve_options
from visionselector_eval.models.tiny import TINY

Protocol = Literal["auto", "visionselector", "checkpoint"]

# Pixel and frame settings by name. `visionselector`: the published harness (METHODS 4.1): 256 to 2048 tokens a picture,
# 32 frames of 256 to 768 tokens. `checkpoint`: what the checkpoint's own processor configuration says.
PROTOCOLS: dict[str, dict[str, Any]] = {
    "visionselector": {
        "min_pixels": 256 * 28 * 28,
        "max_pixels": 1605632,
        "video_min_pixels": 256 * 28 * 28,
        "video_max_pixels": 768 * 28 * 28,
        "max_num_frames": 32,
        "system_prompt": "You are a helpful assistant.",
    },
    "checkpoint": {},
}


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", validate_default=True)


class MethodSpec(_Strict):
    """A compressor with its options; in YAML a plain name, or a mapping `{name: divprune, upstream_exact: true}`."""

    name: str = Field(description="a compressor of `visionselector-eval list`")
    label: str = Field(default="", description="its name in tables; by default the name and the options that were set")
    options: dict[str, Any] = Field(default_factory=dict, description="options of the compressor")

    @model_validator(mode="before")
    @classmethod
    def _short_forms(cls, value: Any) -> Any:
        if isinstance(value, str):
            return {"name": value}
        if isinstance(value, Mapping) and "name" in value:
            known = {"name", "label", "options"}
            extra = {k: v for k, v in value.items() if k not in known}
            return {
                **{k: v for k, v in value.items() if k in known},
                "options": {**(value.get("options") or {}), **extra},
            }
        return value

    @model_validator(mode="after")
    def _check(self) -> MethodSpec:
        resolve_options(self.name, self.options)
        if not self.label:
            set_options = ",".join(f"{k}={v}" for k, v in sorted(self.options.items()))
            self.label = f"{self.name}[{set_options}]" if set_options else self.name
        return self


class BackboneSpec(_Strict):
    """A checkpoint; in YAML a plain id, or a mapping `{pretrained: ..., revision: ...}`."""

    pretrained: str = Field(description="folder, hub id, or `tiny` for the embedded checkpoint")
    revision: str | None = Field(default=None, description="branch, tag or commit on the hub")

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        return {"pretrained": value} if isinstance(value, str) else value


class SweepSpec(_Strict):
    """A grid of cells: backbones x methods x budgets x tasks (x seeds), with everything that changes an answer."""

    name: str = Field(
        default="sweep", description="name of the run; its folder is runs/<name> unless `output` is given"
    )
    output: str | None = Field(default=None, description="folder of the run")
    backbones: list[BackboneSpec] = Field(
        default_factory=lambda: [BackboneSpec(pretrained=TINY)], description="checkpoints", min_length=1
    )
    methods: list[MethodSpec] = Field(
        default_factory=lambda: [
            MethodSpec(name=name)
            for name in ("visionselector", "visionzip", "divprune", "random", "uniform", "downsample")
        ],
        description="compressors; `full` is always run beside them",
        min_length=1,
    )
    budgets: list[str] = Field(
        default=["0.3", "0.2", "0.1"],
        description="shares of visual tokens to keep (0.2, 20%) or counts (64tok)",
        min_length=1,
    )
    suite: str | None = Field(
        default=None, description="a named list of tasks; `tiny` when neither suite nor tasks are given"
    )
    tasks: list[str] = Field(default_factory=list, description="tasks, beside or instead of a suite")
    seeds: list[int] = Field(default=[0], description="seeds of the methods that draw at random", min_length=1)
    limit: int | None = Field(default=None, ge=1, description="first N documents of each task; all when not given")
    batch_size: int = Field(default=1, ge=1, description="documents answered together")
    device: str = Field(default="auto", description="auto, cpu, cuda, cuda:1")
    dtype: str = Field(
        default="auto", description="auto (bfloat16 on CUDA, float32 on CPU), float32, bfloat16, float16"
    )
    attn_implementation: str = Field(default="auto", description="auto, sdpa, eager, flash_attention_2")
    protocol: Protocol = Field(
        default="auto",
        description="pixel and frame settings: visionselector (as published), checkpoint (its own processor's), "
        "auto (checkpoint for the embedded `tiny`, else visionselector)",
    )
    min_pixels: int | None = Field(default=None, ge=1, description="smallest area of a picture, over the protocol's")
    max_pixels: int | None = Field(default=None, ge=1, description="largest area of a picture, over the protocol's")
    max_num_frames: int | None = Field(default=None, ge=1, description="most frames of a video, over the protocol's")
    fps: float | None = Field(
        default=None, gt=0, description="frames a second to show; spread over the video when not given"
    )
    system_prompt: str | None = Field(default=None, description="first turn of every conversation, over the protocol's")
    generation: dict[str, Any] = Field(
        default_factory=dict, description="over the tasks' own generation settings, e.g. {max_new_tokens: 16}"
    )

    @field_validator("budgets", mode="before")
    @classmethod
    def _budgets(cls, value: Any) -> Any:
        values = value if isinstance(value, Sequence) and not isinstance(value, str) else [value]
        return list(dict.fromkeys(str(parse_budget(v)) for v in values))

    @field_validator("tasks", "methods", "backbones", "seeds", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return [value] if isinstance(value, str | int | Mapping) else value

    @field_validator("generation")
    @classmethod
    def _generation(cls, value: dict[str, Any]) -> dict[str, Any]:
        from visionselector_eval.models.generation import GENERATION_KEYS

        for key in value:
            if key not in GENERATION_KEYS and key != "until":
                raise unknown("generation setting", key, [*GENERATION_KEYS, "until"])
        return value

    @model_validator(mode="after")
    def _tasks_exist(self) -> SweepSpec:
        labels = [m.label for m in self.methods]
        if len(set(labels)) < len(labels):
            twice = next(label for label in labels if labels.count(label) > 1)
            raise InputError(f"method '{twice}' is listed twice: give the two different options or labels")
        if self.suite is None and not self.tasks:
            self.suite = "tiny"
        self.task_names()
        return self

    def task_names(self) -> list[str]:
        """The tasks of the suite and those named, each once, in order."""
        from visionselector_eval.tasks.suites import suite

        return list(dict.fromkeys([*(suite(self.suite) if self.suite else []), *self.tasks]))

    def media(self, backbone: BackboneSpec) -> dict[str, Any]:
        """Pixel, frame and prompt settings for one backbone: the protocol's, with what the spec sets over them."""
        protocol = self.protocol
        if protocol == "auto":
            protocol = "checkpoint" if backbone.pretrained == TINY else "visionselector"
        settings = dict(PROTOCOLS[protocol])
        for key in ("min_pixels", "max_pixels", "max_num_frames", "fps", "system_prompt"):
            if (value := getattr(self, key)) is not None:
                settings[key] = value
                if key in ("min_pixels", "max_pixels") and f"video_{key}" in settings:
                    settings[f"video_{key}"] = value
        return settings

    def folder(self) -> Path:
        """Where the run is written."""
        return Path(self.output) if self.output else Path("runs") / self.name


@dataclasses.dataclass(frozen=True)
class CellSpec:
    """One cell of the grid: a method at a budget on a task. `options` are complete, defaults included."""

    backbone: BackboneSpec
    method: str
    label: str
    options: Mapping[str, Any]
    budget: Budget
    task: str
    seed: int

    @property
    def title(self) -> str:
        """One line for people."""
        seed = f" seed {self.seed}" if self.seed else ""
        return f"{self.backbone.pretrained} {self.label} @ {self.budget} on {self.task}{seed}"


def cells_of(spec: SweepSpec) -> list[CellSpec]:
    """All cells, grouped by backbone and task: one `full` cell each, then method by method, budget by budget.

    Seeds multiply only the methods that draw at random (those with an option `seed`). A budget of 1 is `full` and gets
    no cell of its own.
    """
    cells: list[CellSpec] = []
    budgets = [b for b in map(parse_budget, spec.budgets) if b != Share(1.0)]
    sampled = float(spec.generation.get("temperature", 0) or 0) > 0
    for backbone in spec.backbones:
        for task in spec.task_names():
            everything = [MethodSpec(name="full")] + [m for m in spec.methods if m.name != "full"]
            for method in everything:
                drawn = "seed" in options_of(method.name)
                for budget in [Share(1.0)] if method.name == "full" else budgets:
                    for seed in spec.seeds if drawn or sampled else spec.seeds[:1]:
                        options = resolve_options(method.name, {**({"seed": seed} if drawn else {}), **method.options})
                        cells.append(CellSpec(backbone, method.name, method.label, options, budget, task, seed))
    return cells


def load_spec(path: str | Path, overrides: Mapping[str, Any] | None = None) -> SweepSpec:
    """Read a spec from YAML; `overrides` (from flags) win.

    Raises
    ------
    InputError: missing file, YAML that can't be parsed, unknown field (with the nearest existing one), wrong value.
    """
    try:
        data = yaml.safe_load(Path(path).read_text())
    except OSError as error:
        raise InputError(f"spec '{path}' can't be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise InputError(f"spec '{path}' is not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(data, Mapping):
        raise InputError(f"spec '{path}' must be a mapping of fields, e.g. 'budgets: [0.2]'")
    return make_spec({**data, **(overrides or {})})


def make_spec(data: Mapping[str, Any]) -> SweepSpec:
    """A checked spec from plain data; pydantic's report becomes one line with the near match for a mistyped field."""
    try:
        return SweepSpec.model_validate(dict(data))
    except ValidationError as error:
        raise _readable(error) from error


def _readable(error: ValidationError) -> InputError:
    first = error.errors()[0]
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, InputError):
        return cause
    where = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        models: dict[str, type[BaseModel]] = {"backbones": BackboneSpec, "methods": MethodSpec}
        model = models.get(str(first["loc"][0]), SweepSpec)
        return unknown("field of the spec", str(first["loc"][-1]), model.model_fields)
    return InputError(
        f"field '{where}' of the spec: {first['msg'][0].lower()}{first['msg'][1:]}, got {first['input']!r}"
    )


def spec_yaml(spec: SweepSpec) -> str:
    """The spec as YAML that `load_spec` reads back to the same spec."""
    return yaml.safe_dump(spec.model_dump(exclude_none=True), sort_keys=False, allow_unicode=True)
