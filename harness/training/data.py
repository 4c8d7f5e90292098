"""Makes training data: the published recipe's subsets of Cambrian-737K, and conversations from the embedded benchmarks.

Recipe: ChartQA, OCR-VQA and a tenth of COCO train Qwen2.5-VL's scorer, TextVQA and OCR-VQA that of LLaVA-OneVision-1.5
(arXiv 2510.16598).
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import IO, Any

from tabulate import tabulate

from visionselector_eval.baselines.contract.errors import InputError
from visionselector_eval.models.training.records import MediaPaths

# Cambrian-737K ----------------------------------------------------------------------------------------------------

SOURCES = {"ocrvqa": "ocr_vqa", "chartqa": "chartqa", "textvqa": "textvqa", "coco": "coco"}
"""A folder of an image's path, in lower case and without other signs than letters and digits -> name of the file."""

Advance = Callable[[int], None]
"""Told how many bytes (or documents) were done."""


@dataclass
class SourceReport:
    """One subset: `records` found, `chosen` of them, `missing` whose images are not there, `written` the rest."""

    records: int = 0
    chosen: int = 0
    missing: int = 0
    written: int = 0


@dataclass
class CambrianReport:
    """What `prepare_cambrian` did.

    Attributes:
        folder: with the files.
        sources: by name.
        other: records of other subsets.
        damaged: lines that are no record.
    """

    folder: Path
    sources: dict[str, SourceReport]
    other: int = 0
    damaged: int = 0
    examples: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Whether every subset that the file holds has records with images."""
        return all(report.written for report in self.sources.values() if report.records)

    def render(self) -> str:
        """The report as text."""
        rows = [[n, r.records, r.chosen, r.missing, r.written] for n, r in self.sources.items()]
        lines = [tabulate(rows, ["subset", "records", "chosen", "image missing", "written"])]
        lines.append(f"\n{self.other} records of other subsets, {self.damaged} damaged lines")
        if self.examples:
            lines.append(f"first missing: {self.examples[0]} (all: {self.folder / 'missing.jsonl'})")
        return "\n".join([*lines, f"files: {self.folder}"])


def source_of(image: str) -> str | None:
    """The subset that an image path of Cambrian-737K belongs to, None for those that the recipe does not use."""
    for part in Path(image).parts[:-1]:
        if (name := re.sub(r"[^a-z0-9]", "", part.lower())) in SOURCES:
            return SOURCES[name]
    return None


def prepare_cambrian(
    file: str | Path,
    image_root: str | Path,
    output: str | Path,
    *,
    coco_share: float = 0.1,
    seed: int = 42,
    advance: Advance | None = None,
) -> CambrianReport:
    """Split Cambrian737k.jsonl into ocr_vqa.jsonl, chartqa.jsonl, textvqa.jsonl and coco.jsonl.

    The file is read line by line. Lines are written as they stand, COCO's in a seeded choice of exactly
    `round(coco_share * n)`, in the order of the file. Records whose image is not there are left out and listed in
    missing.jsonl; report.json counts everything. Long because it is one pass over the file, with all that it counts.

    Args:
        image_root: folder that the records' image paths start from.
        advance: told of bytes read.

    Raises:
        InputError: a file or folder that can't be used, a share outside (0, 1].
    """
    source, root, folder = Path(file), Path(image_root), Path(output)
    if not source.is_file():
        raise InputError(f"'{source}' not found: give Cambrian737k.jsonl")
    if not root.is_dir():
        raise InputError(f"invalid image_root '{root}': expected the folder that the images' paths start from")
    if not 0 < coco_share <= 1:
        raise InputError(f"invalid coco_share {coco_share}: expected a ratio, 0 < ratio <= 1")
    paths = MediaPaths(root)
    report = CambrianReport(folder, {name: SourceReport() for name in SOURCES.values()})
    coco: list[tuple[int, int]] = []  # byte offset and line number
    with _files(folder, [*SOURCES.values(), "missing"]) as out, source.open("rb") as lines:
        write = partial(_write_record, report, out, lambda image, where: paths.resolve(image, source, where).is_file())
        at = 0
        for number, line in enumerate(lines, 1):
            if line.strip():
                images = _images(line)
                if images is None:
                    report.damaged += 1
                elif (name := source_of(images[0]) if images else None) is None:
                    report.other += 1
                else:
                    report.sources[name].records += 1
                    if name == "coco":
                        coco.append((at, number))
                    else:
                        write(name, line, number, images)
            at += len(line)
            if advance is not None:
                advance(len(line))
        chosen = sorted(random.Random(seed).sample(range(len(coco)), round(coco_share * len(coco))))
        for index in chosen:
            offset, number = coco[index]
            lines.seek(offset)
            line = lines.readline()
            write("coco", line, number, _images(line) or [])
    summary = {
        "source": str(source),
        "coco_share": coco_share,
        "seed": seed,
        "subsets": {name: vars(counts) for name, counts in report.sources.items()},
        "other": report.other,
        "damaged": report.damaged,
    }
    (folder / "report.json").write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return report


def _write_record(
    report: CambrianReport,
    out: Mapping[str, IO[bytes]],
    is_there: Callable[[str, str], bool],
    name: str,
    line: bytes,
    number: int,
    images: Sequence[str],
) -> None:
    """Write a record to its subset's file, or to that of missing ones where an image of it is not there."""
    counts = report.sources[name]
    counts.chosen += 1
    for image in images:
        try:
            available = is_there(image, f"line {number}")
        except InputError:
            available = False
        if not available:
            counts.missing += 1
            out["missing"].write(json.dumps({"subset": name, "line": number, "image": image}).encode() + b"\n")
            if len(report.examples) < 5:
                report.examples.append(f"{image} (line {number})")
            return
    counts.written += 1
    out[name].write(line.rstrip(b"\r\n") + b"\n")


