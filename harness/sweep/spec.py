"""What a sweep is: a grid of cells, from flags or YAML, checked before anything is loaded."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import AfterValidator, Field, field_validator, model_validator

from visionselector_eval.baselines.contract.budget import Budget, Share
from visionselector_eval.baselines.contract.errors import InputError, unknown
from visionselector_eval.baselines.contract.registry import options_of, resolve_options
from visionselector_eval.models.backbones import FAMILIES
from visionselector_eval.models.generation import GENERATION_KEYS, generation_arguments
from visionselector_eval.models.protocols import PROTOCOLS, media_fields, protocol_named
from visionselector_eval.models.settings import BudgetField, Flag, Settings
from visionselector_eval.models.tiny import TINY, embedded
from visionselector_eval.tasks.suites import check_limit, load_suites, suite


class MethodSpec(Settings):
    """A compressor with its options; in YAML a plain name, or a mapping `{name: divprune, upstream_exact: true}`."""

    subject = "the spec"

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


class BackboneSpec(Settings):
    """A checkpoint; in YAML a plain id, or a mapping `{pretrained: ..., revision: ...}`."""

    subject = "the spec"

    pretrained: str = Field(description="folder, hub id, or `tiny` for the embedded checkpoint")
    revision: str | None = Field(default=None, description="branch, tag or commit on the hub")

    @model_validator(mode="before")
    @classmethod
    def _short_form(cls, value: Any) -> Any:
        return {"pretrained": value} if isinstance(value, str) else value


def key_values(what: str, items: Sequence[str]) -> dict[str, Any]:
    """`KEY=VALUE` words of a command line as a mapping, values as YAML reads them: true, 3, 0.5, text.

    Raises:
        InputError: a word without a key or `=`; `what` says in the message what the words are.
    """
    pairs = {}
    for item in items:
        key, equals, value = item.partition("=")
        if not equals or not key:
            raise InputError(f"invalid {what} '{item}': expected KEY=VALUE")
        try:
            pairs[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            pairs[key] = value
    return pairs


def method_from_text(text: str) -> Any:
    """A method of a command line, `NAME` or `NAME:OPTION=VALUE,...`, as plain data for `MethodSpec`."""
    name, colon, options = text.partition(":")
    return {"name": name, "options": key_values(f"option of method {name}", options.split(","))} if colon else name


def _methods(words: Sequence[str]) -> list[Any]:
    return [method_from_text(word) for word in words]


def _metrics(words: Sequence[str]) -> dict[str, str]:
    return {task: str(name) for task, name in key_values("metric", words).items()}


def _generation_settings(words: Sequence[str]) -> dict[str, Any]:
    return key_values("generation setting", words)


METHODS_FLAG = Flag(metavar="NAME[:OPTION=VALUE,...]", parse=_methods)


AUTO = "auto"


def _known_protocol(name: str) -> str:
    if name != AUTO:
        protocol_named(name)
    return name


# How images, videos and prompts reach the model: the same flags wherever a command asks one.
ProtocolName = Annotated[
    str,
    AfterValidator(_known_protocol),
    Field(
        description="pixels, frames and prompts: "
        + "; ".join(f"{name} ({row.about})" for name, row in PROTOCOLS.items())
        + "; auto: checkpoint for the embedded `tiny`, else what the family's papers use: "
        + ", ".join(f"{family.protocol} for {family.about}" for family in FAMILIES.values()),
    ),
]
MinPixels = Annotated[
    int | None, Field(ge=1, description="smallest area of an image and of a frame, over the protocol's")
]
MaxPixels = Annotated[
    int | None, Field(ge=1, description="largest area of an image and of a frame, over the protocol's")
]
MaxNumFrames = Annotated[int | None, Field(ge=1, description="most frames of a video, over the protocol's")]
Fps = Annotated[float | None, Field(gt=0, description="frames a second to show; spread over the video when not given")]
SystemPrompt = Annotated[
    str | None, Field(description="first turn of every conversation, over the protocol's"), Flag(free_text=True)
]
Jpeg = Annotated[bool | None, Field(description="re-encode images as JPEG or not, over the protocol's")]
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


class SweepSpec(Settings):
    """A grid of cells: backbones x methods x budgets x tasks (x seeds), with everything that changes an answer."""

    subject = "the spec"

    name: str = Field(
        default="sweep", description="name of the run; its folder is runs/<name> unless `output` is given"
    )
    output: str | None = Field(default=None, description="folder of the run")
    backbones: Annotated[list[BackboneSpec], Flag(name="pretrained", metavar="PATH_OR_ID")] = Field(
        default_factory=lambda: [BackboneSpec(pretrained=TINY)], description="checkpoints", min_length=1
    )
    methods: Annotated[list[MethodSpec], METHODS_FLAG] = Field(
        default_factory=lambda: [
            MethodSpec(name=name)
            for name in ("visionselector", "visionzip", "divprune", "random", "uniform", "downsample")
        ],
        description="compressors; `full` is always run beside them",
        min_length=1,
    )
    budgets: list[BudgetField] = Field(
        default=[Share(0.3), Share(0.2), Share(0.1)],
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
    metric: Annotated[dict[str, str], Flag(metavar="TASK=NAME", parse=_metrics)] = Field(
        default_factory=dict,
        description="headline metric of a task, over that of suites.yaml or of the task's definition, e.g. "
        "{mmstar: average}; `tasks check` lists tasks whose headline is a guess",
    )
    generation: Annotated[dict[str, Any], Flag(metavar="KEY=VALUE", parse=_generation_settings)] = Field(
        default_factory=dict, description="over the tasks' own generation settings, e.g. {max_new_tokens: 16}"
    )

    @field_validator("budgets", "tasks", "methods", "backbones", "seeds", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return one_or_many(value)

    @field_validator("budgets", "seeds")
    @classmethod
    def _each_once(cls, value: list[Any]) -> list[Any]:
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
        check_labels(self.methods)
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
    budgets = [budget for budget in spec.budgets if budget != Share(1.0)]
    sampled = generation_arguments(spec.generation)["do_sample"]
    methods = [MethodSpec(name="full")] + [method for method in spec.methods if method.name != "full"]
    for backbone in spec.backbones:
        resolved = [(method, _options_by_seed(method, backbone, spec.seeds, sampled)) for method in methods]
        for task in spec.task_names():
            for method, by_seed in resolved:
                for budget in [Share(1.0)] if method.name == "full" else budgets:
                    for seed, options in by_seed.items():
                        cells.append(CellSpec(backbone, method.name, method.label, options, budget, task, seed))
    return cells


def _options_by_seed(
    method: MethodSpec, backbone: BackboneSpec, seeds: Sequence[int], sampled: bool
) -> dict[int, dict[str, Any]]:
    """A method's complete options for each seed that it is run with; one that draws nothing is run with the first."""
    drawn = "seed" in options_of(method.name) and "seed" not in method.options
    return {
        seed: resolve_options(method.name, {**({"seed": seed} if drawn else {}), **method.options}, backbone.pretrained)
        for seed in (seeds if drawn or sampled else seeds[:1])
    }


