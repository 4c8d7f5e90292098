"""`tasks fetch`: download the data of real tasks and write them in the layout that `--data-root` reads.

Resumable: a task whose documents and videos are there is left alone, downloads go through the hub's own cache, and what
is written appears complete, by a rename.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from visionselector_eval.baselines.contract.errors import InputError, one_line
from visionselector_eval.tasks.local import layout, upstream, videos
from visionselector_eval.tasks.suites import load_suites

log = logging.getLogger(__name__)

SHARD_BYTES = 500_000_000
"""Documents are written in files of about this size."""

_ROWS = 64  # read and written at once: images of some MB each must fit into memory
_ARCHIVES = ("*.zip", "*.tar", "*.tar.*", "*.tgz")
# Settings of upstream's task files that are about its own loader, or about where it keeps videos.
_OWN_KWARGS = {
    *("token", "video", "cache_dir", "create_link", "force_download", "force_unzip", "local_files_only"),
    *("From_YouTube", "builder_script", "max_retries", "num_proc", "video_subdir", "subtitle_subdir", "max_num_frames"),
}


class HubUnreachable(InputError):
    """No task can be downloaded from here; `tasks` are those that are still wanted."""

    def __init__(self, reason: str, tasks: Sequence[str]) -> None:
        super().__init__(
            f"the hub can't be reached ({reason}): fetch on a machine that can, and copy the folder; "
            f"its layout for {len(tasks)} task{'s' if len(tasks) > 1 else ''} is on standard output"
        )
        self.tasks = list(tasks)


class Hub:
    """The two things that we want of the hub, through its own libraries and their progress bars."""

    def dataset(self, path: str, name: str | None, split: str, **settings: Any) -> Any:
        """One split as a `datasets.Dataset`."""
        import datasets

        return datasets.load_dataset(path, name, split=split, **settings)

    def files(self, path: str, revision: str | None, patterns: Sequence[str]) -> Path:
        """A folder with those files of a data set's repository."""
        from huggingface_hub import snapshot_download

        return Path(snapshot_download(path, repo_type="dataset", revision=revision, allow_patterns=list(patterns)))


@dataclass(frozen=True)
class Fetched:
    """What became of one task.

    Attributes:
        state: "fetched" now; "there" before; "embedded", nothing to fetch; "failed", with the reason in `detail`.
    """

    task: str
    state: Literal["fetched", "there", "embedded", "failed"]
    detail: str


def fetch(
    names: Iterable[str], root: str | Path, *, hub: Hub | None = None, say: Callable[[str], None] = log.info
) -> list[Fetched]:
    """Download what is missing of these tasks (groups give one result for each member) to `root`.

    Args:
        hub: where data come from.
        say: is told what happens, line by line.

    Raises:
        HubUnreachable: before anything could be loaded, or in between. InputError: an unknown task, or a root that
            cannot be written. What concerns one task alone is its result, and the others continue.
    """
    hub = hub or Hub()
    folder = Path(root).expanduser().absolute()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"data root '{root}' can't be made: {error.strerror or error}") from error
    known = load_suites().tasks
    results = [
        Fetched(n, "embedded", "generated on first use")
        for n in names
        if (e := known.get(n)) is not None and e.mirror_of
    ]
    embedded = {r.task for r in results}
    expected = {of.task: of for name in names if name not in embedded for of in upstream.members(name)}
    left = list(expected)
    unpacked: set[tuple[str, str | None, str]] = set()
    for number, of in enumerate(expected.values(), 1):
        say(f"[{number}/{len(expected)}] {of.task}")
        try:
            results.append(_fetch(of, folder, hub, say, unpacked))
        except Exception as error:
            if (reason := _unreachable(error)) is not None:
                raise HubUnreachable(reason, left) from error
            log.debug("could not fetch %s", of.task, exc_info=True)
            results.append(Fetched(of.task, "failed", one_line(error, kind=True)))
        left.remove(of.task)
    return results


