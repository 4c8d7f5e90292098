"""`doctor --suite`: are the data of these tasks there, and all that their code imports? Nothing is downloaded."""

from __future__ import annotations

import ast
import functools
import json
import os
import re
from collections.abc import Iterable, Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from visionselector_eval.baselines.contract.errors import InputError
from visionselector_eval.harness.doctor.machine import Check
from visionselector_eval.tasks import lmms
from visionselector_eval.tasks.local import layout, upstream, videos
from visionselector_eval.tasks.suites import load_suites

# Where the package that provides a module has another name.
_PACKAGES = {"cv2": "opencv-python-headless", "PIL": "pillow", "sklearn": "scikit-learn", "yaml": "pyyaml"}


def data_checks(names: Iterable[str], data_root: str | Path | None = None) -> list[Check]:
    """One check for each task (each member of a group): documents, videos and packages.

    Args:
        names: tasks, groups or tags.
        data_root: folder of local data; without it, what is in the caches counts.

    Raises:
        InputError: an unknown task, or a data root that is no folder.
    """
    root = layout.root_folder(data_root) if data_root is not None else None
    known = load_suites().tasks
    found = []
    for name in names:
        entry = known.get(name)
        if entry is not None and entry.mirror_of is not None:
            found.append(Check(name, True, "embedded: generated on first use"))
            continue
        found += [_check(of, root) for of in upstream.members(name)]
    return found


def _check(of: upstream.Upstream, root: Path | None) -> Check:
    remedies = []
    try:
        facts, remedy = _local(of, root) if root is not None else _cached(of)
        if remedy:
            remedies.append(remedy)
    except InputError as error:
        facts = [str(error).removeprefix(f"task {of.task}: ")]
        remedies.append(f"see `tasks layout --tasks {of.task}`")
    if lacking := missing_packages(of):
        facts.append(
            f"its code imports {', '.join(lacking)}, which {'are' if len(lacking) > 1 else 'is'} not installed"
        )
        remedies.append(f"pip install {' '.join(_PACKAGES.get(p, p) for p in lacking)}")
    return Check(of.task, not remedies, "; ".join(facts), "; ".join(remedies))


def _local(of: upstream.Upstream, root: Path) -> tuple[list[str], str]:
    (task,) = layout.locate(root, of.task)
    facts = [f"{task.local.n_documents()} documents in {task.local}"]
    if task.videos is None:
        return _upstream_videos(of, facts)
    places = " or ".join(map(str, task.video_folders))
    return _videos(of, facts, list(task.videos.items()), places)


def _cached(of: upstream.Upstream) -> tuple[list[str], str]:
    """What the datasets library would load without a network: a prepared copy in its cache."""
    copy = _prepared_copy(of)
    if copy is None:
        return [f"{of.source} is not in the cache of data sets"], (
            f"`tasks fetch --tasks {of.task} --data-root FOLDER` where a hub is reachable, then --data-root"
        )
    folder, documents = copy
    facts = [f"{documents} documents of {of.dataset_path} in the cache"]
    if not of.needs_videos or of.video_column is None:
        return _upstream_videos(of, facts)
    place = _hf_home() / str(of.kwargs.get("cache_dir", ""))
    shelf = videos.Videos([place] if place.is_dir() else [], of.video_folder)
    values = {str(v) for v in _column(folder, of.split, of.video_column)}
    return _videos(of, facts, [(v, shelf.find(v)) for v in sorted(values)], str(place))


def _videos(
    of: upstream.Upstream, facts: list[str], videos: list[tuple[str, Path | None]], places: str
) -> tuple[list[str], str]:
    missing = [name for name, file in videos if file is None]
    facts.append(f"{len(videos) - len(missing)} of {len(videos)} videos")
    if not missing:
        return facts, ""
    facts[-1] += f", the first missing is '{missing[0]}'"
    return facts, f"put the videos into {places}"


def _upstream_videos(of: upstream.Upstream, facts: list[str]) -> tuple[list[str], str]:
    """Videos that only upstream's own code can find: whether its folder is there is all that can be said."""
    if (place := of.videos_elsewhere) is None:
        return facts, ""
    there = place.is_dir()
    facts.append(f"its videos are read from {place}, which is {'there' if there else 'missing'}")
    return facts, "" if there else f"put the videos into {place}"


def _hf_home() -> Path:
    from huggingface_hub.constants import HF_HOME

    return Path(os.environ.get("HF_HOME", HF_HOME)).expanduser()


def _prepared_copy(of: upstream.Upstream) -> tuple[Path, int] | None:
    """Folder and number of documents of the newest prepared copy of a data set in the cache of the datasets library."""
    lmms.lmms_eval()
    from datasets.naming import camelcase_to_snakecase
    from lmms_eval.api.task import _resolve_hf_datasets_cache_dir

    owner, _, name = of.dataset_path.rpartition("/")
    place = Path(_resolve_hf_datasets_cache_dir()) / "___".join(filter(None, [owner, camelcase_to_snakecase(name)]))
    # Without a name the hub's default subset is meant, whatever it is called.
    records = sorted(place.glob(f"{of.dataset_name or '*'}/*/*/dataset_info.json"), key=lambda p: p.stat().st_mtime)
    for record in reversed(records):
        try:
            splits = json.loads(record.read_text(encoding="utf-8"))["splits"]
            return record.parent, int(splits[of.split]["num_examples"])
        except (OSError, ValueError, KeyError, TypeError):  # an unfinished or other copy
            continue
    return None


def _column(folder: Path, split: str, name: str) -> list[Any]:
    import datasets

    files = [f for f in sorted(folder.glob("*.arrow")) if re.search(rf"-{re.escape(split)}(-\d+-of-\d+)?$", f.stem)]
    return [v for f in files for v in datasets.Dataset.from_file(str(f)).select_columns([name])[name]]


# --- packages --------------------------------------------------------------------------------------------------------


def missing_packages(of: upstream.Upstream) -> list[str]:
    """Modules that upstream's code of a task imports at its top and that are not installed.

    Found in the source: running it would download things for some tasks. Imports inside `try` are optional.
    """
    expected = {name: None for file in of.code for name in _imports(file)}
    return [name for name in expected if find_spec(name) is None]


@functools.cache
def _imports(file: Path) -> tuple[str, ...]:
    """Top names of what a module imports, with those of the task modules of lmms-eval that it imports."""
    found: dict[str, None] = {}
    seen, left = set(), [file]
    while left:
        seen.add(module := left.pop(0))
        for name in _imported(module):
            top = name.partition(".")[0]
            if top != "lmms_eval":
                found[top] = None
            elif name.startswith("lmms_eval.tasks.") and (inner := _module_file(name)) not in {None, *seen}:
                left.append(inner)  # type: ignore[arg-type]
    return tuple(found)


def _imported(file: Path) -> Iterator[str]:
    for node in ast.parse(file.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            yield node.module


def _module_file(name: str) -> Path | None:
    path = lmms.lmms_eval().tasks_folder.joinpath(*name.split(".")[2:])
    return next((p for p in (path.with_suffix(".py"), path / "__init__.py") if p.is_file()), None)
