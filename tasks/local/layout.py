"""Local data of the real tasks: where they lie below a data root, and how upstream's task files are pointed at them.

For clusters without a hub. Every task (each member of a group) has a folder of its own name:

- `<root>/<task>/<split>.parquet`, or shards `<split>-*.parquet`; also below `data/` or the subset's name, as in a
  clone of the hub's repository;
- `<root>/<task>/` as written by `save_to_disk`: a `DatasetDict` with the split, or the split alone;
- `<root>/<task>/<split>/metadata.jsonl` (or `.csv`) beside image files: an image folder of the datasets library;
- `<root>/<task>/videos/` or, shared by the tasks of one benchmark, `<root>/<benchmark>/videos/`: video files, flat or
  in upstream's sub folders.

They are looked for in this order. Columns and split names are upstream's (`layout` prints them); prompts, metrics and
post-processing stay upstream's own code, only the place of the data is replaced.
"""

from __future__ import annotations

import contextlib
import csv
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from visionselector_eval.baselines.contract.errors import InputError, one_line
from visionselector_eval.tasks.local.upstream import Upstream, members
from visionselector_eval.tasks.local.videos import Videos, video_folders


@dataclass(frozen=True)
class Local:
    """The documents of one split on disk.

    Attributes:
        kind: "parquet" files; the "disk" layout of `save_to_disk`; "images", an image folder with its metadata.
        folder: what was found.
        files: the parquet or Arrow files in order; for an image folder the metadata file.
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
        """Features of the documents (`datasets.Features`), images recognised."""
        import datasets

        with self._readable():
            if self.kind == "parquet":
                import pyarrow.parquet

                features = datasets.Features.from_arrow_schema(pyarrow.parquet.read_schema(self.files[0]))
                return datasets.Features({name: _image(feature) for name, feature in features.items()})
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
        """Image files that the metadata of an image folder name. Raises `InputError` for the first missing one."""
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
            raise InputError(
                f"task {self.task}: cannot read {self}: {one_line(error)}: copy or fetch it again"
            ) from error

    def override(self) -> dict[str, Any]:
        """Keys of a task file that make upstream's loader read these files."""
        if self.kind == "disk" and self.whole:
            return {"dataset_path": str(self.folder), "dataset_name": None, "dataset_kwargs": {"load_from_disk": True}}
        files = [str(f) for f in self.files]
        settings: dict[str, Any] = {}
        if self.kind == "parquet":
            # Without the datasets library's note in the file (written by pandas, say) images would stay raw bytes.
            settings["features"] = self.schema()
        elif self.kind == "images":
            files = [f"{self.folder}/**"]
        builder = {"parquet": "parquet", "disk": "arrow", "images": "imagefolder"}[self.kind]
        return {
            "dataset_path": builder,
            "dataset_name": None,
            "dataset_kwargs": {"data_files": {self.split: files}, **settings},
        }


def _image(feature: Any) -> Any:
    """`Image()` for a column that holds encoded images, as {bytes, path} or as bytes; else the feature itself."""
    import datasets

    if isinstance(feature, dict) and set(feature) == {"bytes", "path"}:
        return datasets.Image()
    if isinstance(feature, datasets.Value) and feature.dtype in ("binary", "large_binary"):
        return datasets.Image()
    if isinstance(feature, datasets.List | datasets.LargeList) and _image(feature.feature) is not feature.feature:
        return datasets.List(_image(feature.feature))
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


@dataclass(frozen=True)
class LocalTask:
    """One task bound to its local data.

    Attributes:
        upstream: what lmms-eval says.
        local: the documents.
        videos: file by the name that documents give (None: missing); None for a task without video files of its own.
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
            changed["process_docs"] = None  # its work is done: the image column is there
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


def locate(root: str | Path, name: str) -> list[LocalTask]:
    """Local data of every single task of `name` (a task, group or tag).

    Raises `InputError`, one line each: no such root, a task without data (with the paths that were looked for),
    missing columns, a split without documents, files that cannot be read, and undecodable images.
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
        if re.fullmatch(r"image(_\d+)?", column) and not _is_image(features[column]):
            raise InputError(
                f"task {of.task}: column {column} of {local} holds {_kind(features[column])}, not images: "
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


def _is_image(feature: Any) -> bool:
    import datasets

    return isinstance(getattr(feature, "feature", feature), datasets.Image)


def _kind(feature: Any) -> str:
    return str(getattr(feature, "dtype", None) or type(feature).__name__)


def _places(root: str | Path, of: Upstream) -> list[str]:
    folder = Path(root) / of.task
    return [
        str(folder / f"{of.split}.parquet"),
        str(folder / f"{of.split}-*.parquet"),
        f"{folder / of.split / 'state.json'} (save_to_disk)",
        f"{folder / of.split / 'metadata.jsonl'} (image folder)",
    ]


def layout(task: str, root: str | Path = "DATA_ROOT") -> str:
    """The files that `task` (each member of a group) needs below a data root, for people; several lines."""
    blocks = []
    for of in members(task):
        folder = Path(root) / of.task
        lines = [
            f"{of.task}: split {of.split} of {of.source}",
            f"  {folder / of.split}.parquet, or shards {of.split}-*.parquet, in this folder or its data/",
            f"  or {folder}/ as written by save_to_disk, with the split {of.split}",
            f"  or {folder / of.split}/metadata.jsonl (or .csv) beside the images: an image folder",
        ]
        if of.columns:
            lines.append(f"  columns: {', '.join(of.columns)}")
        if of.joined:
            lines.append("  (the column image is joined from the data set's images: `tasks fetch` does it)")
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
    """Keep the datasets library from reporting the use of a local loader to a server (3 s a task offline)."""
    import datasets

    counting = datasets.config.HF_UPDATE_DOWNLOAD_COUNTS
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    try:
        yield
    finally:
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = counting