def _fetch(
    of: upstream.Upstream, root: Path, hub: Hub, say: Callable[[str], None], unpacked: set[tuple[str, str | None, str]]
) -> Fetched:
    local = layout.find(root, of.task, of.split, of.dataset_name)
    new = local is None
    if local is None:
        say(f"  documents: split {of.split} of {of.source}")
        settings = {k: v for k, v in of.kwargs.items() if k not in _OWN_KWARGS}
        rows = hub.dataset(of.dataset_path, of.dataset_name, of.split, **settings)
        images = None
        if of.joined and "image" not in rows.features:
            images = hub.dataset(of.dataset_path, _images_of(of), of.split, **settings)
        _write(rows, root / of.task, of, images)
    task = layout.locate(root, of.task)[0]
    documents = f"{task.local.n_documents()} documents"
    if (elsewhere := of.videos_elsewhere) is not None:
        detail = f"{documents}; its videos must be where lmms-eval looks for them, {elsewhere}"
        return Fetched(of.task, "fetched" if new else "there", detail)
    if task.videos is None:
        return Fetched(of.task, "fetched" if new else "there", documents)
    if None in task.videos.values():
        new = True
        key = (of.dataset_path, of.kwargs.get("revision"), of.family)
        if key not in unpacked:
            _fetch_videos(of, root / of.family / "videos", hub, say)
            unpacked.add(key)
        task = layout.locate(root, of.task)[0]
    videos = task.videos or {}
    if missing := [name for name, file in videos.items() if file is None]:
        places = " or ".join(map(str, task.video_folders))
        detail = f"{documents}, but {len(missing)} of {len(videos)} videos are not in {of.dataset_path}"
        return Fetched(of.task, "failed", f"{detail}, the first is '{missing[0]}': put them into {places}")
    return Fetched(of.task, "fetched" if new else "there", f"{documents}, {len(videos)} videos")


# --- documents -------------------------------------------------------------------------------------------------------


