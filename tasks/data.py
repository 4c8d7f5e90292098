"""Local data of the real tasks: where they lie below a data root, and how upstream's task files are pointed at them.

For clusters without a hub. Every task (each member of a group) has a folder of its own name:

- `<root>/<task>/<split>.parquet`, or shards `<split>-*.parquet`; also below `data/` or the subset's name, as in a
  clone of the hub's repository;
- `<root>/<task>/` as written by `save_to_disk`: a `DatasetDict` with the split, or the split alone;
- `<root>/<task>/<split>/metadata.jsonl` (or `.csv`) beside picture files: an image folder of the datasets library;
- `<root>/<task>/videos/` or, shared by the tasks of one benchmark, `<root>/<benchmark>/videos/`: video files, flat or
  in upstream's sub folders.

They are looked for in this order. Columns and split names are upstream's (`layout` prints them); prompts, metrics and
post-processing stay upstream's own code, only the place of the data is replaced.
"""

from __future__ import annotations

import ast
import contextlib
import csv
import functools
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Literal

import yaml

from visionselector_eval.baselines.errors import InputError, unknown
from visionselector_eval.tasks import host
from visionselector_eval.tasks.suites import load_suites

__all__ = [
    "Local",
    "LocalTask",
    "Upstream",
    "Videos",
    "content_hash",
    "find",
    "layout",
    "locate",
    "members",
    "override_for",
    "root_folder",
    "upstream",
]

VIDEO_SUFFIXES = (".mp4", ".MP4", ".mkv", ".webm", ".avi", ".mov")

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

# A task whose picture column upstream joins from a second data set of the hub, in `process_docs`. Our files have the
# joined column.
_JOINS = ("gqa_process_docs",)

# Keys of a group's file that are about the group; all others go to its members.
_GROUP_KEYS = ("group", "group_alias", "task", "aggregate_metric_list", "metadata", "tag")

_BIG = 32 * 2**20  # bytes; files beyond are hashed in parts
_MIB = 2**20


# --- what upstream says ----------------------------------------------------------------------------------------------


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

    Attributes
    ----------
    task: lmms-eval's name. family: the folder of upstream's tasks that it is defined in, e.g. "mvbench".
    dataset_path, dataset_name: repository and subset on the hub. split: the one that is asked.
    kwargs: `dataset_kwargs` of the task file.
    video_column: the column that names a document's video file, where we know it; see `videos_elsewhere`.
    joined: the picture column is joined from a second data set of the hub.
    config: the task file, with its includes. extra: what a group changes in it.
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
        """The folder in which upstream's own code looks for the videos, for a task whose code does more with them than
        open a file; such videos are not looked for below a data root."""
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
    index = host.task_manager("").task_index
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
    folder = path.relative_to(host.lmms_eval().tasks_folder)
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
    known = host.task_manager("").task_index.get(name)
    if known is None or known["type"] != "group" or known["yaml_path"] == -1:
        return {}
    return _task_file(Path(known["yaml_path"]))


def members(name: str) -> list[Upstream]:
    """The single tasks of a task, group or tag of lmms-eval, in upstream's order."""
    return [upstream(task, extra) for task, extra in _members(name, {})]