def _images(line: bytes) -> list[str] | None:
    """Image paths of a record; empty for text alone, None where the line is no record."""
    try:
        record = json.loads(line)
    except ValueError:
        return None
    if not isinstance(record, dict):
        return None
    image = record.get("image") or record.get("images") or []
    images = image if isinstance(image, list) else [image]
    return images if all(isinstance(path, str) and path for path in images) else None


@contextmanager
def _files(folder: Path, names: Sequence[str]) -> Iterator[dict[str, IO[bytes]]]:
    """JSONL files to write; they appear when the block ends well."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            yield {name: stack.enter_context((folder / f".{name}.tmp").open("wb")) for name in names}
        for name in names:
            os.replace(folder / f".{name}.tmp", folder / f"{name}.jsonl")
    except OSError as error:
        raise InputError(f"output '{folder}' can't be written: {error.strerror or error}") from error
    finally:
        for name in names:
            (folder / f".{name}.tmp").unlink(missing_ok=True)


# Embedded benchmarks ----------------------------------------------------------------------------------------------

_BLOCK = 500  # documents drawn at once, so that memory does not grow with their number


@dataclass(frozen=True)
class MirrorReport:
    """What `write_mirrors` did: `file` with `samples` conversations; `left_out` documents that sweeps ask."""

    file: Path
    samples: int
    left_out: int


def image_digest(document: Any) -> str:
    """SHA-256 of what a document of an embedded benchmark shows, whatever is asked about it."""
    sha = hashlib.sha256()
    for pixels in document.images():
        sha.update(repr(pixels.shape).encode() + pixels.tobytes())
    return sha.hexdigest()


def evaluation_images(task: str) -> frozenset[str]:
    """Digests of the images that sweeps of an embedded benchmark show."""
    from visionselector_eval.tasks.tiny import EVALUATION_SEED, generate
    from visionselector_eval.tasks.tiny.store import DOCUMENTS

    return frozenset(image_digest(d) for d in generate(task, EVALUATION_SEED, DOCUMENTS))


def write_mirrors(
    tasks: Sequence[str],
    output: str | Path,
    *,
    seed: int,
    documents: int,
    base_model: str = "qwen2_5_vl",
    advance: Advance | None = None,
) -> MirrorReport:
    """Training conversations from the generators of embedded benchmarks, in the very words that sweeps ask.

    Writes train.jsonl, shuffled, and the images (PNG) and clips (MP4) beside it. No image that a sweep shows is
    among them: another seed draws others, and one that is equal all the same is left out.

    Args:
        tasks: names such as tiny_docvqa_val.
        seed: not the evaluation's, which is 0.
        documents: of each task, an even number where they come in pairs.
        base_model: lmms-eval's name of the model whose prompts are used.
        advance: told of documents written.

    Raises:
        InputError: an unknown task, the evaluation's seed, a folder that is not empty.
    """
    from visionselector_eval.tasks.tiny import EVALUATION_SEED, mirror

    if seed == EVALUATION_SEED:
        raise InputError(f"seed {seed} draws the documents that sweeps ask: train on another, e.g. 1000003")
    if documents < 1 or seed < 0:
        raise InputError(f"{documents} documents with seed {seed}: give whole numbers, documents >= 1, seed > 0")
    for task in tasks:
        mirror(task)
    folder = Path(output)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"output '{folder}' already exists: give a new or empty folder")
    lines: list[str] = []
    left_out = 0
    try:
        (folder / "media").mkdir(parents=True)
        for task in dict.fromkeys(tasks):
            taken = evaluation_images(task)
            for block, start in enumerate(range(0, documents, _BLOCK)):
                made, skipped = _block(
                    task, folder, seed + block, start, min(_BLOCK, documents - start), base_model, taken, advance
                )
                lines += made
                left_out += skipped
        random.Random(seed).shuffle(lines)
        file = folder / "train.jsonl"
        file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"output '{folder}' can't be written: {error.strerror or error}") from error
    return MirrorReport(file, len(lines), left_out)


def _block(
    task: str,
    folder: Path,
    seed: int,
    start: int,
    documents: int,
    base_model: str,
    taken: frozenset[str],
    advance: Advance | None,
) -> tuple[list[str], int]:
    from visionselector_eval.tasks.binding import bind, requests
    from visionselector_eval.tasks.tiny import generate

    lines, left_out = [], 0
    drawn = generate(task, seed, documents)
    with tempfile.TemporaryDirectory() as cache:
        bound = bind(task, base_model=base_model, cache_dir=cache, seed=seed, documents=documents)
        for request in requests(bound):
            document = drawn[request.doc_id]
            if image_digest(document) in taken:
                left_out += 1
            else:
                name = f"{task}-{start + request.doc_id:06d}"
                lines.append(json.dumps(_record(name, request.messages(), document.answer, folder)))
            if advance is not None:
                advance(1)
    return lines, left_out


def _record(name: str, messages: Sequence[Mapping[str, Any]], answer: str, folder: Path) -> dict[str, Any]:
    """One conversation; its media are written."""
    files: dict[str, list[str]] = {"image": [], "video": []}
    turns: list[dict[str, str]] = []
    for message in messages:
        content = message["content"]
        parts: list[dict[str, Any]] = [{"type": "text", "text": content}] if isinstance(content, str) else content
        text = ""
        for part in parts:
            kind = part["type"]
            if kind == "text":
                text += part["text"]
                continue
            path = f"media/{name}-{len(files[kind])}.{'png' if kind == 'image' else 'mp4'}"
            if kind == "image":
                part["image"].save(folder / path, "PNG")
            else:
                shutil.copyfile(part["video"], folder / path)
            files[kind].append(path)
            text += f"<{kind}>"
        turns.append({"from": "system" if message["role"] == "system" else "human", "value": text})
    turns.append({"from": "gpt", "value": answer})
    media = {kind: paths for kind, paths in files.items() if paths}
    return {"id": name, **media, "conversations": turns}
