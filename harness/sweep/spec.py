"""What a sweep is: a grid of cells, from flags or YAML, checked before anything is loaded."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from visionselector_eval.baselines.contract.budget import Budget, Share, parse_budget
from visionselector_eval.baselines.contract.errors import InputError, unknown
from visionselector_eval.baselines.contract.registry import options_of, resolve_options
from visionselector_eval.models.generation import GENERATION_KEYS, generation_arguments
from visionselector_eval.models.protocols import PROTOCOLS, media_fields, protocol_named
from visionselector_eval.models.tiny import TINY, embedded
from visionselector_eval.tasks.suites import check_limit, load_suites, suite


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
        if not isinstance(value, Mapping):
            return value
        known = {k: v for k, v in value.items() if k in cls.model_fields}
        extra = {str(k): v for k, v in value.items() if k not in known}
        options = value.get("options") or {}
        if not isinstance(options, Mapping):
            raise InputError(f"options of method '{value.get('name')}' must be a mapping, got {options!r}")
        if isinstance(name := value.get("name"), str):
            own = options_of(name)
            for key in extra:
                if key not in own:
                    raise unknown(f"option of method {name}", key, [*own, *cls.model_fields])
            return {**known, "options": {**options, **extra}}
        return {**known, **extra}

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


AUTO = "auto"


def _known_protocol(name: str) -> str:
    if name != AUTO:
        protocol_named(name)
    return name


# How pictures, videos and prompts reach the model: the same flags wherever a command asks one.
ProtocolName = Annotated[
    str,
    AfterValidator(_known_protocol),
    Field(
        description="pixels, frames and prompts: "
        + "; ".join(f"{name} ({row.about})" for name, row in PROTOCOLS.items())
        + "; auto: checkpoint for the embedded `tiny`, else what the family's papers use: visionselector for "
        "Qwen2.5-VL, llava_stf for LLaVA-1.5",
    ),
]
MinPixels = Annotated[
    int | None, Field(ge=1, description="smallest area of a picture and of a frame, over the protocol's")
]
MaxPixels = Annotated[
    int | None, Field(ge=1, description="largest area of a picture and of a frame, over the protocol's")
]
MaxNumFrames = Annotated[int | None, Field(ge=1, description="most frames of a video, over the protocol's")]
Fps = Annotated[float | None, Field(gt=0, description="frames a second to show; spread over the video when not given")]
SystemPrompt = Annotated[str | None, Field(description="first turn of every conversation, over the protocol's")]
Jpeg = Annotated[bool | None, Field(description="re-encode pictures as JPEG or not, over the protocol's")]
RepeatFrames = Annotated[
    bool | None,
    Field(
        description="sample frames as the published harness does: short clips repeat frames, and the clock is made up"
    ),
]
ASKING = ("protocol", "min_pixels", "max_pixels", "max_num_frames", "fps", "system_prompt", "jpeg", "repeat_frames")


def asked_protocol(given: Any, pretrained: str, revision: str | None) -> str:
    """The protocol's name for a checkpoint: what `given`, which has the fields `ASKING`, says, or the default."""
    if given.protocol != AUTO:
        return str(given.protocol)
    known = embedded(pretrained)
    return known.protocol if known else _family_protocol(pretrained, revision)


