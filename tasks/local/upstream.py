"""Where lmms-eval's task files say that data is, read without running any code of a task."""

from __future__ import annotations

import ast
import contextlib
import functools
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from visionselector_eval.baselines.contract.errors import InputError, unknown
from visionselector_eval.tasks import lmms
from visionselector_eval.tasks.suites import load_suites

# Functions of upstream that return the path of one video file, and the column that names it. Only these are replaced
# by a look-up below the data root; a function that does more (cuts frames, adds subtitles) stays as it is.
_VIDEO_COLUMNS = {
    "activitynetqa_doc_to_visual": "video_name",
    "egoschema_doc_to_visual": "video_idx",
    "longvideobench_doc_to_visual_v": "video_path",
    "mlvu_doc_to_visual_dev": "video_name",
    "mlvu_doc_to_visual_test": "video_name",
    "mvbench_doc_to_visual": "video",
    "nextqa_doc_to_visual": "video",
    "tempcompass_doc_to_visual": "video_id",
    "videochatgpt_doc_to_visual": "video_name",
    "videomme_doc_to_visual": "videoID",
    "worldqa_doc_to_visual": "video_idx",
}


# What upstream's code reads of a document, for the tasks of our suites and two more. A test asks upstream's functions.
_COLUMNS = {
    "docvqa_val": "question answers image",
    "chartqa": "type question answer image",
    "textvqa_val": "question_id question answers image",
    "ocrbench": "dataset question question_type answer image",
    "scienceqa_img": "question choices answer hint image",
    "ai2d_no_mask": "question options answer image",
    "mmmu_val": "id question options question_type answer image_1",
    "mme": "question_id question answer category image",
    "pope": "question_id question answer image",
    "gqa": "question answer image",
    "vqav2_val": "question_id question answers image",
    "vizwiz_vqa_val": "question_id question answers image",
    "mmbench_en_dev_static": "index question A B answer hint category L2-category source split image",
    "mmbench_cn_dev": "index question A B answer hint category L2-category source split image",
    "seedbench": "question_id question choice_a choice_b choice_c choice_d answer data_type image",
    "videomme": "videoID question options answer question_id duration domain sub_category task_type",
    "nextqa_mc_test": "video question a0 a1 a2 a3 a4 answer",
    "mvbench_": "video question candidates answer",  # every member of the group
    "mlvu_dev": "video_name question answer task_type",
    "longvideobench_val_v": "id video_path question option0 option1 correct_choice duration_group question_category",
}


# A task whose image column upstream joins from a second data set of the hub, in `process_docs`. Our files have the
# joined column.
_JOINS = ("gqa_process_docs",)


# Keys of a group's file that are about the group; all others go to its members.
_GROUP_KEYS = ("group", "group_alias", "task", "aggregate_metric_list", "metadata", "tag")


class _Function(str):
    """`!function module.name` of a task file, not imported; `file` is the module's."""

    file: Path

    @property
    def name(self) -> str:
        return self.rpartition(".")[2]


class _Reader(yaml.FullLoader):
    """Reads task files without importing the code that they name (some of it downloads, some needs extra packages)."""

    folder: Path


def _function(reader: _Reader, node: yaml.ScalarNode) -> _Function:
    made = _Function(node.value)
    made.file = reader.folder / (made.rpartition(".")[0].replace(".", "/") + ".py")
    return made


_Reader.add_constructor("!function", _function)


@dataclass(frozen=True)
class Upstream:
    """Where upstream has the data of one task, from its task file.

    Attributes:
        task: lmms-eval's name.
        family: the folder of upstream's tasks that it is defined in, e.g. "mvbench".
        dataset_path, dataset_name: repository and subset on the hub.
        split: the one that is asked.
        kwargs: `dataset_kwargs` of the task file.
        video_column: the column that names a document's video file, where we know it; see `videos_elsewhere`.
        joined: the image column is joined from a second data set of the hub.
        config: the task file, with its includes.
        extra: what a group changes in it.
    """

    task: str
    family: str
    dataset_path: str
    dataset_name: str | None
    split: str
    kwargs: Mapping[str, Any]
    video_column: str | None
    joined: bool
    config: Mapping[str, Any] = field(repr=False)
    extra: Mapping[str, Any] = field(default_factory=dict, repr=False)

    @property
    def source(self) -> str:
        """The data set on the hub, for people."""
        return self.dataset_path + (f" (subset {self.dataset_name})" if self.dataset_name else "")

    @property
    def needs_videos(self) -> bool:
        """Whether the documents name video files that lie outside the data set."""
        return bool(self.kwargs.get("video"))

    @property
    def videos_elsewhere(self) -> Path | None:
        """The folder in which upstream's own code looks for the videos.

        For a task whose code does more with them than open a file; they are not looked for below a data root.
        """
        if not self.needs_videos or self.video_column is not None:
            return None
        from huggingface_hub.constants import HF_HOME

        return Path(os.environ.get("HF_HOME", HF_HOME)).expanduser() / str(self.kwargs.get("cache_dir", ""))

    @property
    def video_folder(self) -> str:
        """Upstream's own folder of this task's videos below the benchmark's (MVBench's subtasks have one each)."""
        settings = self.config.get("lmms_eval_specific_kwargs") or {}
        sub_task = (settings.get("default") or {}).get("sub_task")
        function = self.config.get("doc_to_visual")
        if not sub_task or not isinstance(function, _Function):
            return ""
        return str(_table(function.file, "DATA_LIST").get(sub_task, ""))

    @property
    def columns(self) -> list[str]:
        """Columns that upstream's code reads, where we know them."""
        names = _COLUMNS.get(self.task) or next(
            (v for k, v in _COLUMNS.items() if k.endswith("_") and self.task.startswith(k)), ""
        )
        return names.split()

    @property
    def code(self) -> list[Path]:
        """The modules that the task file names."""
        found = {f.file: None for f in _functions(self.config)}
        return [file for file in found if file.is_file()]