def _write(rows: Any, folder: Path, of: upstream.Upstream, images: Any = None) -> None:
    """`rows` as parquet files of `folder`, images inside; they appear when all are written.

    With `images` (`id`, `image`) the column `image` is added by `imageId`, as upstream's `process_docs` would.
    """
    import datasets
    import pyarrow.parquet
    from datasets.table import embed_table_storage

    folder.mkdir(parents=True, exist_ok=True)
    making = folder / f".fetching-{of.split}"
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir()
    plain, features = rows.with_format("arrow"), rows.features
    if images is not None:
        place = {key: number for number, key in enumerate(images["id"])}
        if lost := sorted(set(rows["imageId"]) - set(place)):
            raise InputError(f"{len(lost)} images are not in the data set of images, the first is {lost[0]}")
        features = datasets.Features({**features, "image": images.features["image"]})
        images = images.with_format("arrow")
    parts: list[Path] = []
    writer, size = None, 0
    try:
        for table in _progress(plain.iter(batch_size=_ROWS), f"{of.task}: writing", -(-len(rows) // _ROWS)):
            if images is not None:
                chosen = images.select([place[key] for key in table["imageId"].to_pylist()])
                table = table.append_column("image", chosen[:]["image"])
            # Some data sets of the hub name their images' files, which lie in a cache: take the contents along.
            table = embed_table_storage(table.cast(features.arrow_schema))
            if writer is None or size >= SHARD_BYTES:
                if writer is not None:
                    writer.close()
                parts.append(making / f"{len(parts):05d}.parquet")
                writer, size = pyarrow.parquet.ParquetWriter(parts[-1], table.schema), 0
            writer.write_table(table)
            size += table.nbytes
    finally:
        if writer is not None:
            writer.close()
    if not parts:
        raise InputError(f"split {of.split} of {of.dataset_path} has no documents")
    for number, part in enumerate(parts):
        single = f"{of.split}.parquet"
        several = f"{of.split}-{number:05d}-of-{len(parts):05d}.parquet"
        os.replace(part, folder / (single if len(parts) == 1 else several))
    source = {
        "dataset_path": of.dataset_path,
        "dataset_name": of.dataset_name,
        "split": of.split,
        "revision": of.kwargs.get("revision"),
        "fingerprint": rows._fingerprint,
        "documents": len(rows),
    }
    (folder / "source.json").write_text(json.dumps(source, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(making)


def _images_of(of: upstream.Upstream) -> str:
    # gqa: the subset of the instructions has one of the same name with the images.
    return str(of.dataset_name).replace("_instructions", "_images")


# --- videos ----------------------------------------------------------------------------------------------------------


def _fetch_videos(of: upstream.Upstream, folder: Path, hub: Hub, say: Callable[[str], None]) -> None:
    """Video files and the contents of archives of a task's repository below `folder`.

    An archive `a/b.zip` becomes the folder `a/b/`, because archives of one repository may hold files of one name.
    """
    say(f"  videos: {of.dataset_path}, unpacked to {folder}")
    patterns = [f"*{suffix}" for suffix in videos.VIDEO_SUFFIXES]
    source = hub.files(of.dataset_path, of.kwargs.get("revision"), [*_ARCHIVES, *patterns])
    folder.mkdir(parents=True, exist_ok=True)
    archives: dict[Path, list[Path]] = {}
    for file in sorted(p for p in source.rglob("*") if p.is_file()):
        inside = file.relative_to(source)
        if inside.suffix in videos.VIDEO_SUFFIXES:
            _place(file, folder / inside)
        elif inside.suffix == ".zip" or re.search(r"\.(tar(\..*)?|tgz)$", inside.name):
            # Parts of one tar archive: x_1.tar, x_2.tar or x.tar.part.aa, as upstream joins them.
            stem = re.sub(r"\.(zip|tgz|tar(\..*)?)$", "", inside.name)
            if inside.suffix != ".zip":
                stem = re.sub(r"_\d+$", "", stem)
            archives.setdefault(inside.parent / stem, []).append(file)
    for name, parts in archives.items():
        target = folder / name
        if target.is_dir():
            continue
        making = target.with_name(f".unpacking-{target.name}")
        shutil.rmtree(making, ignore_errors=True)
        making.mkdir(parents=True)
        _unpack(parts, making, f"{of.task}: unpacking {name}")
        making.rename(target)


def _place(file: Path, target: Path) -> None:
    """`file` (a link into the hub's cache) at `target` as a file of its own, without a second copy where possible."""
    if target.exists():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    making = target.with_name(f".placing-{target.name}")
    making.unlink(missing_ok=True)
    try:
        os.link(file.resolve(), making)
    except OSError:  # another file system
        shutil.copyfile(file, making)
    making.rename(target)


def _unpack(parts: Sequence[Path], folder: Path, label: str) -> None:
    try:
        if parts[0].suffix == ".zip":
            for part in parts:
                with zipfile.ZipFile(part) as archive:
                    for item in _progress(archive.infolist(), label, None):
                        archive.extract(item, folder)  # drops `..` and leading slashes by itself
            return
        whole = [[p] for p in parts] if all(tarfile.is_tarfile(p) for p in parts) else [list(parts)]
        for group in whole:
            with _Joined(group) as stream, tarfile.open(fileobj=stream, mode="r|*") as tar:  # type: ignore[call-overload]
                for member in _progress(tar, label, None):
                    tar.extract(member, folder, filter="data")
    except (zipfile.BadZipFile, tarfile.TarError, EOFError) as error:
        raise InputError(
            f"archive {parts[0].name} is damaged ({one_line(error, kind=True)}): delete it from the hub's cache"
        ) from error


class _Joined:
    """Several files read as one."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._left = list(files)
        self._open: IO[bytes] | None = None

    def __enter__(self) -> _Joined:
        return self

    def __exit__(self, *_: object) -> None:
        if self._open is not None:
            self._open.close()

    def read(self, size: int) -> bytes:
        """Up to `size` bytes; fewer at the end alone."""
        got = b""
        while len(got) < size:
            if self._open is None:
                if not self._left:
                    break
                self._open = self._left.pop(0).open("rb")
            block = self._open.read(size - len(got))
            if not block:
                self._open.close()
                self._open = None
            got += block
        return got


def render(results: Sequence[Fetched]) -> str:
    """What became of each task, as a table."""
    from tabulate import tabulate

    rows = [[r.task, r.state, r.detail] for r in results]
    return tabulate(rows, ["task", "state", ""], disable_numparse=True)


def layouts(names: Iterable[str], root: str | Path) -> str:
    """The files that these tasks want below `root`."""
    known = load_suites().tasks
    return "\n".join(
        f"{name}: embedded, generated on first use"
        if name in known and known[name].mirror_of
        else layout.layout(name, root)
        for name in names
    )


# --- words -----------------------------------------------------------------------------------------------------------


def _progress(items: Iterable[Any], label: str, total: int | None) -> Iterator[Any]:
    from tqdm import tqdm

    yield from tqdm(items, desc=label, total=total, disable=not sys.stderr.isatty(), leave=False)


def _unreachable(error: BaseException) -> str | None:
    """Why the hub itself is out of reach, or None for an error of another kind."""
    from huggingface_hub.errors import LocalEntryNotFoundError

    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, ConnectionError | LocalEntryNotFoundError):
            return one_line(seen, kind=True)
        if type(seen).__module__.startswith("httpx") and type(seen).__name__.endswith(
            ("ConnectError", "Timeout", "TimeoutException", "ProxyError", "NetworkError")
        ):
            return one_line(seen, kind=True)
        seen = seen.__cause__
    return None