def asked_media(given: Any, pretrained: str, revision: str | None) -> dict[str, Any]:
    """Fields of `MediaSettings` for a checkpoint: the protocol's, with what `given` sets over them."""
    protocol = asked_protocol(given, pretrained, revision)
    return media_fields(protocol, {key: getattr(given, key) for key in ASKING if key != "protocol"})


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
    data_root: str | None = Field(
        default=None,
        description="folder with the data of the real tasks, used instead of the hub; `tasks layout` prints its layout",
    )
    seeds: list[int] = Field(
        default=[0], description="seeds of methods that draw at random, and of sampled answers", min_length=1
    )
    limit: int | None = Field(default=None, ge=1, description="first N documents of each task; all when not given")
    batch_size: int = Field(default=1, ge=1, description="documents answered together")
    device: str = Field(default="auto", description="auto, cpu, cuda, cuda:1")
    dtype: str = Field(
        default="auto", description="auto (bfloat16 on CUDA, float32 on CPU), float32, bfloat16, float16"
    )
    attn_implementation: str = Field(default="auto", description="auto, sdpa, eager, flash_attention_2")
    protocol: ProtocolName = AUTO
    min_pixels: MinPixels = None
    max_pixels: MaxPixels = None
    max_num_frames: MaxNumFrames = None
    fps: Fps = None
    system_prompt: SystemPrompt = None
    jpeg: Jpeg = None
    repeat_frames: RepeatFrames = None
    on_bad_document: Literal["fail", "skip"] = Field(
        default="fail",
        description="a document that can't be read or that the processor refuses: fail the cell, or skip it "
        "(it counts as unanswered, and the result says how many)",
    )
    metric: dict[str, str] = Field(
        default_factory=dict,
        description="headline metric of a task, over that of suites.yaml or of the task's definition, e.g. "
        "{mmstar: average}; `tasks check` lists tasks whose headline is a guess",
    )
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
        return [value] if isinstance(value, str | int | float | Mapping) else value

    @field_validator("seeds")
    @classmethod
    def _each_once(cls, value: list[int]) -> list[int]:
        return list(dict.fromkeys(value))

    @field_validator("generation")
    @classmethod
    def _generation(cls, value: dict[str, Any]) -> dict[str, Any]:
        for key in value:
            if key not in GENERATION_KEYS and key != "until":
                raise unknown("generation setting", key, [*GENERATION_KEYS, "until"])
            _check_generation(key, value[key])
        return value

    @model_validator(mode="after")
    def _tasks_exist(self) -> SweepSpec:
        if twice := _first_repeated([m.label for m in self.methods]):
            raise InputError(f"method '{twice}' is listed twice: give the two different options or labels")
        made = {m.label: repr((m.name, sorted(resolve_options(m.name, m.options).items()))) for m in self.methods}
        if same := _first_repeated(list(made.values())):
            one, other = [label for label, made_of in made.items() if made_of == same][:2]
            raise InputError(f"methods '{one}' and '{other}' are the same method with the same options: list it once")
        if any(m.label == "full" and m.name != "full" for m in self.methods):
            raise InputError("label 'full' is the name of the row that others are compared with: give another label")
        if twice := _first_repeated([b.pretrained for b in self.backbones]):
            raise InputError(f"backbone '{twice}' is listed twice: give each revision of it a run of its own (--name)")
        if self.suite is None and not self.tasks:
            self.suite = "tiny"
        known = load_suites().tasks
        if self.data_root is not None and all(t in known and known[t].mirror_of for t in self.task_names()):
            raise InputError(
                f"data_root {self.data_root} is for real tasks, and {self.suite or ', '.join(self.tasks)} is embedded: "
                "name a suite or tasks such as chartqa, or leave data_root out"
            )
        for task in self.task_names():
            check_limit(task, self.limit, known[task].pair if task in known else 1)
        for task in self.metric:
            if task not in self.task_names():
                raise unknown("task of this sweep", task, self.task_names())
        return self

    def task_names(self) -> list[str]:
        """The tasks of the suite and those named, each once, in order."""
        return list(dict.fromkeys([*(suite(self.suite) if self.suite else []), *self.tasks]))

    def protocol_of(self, backbone: BackboneSpec) -> str:
        """The protocol's name for one backbone."""
        return asked_protocol(self, backbone.pretrained, backbone.revision)

    def media(self, backbone: BackboneSpec) -> dict[str, Any]:
        """Pixel, frame and prompt settings for one backbone: the protocol's, with what the spec sets over them."""
        return asked_media(self, backbone.pretrained, backbone.revision)

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

    Seeds multiply only the methods that draw at random (those with an option `seed` that the spec leaves open), and all
    where answers are sampled. A budget of 1 is `full` and gets no cell of its own.
    """
    cells: list[CellSpec] = []
    budgets = [b for b in map(parse_budget, spec.budgets) if b != Share(1.0)]
    sampled = generation_arguments(spec.generation)["do_sample"]
    for backbone in spec.backbones:
        for task in spec.task_names():
            everything = [MethodSpec(name="full")] + [m for m in spec.methods if m.name != "full"]
            for method in everything:
                drawn = "seed" in options_of(method.name) and "seed" not in method.options
                for budget in [Share(1.0)] if method.name == "full" else budgets:
                    for seed in spec.seeds if drawn or sampled else spec.seeds[:1]:
                        given = {**({"seed": seed} if drawn else {}), **method.options}
                        options = resolve_options(method.name, given, backbone.pretrained)
                        cells.append(CellSpec(backbone, method.name, method.label, options, budget, task, seed))
    return cells


def load_spec(path: str | Path, overrides: Mapping[str, Any] | None = None) -> SweepSpec:
    """Read a spec from YAML; `overrides` (from flags) win.

    Raises:
        InputError: missing file, YAML that can't be parsed, unknown field (with the nearest existing one), wrong value.
    """
    try:
        data = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"spec '{path}' can't be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise InputError(f"spec '{path}' is not YAML: it is not text in UTF-8") from error
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


def make_method(data: Any) -> MethodSpec:
    """A checked method from its name or a mapping, with the same one-line errors as `make_spec`."""
    try:
        return MethodSpec.model_validate(data)
    except ValidationError as error:
        raise _readable(error) from error


@functools.lru_cache
def _family_protocol(pretrained: str, revision: str | None) -> str:
    from visionselector_eval.models.loading import default_protocol  # imports torch, which `list` need not wait for

    return default_protocol(pretrained, revision)


def _check_generation(key: str, value: Any) -> None:
    if key == "until":
        fits, wanted = isinstance(value, str) or _all(value, str), "a text or a list of texts"
    elif key == "do_sample":
        fits, wanted = isinstance(value, bool), "true or false"
    elif key in ("temperature", "top_p", "min_p", "repetition_penalty", "length_penalty"):
        fits, wanted = isinstance(value, int | float) and not isinstance(value, bool) and value >= 0, "a number >= 0"
    else:
        least = 1 if key in ("max_new_tokens", "num_beams") else 0
        fits = isinstance(value, int) and not isinstance(value, bool) and value >= least
        wanted = f"a whole number >= {least}"
    if not fits:
        raise InputError(f"invalid generation setting {key}={value!r}: expected {wanted}")


def _all(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)


def _first_repeated(values: Sequence[str]) -> str | None:
    return next((value for number, value in enumerate(values) if value in values[:number]), None)


def _readable(error: ValidationError) -> InputError:
    # A mistyped name first: that a needed field is missing is then only its consequence.
    first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
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