def _functions(value: Any) -> Iterator[_Function]:
    if isinstance(value, _Function):
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from _functions(item)
    elif isinstance(value, list):
        for item in value:
            yield from _functions(item)


@functools.cache
def _table(file: Path, name: str) -> dict[str, Any]:
    """A literal dict that a module assigns to `name`, without running the module."""
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and any(isinstance(t, ast.Name) and t.id == name for t in node.targets):
            with contextlib.suppress(ValueError):
                return dict(ast.literal_eval(node.value))
    return {}


@functools.cache
def _task_file(path: Path) -> dict[str, Any]:
    reader = _Reader(path.read_text(encoding="utf-8"))
    reader.folder = path.parent
    try:
        own = dict(reader.get_single_data() or {})
    finally:
        reader.dispose()
    includes = own.pop("include", [])
    merged: dict[str, Any] = {}
    for include in reversed([includes] if isinstance(includes, str) else includes):
        merged.update(_task_file(path.parent / include))  # an absolute path replaces the folder
    return {**merged, **own}


def upstream(task: str, extra: Mapping[str, Any] | None = None) -> Upstream:
    """Where lmms-eval has the data of a single task (not a group); imports none of the task's own code.

    `extra` replaces keys of the task file, as a group does for its members. Raises `InputError` for a name that is no
    single task, and for a task whose data do not come from a data set of the hub.
    """
    index = lmms.task_manager("").task_index
    known = index.get(task)
    if known is None:
        raise unknown("task", task, load_suites().tasks)
    if known["type"] != "task":
        raise InputError(f"'{task}' is no single task of lmms-eval whose data can be placed in a folder")
    path = Path(known["yaml_path"])
    config = {**_task_file(path), **(extra or {})}
    split = config.get("test_split") or config.get("validation_split")
    if not config.get("dataset_path") or not split:
        raise InputError(f"task {task} names no data set or no split in its task file: it cannot take local data")
    folder = path.relative_to(lmms.lmms_eval().tasks_folder)
    visual, joiner = config.get("doc_to_visual"), config.get("process_docs")
    return Upstream(
        task=task,
        family=folder.parts[0],
        dataset_path=str(config["dataset_path"]),
        dataset_name=config.get("dataset_name"),
        split=str(split),
        kwargs=dict(config.get("dataset_kwargs") or {}),
        video_column=_VIDEO_COLUMNS.get(visual.name) if isinstance(visual, _Function) else None,
        joined=isinstance(joiner, _Function) and joiner.name in _JOINS,
        config=config,
        extra=dict(extra or {}),
    )


def group_file(name: str) -> dict[str, Any]:
    """What the file of a group of lmms-eval says; empty for a single task, a tag and a group without a file."""
    known = lmms.task_manager("").task_index.get(name)
    if known is None or known["type"] != "group" or known["yaml_path"] == -1:
        return {}
    return _task_file(Path(known["yaml_path"]))


def members(name: str) -> list[Upstream]:
    """The single tasks of a task, group or tag of lmms-eval, in upstream's order."""
    return [upstream(task, extra) for task, extra in _members(name, {})]


def _members(name: str, extra: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    known = lmms.task_manager("").task_index.get(name)
    if known is None or known["type"] == "task":
        yield name, extra
        return
    if known["type"] == "python_task":
        raise InputError(f"task {name} loads its data by code of its own: it cannot take local data")
    inside = known["task"]
    if config := group_file(name):
        inside = config["task"]
        extra = {**{k: v for k, v in config.items() if k not in _GROUP_KEYS}, **extra}
    if any(_functions(extra)):
        raise InputError(f"group {name} replaces code of its tasks: name the tasks one by one")
    for item in inside:
        if isinstance(item, Mapping):
            rest = {k: v for k, v in item.items() if k != "task"}
            yield from _members(str(item["task"]), {**rest, **extra})
        else:
            yield from _members(str(item), extra)