def _members(name: str, extra: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    known = host.task_manager("").task_index.get(name)
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


# --- what lies below the root ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Local:
    """The documents of one split on disk.

    Attributes
    ----------
    kind: "parquet" files; the "disk" layout of `save_to_disk`; "images", an image folder with its metadata.
    folder: what was found. files: the parquet or Arrow files in order; for an image folder the metadata file.
    whole: for "disk", whether the folder is a `DatasetDict` (and not the split alone).
    """

    task: str
    split: str
    kind: Literal["parquet", "disk", "images"]
    folder: Path
    files: tuple[Path, ...]
    whole: bool = False

    def __str__(self) -> str:
        what = {"parquet": "parquet", "disk": "save_to_disk", "images": "image folder"}[self.kind]
        place = self.files[0] if self.kind != "disk" and len(self.files) == 1 else self.folder
        return f"{place} ({what}{f', {len(self.files)} files' if len(self.files) > 1 else ''})"

    def schema(self) -> Any:
        """Features of the documents (`datasets.Features`), pictures recognised."""
        import datasets

        with self._readable():
            if self.kind == "parquet":
                import pyarrow.parquet

                features = datasets.Features.from_arrow_schema(pyarrow.parquet.read_schema(self.files[0]))
                return datasets.Features({name: _picture(feature) for name, feature in features.items()})
            if self.kind == "disk":
                return datasets.load_from_disk(str(self.files[0].parent)).features
            first = next(iter(_metadata(self.files[0])), {})
        return datasets.Features(dict(_folder_column(name, value) for name, value in first.items()))

    def n_documents(self) -> int:
        """Number of documents, from footers and headers alone."""
        import datasets

        with self._readable():
            if self.kind == "parquet":
                import pyarrow.parquet

                return sum(pyarrow.parquet.read_metadata(file).num_rows for file in self.files)
            if self.kind == "disk":
                return len(datasets.load_from_disk(str(self.files[0].parent)))
            return sum(1 for _ in _metadata(self.files[0]))

    def column(self, name: str) -> list[Any]:
        """All values of one column; nothing else is read."""
        import datasets

        with self._readable():
            if self.kind == "parquet":
                import pyarrow.parquet

                return [v for f in self.files for v in pyarrow.parquet.read_table(f, columns=[name])[name].to_pylist()]
            if self.kind == "disk":
                return list(datasets.load_from_disk(str(self.files[0].parent)).select_columns([name])[name])
            return [row.get(name) for row in _metadata(self.files[0])]

    def media(self) -> list[Path]:
        """Picture files that the metadata of an image folder name. Raises `InputError` for the first missing one."""
        if self.kind != "images":
            return []
        found = []
        for number, row in enumerate(_metadata(self.files[0])):
            for name, value in row.items():
                if name == "file_name" or name.endswith(("_file_name", "_file_names")):
                    for item in value if isinstance(value, list) else [value]:
                        if item and not (file := self.folder / str(item)).is_file():
                            raise InputError(f"task {self.task}: {self.files[0]}, line {number + 1}: no file {file}")
                        if item:
                            found.append(file)
        return found

    @contextlib.contextmanager
    def _readable(self) -> Iterator[None]:
        try:
            yield
        except InputError:
            raise
        except Exception as error:  # pyarrow, json, csv and datasets each have their own
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise InputError(f"task {self.task}: cannot read {self}: {reason}: copy or fetch it again") from error

    def override(self) -> dict[str, Any]:
        """Keys of a task file that make upstream's loader read these files."""
        if self.kind == "disk" and self.whole:
            return {"dataset_path": str(self.folder), "dataset_name": None, "dataset_kwargs": {"load_from_disk": True}}
        files = [str(f) for f in self.files]
        settings: dict[str, Any] = {}
        if self.kind == "parquet":
            # Without the datasets library's note in the file (written by pandas, say) pictures would stay raw bytes.
            settings["features"] = self.schema()
        elif self.kind == "images":
            files = [f"{self.folder}/**"]
        builder = {"parquet": "parquet", "disk": "arrow", "images": "imagefolder"}[self.kind]
        return {
            "dataset_path": builder,
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {self.split: files}, **settings},
        }


def _picture(feature: Any) -> Any:
    """`Image()` for a column that holds encoded pictures, as {bytes, path} or as bytes; else the feature itself."""
    import datasets

    if isinstance(feature, dict) and set(feature) == {"bytes", "path"}:
        return datasets.Image()
    if isinstance(feature, datasets.Value) and feature.dtype in ("binary", "large_binary"):
        return datasets.Image()
    if isinstance(feature, datasets.List | datasets.LargeList) and _picture(feature.feature) is not feature.feature:
        return datasets.List(_picture(feature.feature))
    return feature


def _metadata(file: Path) -> Iterator[dict[str, Any]]:
    with file.open(encoding="utf-8", newline="") as lines:
        if file.suffix == ".csv":
            yield from csv.DictReader(lines)
            return
        for line in lines:
            if line.strip():
                yield json.loads(line)


def _folder_column(name: str, value: Any) -> tuple[str, Any]:
    """Name and feature that an image folder gives a column of its metadata."""
    import datasets

    if name == "file_name":
        return "image", datasets.Image()
    if name.endswith("_file_name"):
        return name.removesuffix("_file_name"), datasets.Image()
    if name.endswith("_file_names"):
        return name.removesuffix("_file_names"), datasets.List(datasets.Image())
    return name, datasets.Value("string") if not isinstance(value, list) else datasets.List(datasets.Value("string"))


