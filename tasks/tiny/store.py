"""The cache of generated benchmarks: one folder a (mirror, generator version, seed, size), and lmms-eval task files.

Layout below the cache folder:

- `data/<mirror>-v<version>.<source hash>-s<seed>-n<size>/`: `data.parquet` (upstream's columns), `clips/` for a
  video mirror, `record.json` with the hash of the content and of every file. It appears complete, by one rename.
- `bindings/<hash>/<mirror>.yaml`: lmms-eval task files that include upstream's own and change nothing but where the
  data is. Named after their content, so that two environments sharing a cache do not disturb each other. The same
  folder serves the stock command line: `lmms-eval eval --include_path <folder> --tasks tiny_chartqa ...`.
- `hf/`: the Arrow copies that the datasets library makes.
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from visionselector_eval.baselines.contract.errors import InputError
from visionselector_eval.tasks.tiny import EVALUATION_SEED, GENERATOR_VERSION, Document, Mirror, generate, mirror
from visionselector_eval.tasks.tiny.clips import write_clip

DOCUMENTS = 64
"""Documents of a mirror unless asked otherwise."""

_MOST_PICTURES = 7  # of one MMMU question


@dataclass(frozen=True)
class Stored:
    """A generated benchmark on disk: `folder` with `data.parquet`, and `content_hash`, the hash of what is in it."""

    name: str
    folder: Path
    content_hash: str
    n_documents: int

    @property
    def parquet(self) -> Path:
        """The data file in upstream's column layout."""
        return self.folder / "data.parquet"


def default_cache_dir() -> Path:
    """`$VISIONSELECTOR_EVAL_CACHE`, else `visionselector-eval` in `$XDG_CACHE_HOME` or `~/.cache`."""
    if own := os.environ.get("VISIONSELECTOR_EVAL_CACHE"):
        return Path(own).expanduser()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser() / "visionselector-eval"


def content_hash(documents: Iterable[Document]) -> str:
    """SHA-256 over questions, answers and pixels, in order; independent of how files are encoded."""
    sha = hashlib.sha256()
    for document in documents:
        sha.update(document.digest().encode())
    return sha.hexdigest()


def ensure(
    name: str, *, seed: int = EVALUATION_SEED, n: int = DOCUMENTS, cache_dir: str | Path | None = None
) -> Stored:
    """The mirror `name` on disk, generated if it is not there yet.

    Safe to call from several processes at once: each makes its own copy and the first rename wins. Raises `InputError`
    for an unknown name or size, a cache folder that cannot be written, or cached files that someone has changed.
    """
    mirror(name)
    cache = Path(cache_dir).expanduser() if cache_dir is not None else default_cache_dir()
    folder = (cache / "data" / f"{name}-v{_version()}-s{seed}-n{n}").absolute()
    if not folder.exists():
        documents = generate(name, seed, n)
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=folder.parent, ignore_cleanup_errors=True) as tmp:
                made = Path(tmp) / "made"
                made.mkdir()
                _write(documents, made, mirror(name))
                try:
                    made.rename(folder)
                except OSError:
                    if not folder.exists():  # else another process was first, with the same content
                        raise
        except OSError as error:
            raise InputError(
                f"cannot write the cache folder {cache} ({error.strerror or error}): "
                "give a writable one (cache_dir, or VISIONSELECTOR_EVAL_CACHE)"
            ) from error
    return _open(name, folder, n)


@functools.cache
def _version() -> str:
    """The generators' version and a hash of their source: an edit without a new version must not find old images."""
    sources = sorted((f for f in files("visionselector_eval.tasks.tiny").iterdir() if f.name.endswith(".py")), key=str)
    sha = hashlib.sha256(b"".join(f.read_bytes() for f in sources if f.name != "store.py"))
    return f"{GENERATOR_VERSION}.{sha.hexdigest()[:8]}"


def _write(documents: list[Document], folder: Path, made_by: Mirror) -> None:
    import datasets
    import pyarrow.parquet

    plain = datasets.Dataset.from_list([d.row for d in documents]).features
    # A column without any value has no type of its own.
    columns = {k: datasets.Value("string") if getattr(f, "dtype", "") == "null" else f for k, f in plain.items()}
    rows = []
    if made_by.media == "clip":
        (folder / "clips").mkdir(exist_ok=True)
    for document in documents:
        row = dict(document.row)
        images = [] if made_by.media == "clip" else [_png(p) for p in document.images()]
        if made_by.media == "image":
            row["image"] = images[0]
        elif made_by.media == "images":
            row |= {f"image_{i + 1}": images[i] if i < len(images) else None for i in range(_MOST_PICTURES)}
        elif made_by.media == "frames":
            row["image"] = images
        else:
            assert document.frames is not None
            write_clip(folder / "clips" / clip_name(made_by, row), document.frames)
        rows.append(row)
    for name in set(rows[0]) - set(columns):
        columns[name] = datasets.List(datasets.Image()) if made_by.media == "frames" else datasets.Image()
    table = datasets.Dataset.from_list(rows, features=datasets.Features({k: columns[k] for k in rows[0]}))
    # Not `to_parquet`, which draws a progress bar.
    pyarrow.parquet.write_table(table.data.table, folder / "data.parquet")
    record = {
        "generator_version": GENERATOR_VERSION,
        "documents": len(documents),
        "content_sha256": content_hash(documents),
        "files": _file_hashes(folder),
    }
    (folder / "record.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


def _png(pixels: np.ndarray) -> dict[str, Any]:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=3)
    return {"bytes": buffer.getvalue(), "path": None}