@functools.lru_cache
def _family_protocol(pretrained: str, revision: str | None) -> str:
    from visionselector_eval.models.loading import default_protocol  # imports torch, which `list` need not wait for

    return default_protocol(pretrained, revision)


def _check_generation(key: str, value: Any) -> None:
    if key == "until":
        fits, expected = isinstance(value, str) or _all(value, str), "a text or a list of texts"
    elif key == "do_sample":
        fits, expected = isinstance(value, bool), "true or false"
    elif key in ("temperature", "top_p", "min_p", "repetition_penalty", "length_penalty"):
        fits, expected = isinstance(value, int | float) and not isinstance(value, bool) and value >= 0, "a number >= 0"
    else:
        least = 1 if key in ("max_new_tokens", "num_beams") else 0
        fits = isinstance(value, int) and not isinstance(value, bool) and value >= least
        expected = f"a whole number >= {least}"
    if not fits:
        raise InputError(f"invalid generation setting {key}={value!r}: expected {expected}")


def _all(value: Any, kind: type) -> bool:
    return isinstance(value, list) and all(isinstance(item, kind) for item in value)


def one_or_many(value: Any) -> Any:
    """What was given for a list, as a list: one value alone stands for a list of it."""
    return [value] if isinstance(value, str | int | float | Mapping | Budget) else value


def check_labels(methods: Sequence[MethodSpec]) -> None:
    """Refuse methods that tables would call the same.

    Raises:
        InputError: naming the label.
    """
    if twice := _first_repeated([m.label for m in methods]):
        raise InputError(f"method '{twice}' is listed twice: give the two different options or labels")


def _first_repeated(values: Sequence[str]) -> str | None:
    return next((value for number, value in enumerate(values) if value in values[:number]), None)