def root_folder(root: str | Path) -> Path:
    """The data root as an absolute path; `InputError` where there is no such folder."""
    folder = Path(root).expanduser().absolute()
    if not folder.is_dir():
        raise InputError(f"data root '{root}' is not a folder: give the folder that has a folder for each task")
    return folder


def find(root: str | Path, task: str, split: str, subset: str | None = None) -> Local | None:
    """The documents of `task` below `root`, or None.

    `subset` is the data set's configuration name: a clone of a hub repository has a folder for it. Raises `InputError`
    for shards of which some are missing.
    """
    folder = Path(root) / task
    for place in (folder, folder / "data", *([folder / subset] if subset else [])):
        if (single := place / f"{split}.parquet").is_file():
            return Local(task, split, "parquet", place, (single,))
        if shards := sorted(place.glob(f"{split}-*.parquet")):
            _check_shards(task, shards)
            return Local(task, split, "parquet", place, tuple(shards))
    for place, whole in ((folder / split, (folder / "dataset_dict.json").is_file()), (folder, False)):
        if (state := place / "state.json").is_file():
            try:
                names = [item["filename"] for item in json.loads(state.read_text(encoding="utf-8"))["_data_files"]]
            except (ValueError, KeyError, TypeError) as error:
                raise InputError(f"task {task}: {state} is damaged: save or copy the data again") from error
            return Local(task, split, "disk", folder if whole else place, tuple(place / n for n in names), whole)
    for place in (folder / split, folder):
        for name in ("metadata.jsonl", "metadata.csv"):
            if (file := place / name).is_file():
                return Local(task, split, "images", place, (file,))
    return None


def _check_shards(task: str, shards: Sequence[Path]) -> None:
    numbered = [m for s in shards if (m := re.search(r"-(\d+)-of-(\d+)\.parquet$", s.name))]
    if not numbered:
        return
    totals = {int(m[2]) for m in numbered}
    have = {int(m[1]) for m in numbered}
    if len(numbered) < len(shards) or len(totals) > 1:
        raise InputError(f"task {task}: {shards[0].parent} mixes shards of different writings: keep those of one")
    if lost := sorted(set(range(next(iter(totals)))) - have):
        raise InputError(f"task {task}: shard {lost[0]} of {next(iter(totals))} is missing in {shards[0].parent}")


class Videos:
    """Video files below some folders, found by the name that a document gives.

    A name fits a file whose path ends with it, with or without one of the usual suffixes, so that files may lie flat
    or in upstream's sub folders. `prefer` is a sub folder that wins over others.
    """

    def __init__(self, folders: Iterable[Path], prefer: str = "", prefixes: Sequence[str] = ("",)) -> None:
        self.folders = list(folders)
        self._prefer, self._prefixes = prefer, prefixes
        self._by_name: dict[str, list[Path]] = {}
        for folder in self.folders:
            for parent, directories, files in os.walk(folder, followlinks=True):
                directories[:] = sorted(d for d in directories if not d.startswith("."))
                for name in sorted(files):
                    self._by_name.setdefault(name, []).append(Path(parent) / name)

    def __len__(self) -> int:
        return sum(map(len, self._by_name.values()))

    def find(self, value: Any) -> Path | None:
        """The file that `value` names, or None. Raises `InputError` when two different files fit equally well."""
        named = "" if value is None else str(value)
        if not PurePosixPath(named).name:
            return None
        for prefix in self._prefixes:
            for suffix in ("", *VIDEO_SUFFIXES):
                wanted = PurePosixPath(named).with_name(f"{prefix}{PurePosixPath(named).name}{suffix}").as_posix()
                hits = [p for p in self._by_name.get(PurePosixPath(wanted).name, ()) if _ends_with(p, wanted)]
                if hits:
                    return self._one(hits, wanted)
        return None

    def _one(self, hits: list[Path], wanted: str) -> Path:
        inside = ([p for p in hits if p.is_relative_to(folder)] for folder in self.folders)
        hits = next(h for h in inside if h)  # the task's own folder before the benchmark's
        exact = [folder / wanted for folder in self.folders if folder / wanted in hits]
        preferred = [p for p in hits if self._prefer and _ends_with(p, f"{self._prefer}/{wanted}")]
        best = preferred or exact or hits
        if len(best) > 1 and len({p.stat().st_size for p in best}) > 1:
            raise InputError(f"video {wanted} is ambiguous: {best[0]} and {best[1]} differ: keep one")
        return best[0]