def clip_name(made_by: Mirror, row: Mapping[str, Any]) -> str:
    """The file of a document's clip."""
    return f"{str(row[made_by.clip]).removesuffix('.mp4')}.mp4"


def _file_hashes(folder: Path) -> dict[str, str]:
    found = [p for p in sorted(folder.rglob("*")) if p.is_file() and p.name != "record.json"]
    return {p.relative_to(folder).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in found}


def _open(name: str, folder: Path, n: int) -> Stored:
    try:
        record = json.loads((folder / "record.json").read_text(encoding="utf-8"))
        intact = record["files"] == _file_hashes(folder) and record["documents"] == n
    except (OSError, ValueError, KeyError, TypeError):
        intact = False
    if not intact:
        raise InputError(
            f"the generated data of {name} were changed or damaged: delete {folder} to have them made again"
        )
    return Stored(name, folder, record["content_sha256"], n)


def write_bindings(
    names: Iterable[str], *, seed: int = EVALUATION_SEED, n: int = DOCUMENTS, cache_dir: str | Path | None = None
) -> Path:
    """A folder of lmms-eval task files for these mirrors (data generated if need be), for `--include_path`.

    Each file includes upstream's own by its path in the installed lmms-eval and overrides the data's location, the
    name, the metadata (which carries the content hash, so that lmms-eval's response cache sees it) and, for video,
    `doc_to_visual`.
    """
    cache = (Path(cache_dir).expanduser() if cache_dir is not None else default_cache_dir()).absolute()
    upstream = _upstream_tasks_folder()
    texts: dict[str, str] = {}
    for name in sorted(names):
        found, stored = mirror(name), ensure(name, seed=seed, n=n, cache_dir=cache)
        config = {
            "include": str(upstream / found.config),
            "task": name,
            "dataset_path": "parquet",
            "dataset_name": None,
            "dataset_kwargs": {
                "data_files": {found.split: str(stored.parquet)},
                "cache_dir": str(cache / "hf"),
            },
            "metadata": {"version": 0.0, "data_sha256": stored.content_hash},
            **found.changes,
        }
        # JSON is YAML; one key a line keeps the files readable.
        text = "".join(f"{key}: {json.dumps(value)}\n" for key, value in config.items())
        if found.media == "clip":
            # Upstream looks for videos below HF_HOME, fixed when its module is imported; ours lie beside the data.
            module = f"media_{name}"
            text += f"doc_to_visual: !function {module}.doc_to_visual\n"
            texts[f"{module}.py"] = (
                "from pathlib import Path\n\n"
                f"CLIPS = Path({str(stored.folder / 'clips')!r})\n\n\n"
                "def doc_to_visual(doc, lmms_eval_specific_kwargs=None):\n"
                f'    return [str(CLIPS / (str(doc["{found.clip}"]).removesuffix(".mp4") + ".mp4"))]\n'
            )
        texts[f"{name}.yaml"] = text
    digest = hashlib.sha256(json.dumps(texts, sort_keys=True).encode()).hexdigest()[:16]
    folder = cache / "bindings" / digest
    if not folder.exists():
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            made = Path(tempfile.mkdtemp(prefix=".making-", dir=folder.parent))
            for file_name, text in texts.items():
                (made / file_name).write_text(text, encoding="utf-8")
            made.chmod(0o755)
            try:
                made.rename(folder)
            except OSError:
                shutil.rmtree(made, ignore_errors=True)
                if not folder.exists():
                    raise
        except OSError as error:
            raise InputError(f"cannot write the cache folder {cache} ({error.strerror or error})") from error
    return folder


def _upstream_tasks_folder() -> Path:
    # Without importing lmms_eval, which takes seconds and changes logging for the whole process.
    from importlib.util import find_spec

    spec = find_spec("lmms_eval")
    if spec is None or not spec.submodule_search_locations:
        raise InputError("lmms-eval is not installed: pip install 'lmms-eval>=0.7.3,<0.8'")
    return Path(next(iter(spec.submodule_search_locations))) / "tasks"