def _ends_with(path: Path, tail: str) -> bool:
    return path.as_posix().endswith("/" + tail.lstrip("/"))


@dataclass(frozen=True)
class LocalTask:
    """One task bound to its local data.

    Attributes
    ----------
    upstream: what lmms-eval says. local: the documents. videos: file by the name that documents give (None: missing);
        None for a task without video files of its own.
    video_folders: where they were looked for.
    """

    upstream: Upstream
    local: Local
    videos: Mapping[str, Path | None] | None
    video_folders: tuple[Path, ...] = ()

    def override(self) -> dict[str, Any]:
        """Keys of the task file to replace, so that upstream's own task reads these data; see `binding.bind`."""
        changed = {**self.upstream.extra, **self.local.override()}
        if self.videos is not None:
            assert self.upstream.video_column is not None
            changed["doc_to_visual"] = _visual(self.upstream.video_column, dict(self.videos), self.video_folders)
        if self.upstream.joined:
            changed["process_docs"] = None  # its work is done: the picture column is there
        return changed


def _visual(column: str, videos: Mapping[str, Path | None], folders: Sequence[Path]) -> Callable[..., list[str]]:
    """`doc_to_visual` for videos that lie below a data root."""

    def doc_to_visual(doc: Mapping[str, Any], lmms_eval_specific_kwargs: Any = None) -> list[str]:
        file = videos.get(str(doc[column]))
        if file is None:
            where = " or ".join(map(str, folders))
            raise FileNotFoundError(f"video '{doc[column]}' is neither in {where} nor in a folder below")
        return [str(file)]

    return doc_to_visual


def video_folders(root: str | Path, of: Upstream) -> list[Path]:
    """Folders in which the videos of a task may lie, whether they exist or not."""
    return list(dict.fromkeys([Path(root) / of.task / "videos", Path(root) / of.family / "videos"]))


def locate(root: str | Path, name: str) -> list[LocalTask]:
    """Local data of every single task of `name` (a task, group or tag).

    Raises `InputError`, one line each: no such root, a task without data (with the paths that were looked for),
    missing columns, a split without documents, files that cannot be read, and pictures that are none.
    """
    folder = root_folder(root)
    shelves: dict[tuple[Any, ...], Videos] = {}
    return [_locate(folder, of, shelves) for of in members(name)]


def _locate(root: Path, of: Upstream, shelves: dict[tuple[Any, ...], Videos]) -> LocalTask:
    local = find(root, of.task, of.split, of.dataset_name)
    if local is None:
        raise InputError(f"task {of.task}: no data below {root}: looked for {', '.join(_places(root, of))}")
    if not local.n_documents():
        raise InputError(f"task {of.task} has no documents: {local} is empty")
    features = local.schema()
    if lacking := [c for c in of.columns if c not in features]:
        raise InputError(
            f"task {of.task}: {local} lacks the column{'s' if len(lacking) > 1 else ''} {', '.join(lacking)} "
            f"(it has {', '.join(features)})"
        )
    for column in of.columns:
        if re.fullmatch(r"image(_\d+)?", column) and not _is_picture(features[column]):
            raise InputError(
                f"task {of.task}: column {column} of {local} holds {_kind(features[column])}, not pictures: "
                "write it as datasets.Image()"
            )
    if of.video_column is None or not of.needs_videos:
        return LocalTask(of, local, None)
    if of.video_column not in features:
        raise InputError(f"task {of.task}: {local} lacks the column {of.video_column}, which names the videos")
    folders = tuple(f for f in video_folders(root, of))
    prefixes = ("v_", "") if of.family == "activitynetqa" else ("",)
    key = (folders, of.video_folder, prefixes)
    if key not in shelves:
        shelves[key] = Videos([f for f in folders if f.is_dir()], of.video_folder, prefixes)
    shelf = shelves[key]
    try:
        videos = {str(v): shelf.find(v) for v in local.column(of.video_column)}
    except InputError as error:
        raise InputError(f"task {of.task}: {str(error).removeprefix(f'task {of.task}: ')}") from error
    return LocalTask(of, local, videos, folders)


def _is_picture(feature: Any) -> bool:
    import datasets

    return isinstance(getattr(feature, "feature", feature), datasets.Image)


def _kind(feature: Any) -> str:
    return str(getattr(feature, "dtype", None) or type(feature).__name__)


def override_for(root: str | Path, task: str) -> dict[str, Any]:
    """Keys of the task file of a single task that point it at its data below `root`; see `binding.bind`."""
    if len(several := members(task)) > 1:
        raise InputError(f"'{task}' is a group: each of its {len(several)} tasks has data of its own")
    return locate(root, task)[0].override()


# --- hash ------------------------------------------------------------------------------------------------------------


def content_hash(found: Iterable[LocalTask]) -> str:
    """SHA-256 that names the documents: names, splits and contents of the files, not where they lie.

    A file up to 32 MiB counts whole; of a bigger one the size, the first and last MiB and a parquet file's footer,
    which holds the statistics of every column; of pictures and videos the size and both ends.
    """
    sha = hashlib.sha256()
    for task in sorted(found, key=lambda t: t.upstream.task):
        sha.update(f"{task.upstream.task}\0{task.local.split}\0{task.local.kind}\0".encode())
        for file in task.local.files:
            _hash_file(sha, file, whole=_BIG, part=_MIB)
        for file in task.local.media():
            sha.update(file.relative_to(task.local.folder).as_posix().encode())
            _hash_file(sha, file, whole=2**18, part=2**16)
        for name, video in sorted((task.videos or {}).items()):
            sha.update(f"\0{name}\0".encode())
            if video is None:
                sha.update(b"missing")
            else:
                _hash_file(sha, video, whole=2**18, part=2**16)
    return sha.hexdigest()


def _hash_file(sha: Any, file: Path, whole: int, part: int) -> None:
    size = file.stat().st_size
    sha.update(f"\0{size}\0".encode())
    with file.open("rb") as data:
        if size <= whole:
            while block := data.read(_MIB):
                sha.update(block)
            return
        sha.update(data.read(part))
        tail = part
        if file.suffix == ".parquet":
            data.seek(-8, os.SEEK_END)
            tail = max(part, int.from_bytes(data.read(4), "little") + 8)
        data.seek(-min(tail, size), os.SEEK_END)
        sha.update(data.read())


# --- words -----------------------------------------------------------------------------------------------------------


def _places(root: str | Path, of: Upstream) -> list[str]:
    folder = Path(root) / of.task
    return [
        str(folder / f"{of.split}.parquet"),
        str(folder / f"{of.split}-*.parquet"),
        f"{folder / of.split / 'state.json'} (save_to_disk)",
        f"{folder / of.split / 'metadata.jsonl'} (image folder)",
    ]


def layout(task: str, root: str | Path = "DATA_ROOT") -> str:
    """The files that `task` (each member of a group) wants below a data root, for people; several lines."""
    blocks = []
    for of in members(task):
        folder = Path(root) / of.task
        lines = [
            f"{of.task}: split {of.split} of {of.source}",
            f"  {folder / of.split}.parquet, or shards {of.split}-*.parquet, in this folder or its data/",
            f"  or {folder}/ as written by save_to_disk, with the split {of.split}",
            f"  or {folder / of.split}/metadata.jsonl (or .csv) beside the pictures: an image folder",
        ]
        if of.columns:
            lines.append(f"  columns: {', '.join(of.columns)}")
        if of.joined:
            lines.append("  (the column image is joined from the data set's pictures: `tasks fetch` does it)")
        if (elsewhere := of.videos_elsewhere) is not None:
            lines.append(f"  videos: where lmms-eval looks for them, {elsewhere}")
        elif of.needs_videos:
            first, *shared = video_folders(root, of)
            below = f"{of.video_folder}/" if of.video_folder else ""
            places = " or ".join(f"{f}/" for f in [first, *shared])
            lines.append(
                f"  videos: {places}, named as in column {of.video_column} (suffix .mp4 may be left out there), "
                f"flat or in folders below{f' such as {below}' if below else ''}"
            )
        blocks.append("\n".join(lines))
    return "\n".join(blocks)


@contextlib.contextmanager
def no_use_reports() -> Iterator[None]:
    """Keep the datasets library from reporting the use of a local loader to a server: without a network that costs up
    to 3 s a task."""
    import datasets

    counting = datasets.config.HF_UPDATE_DOWNLOAD_COUNTS
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    try:
        yield
    finally:
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = counting
