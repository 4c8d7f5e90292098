"""Training records in the published JSON and Parquet forms."""

from __future__ import annotations

import hashlib
import itertools
import json
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from visionselector_eval.baselines.contract.errors import InputError, one_line

_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "system": "system",
}


_MARKERS = {"image": "<image>", "video": "<video>"}


_COLUMNS = ("image", "question", "answer")


_SPLIT = "\x00"


@dataclass(frozen=True)
class MediaPaths:
    """How the paths in a JSONL file become files.

    Attributes:
        root: folder that relative paths start from; None for the folder of the JSONL file.
        policy: `relative` (paths below the root, nothing else) or `absolute` (absolute paths, nothing else).
    """

    root: Path | None = None
    policy: Literal["relative", "absolute"] = "relative"

    def resolve(self, path: str, file: Path, place: str) -> Path:
        """The file that `path` of a sample in `file` names; whether it exists is not looked at.

        Raises:
            InputError: a path that the policy does not allow.
        """
        given = Path(path)
        if self.policy == "absolute":
            if not given.is_absolute():
                raise InputError(
                    f"{place}: path '{path}' is relative, but image_paths=absolute: give image_paths=relative "
                    "(and image_root)"
                )
            return given
        if given.is_absolute():
            raise InputError(
                f"{place}: path '{path}' is absolute, but image_paths=relative: give image_paths=absolute, or paths "
                "below image_root"
            )
        if ".." in given.parts:
            raise InputError(f"{place}: path '{path}' leaves image_root: paths must stay below it")
        return (self.root if self.root is not None else file.parent) / given


@dataclass(frozen=True)
class Conversation:
    """One sample: messages in the form of transformers' chat templates, images and videos as paths or bytes.

    `place` is "file:line". Contents of assistant turns are plain text.
    """

    place: str
    messages: list[dict[str, Any]]

    def media(self) -> Iterator[tuple[str, Any]]:
        """("image" or "video", path or bytes) in order."""
        for message in self.messages:
            if not isinstance(message["content"], str):
                for part in message["content"]:
                    if part["type"] != "text":
                        yield part["type"], part[part["type"]]


def parse_record(record: Any, file: Path, place: str, paths: MediaPaths) -> Conversation:
    """A checked conversation from one JSON object.

    Two layouts: `conversations` (a list of {"from": "human" | "gpt" | "system", "value": text}) and `messages` (a list
    of {"role": "user" | "assistant" | "system", "content": text}). `image` (or `images`) and `video` (or `videos`) are
    a path or a list of paths; each stands where the text has `<image>` or `<video>`, and before the first question
    where the text has none. A line break behind a marker stays, as in the published data paths.

    Raises:
        InputError: a missing key, a turn that is no turn, markers that do not fit the media, a path against the policy.
    """
    if not isinstance(record, Mapping):
        raise InputError(f"{place}: a sample is a JSON object, got {type(record).__name__}")
    key = "messages" if "messages" in record and "conversations" not in record else "conversations"
    if key not in record:
        raise InputError(
            f"{place}: key 'conversations' is missing (found {', '.join(map(str, record)) or 'nothing'}): a sample is "
            '{"image": "a.jpg", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"}, '
            '{"from": "gpt", "value": "A cat"}]}'
        )
    turns = record[key]
    if not isinstance(turns, list) or not turns:
        raise InputError(f"{place}: '{key}' must be a list of turns, got {_short(turns)}")
    who, what = ("role", "content") if key == "messages" else ("from", "value")
    media = {kind: _media(record, kind, file, place, paths) for kind in _MARKERS}
    texts: list[tuple[str, str]] = []
    for number, turn in enumerate(turns, 1):
        for name in (who, what):
            if not isinstance(turn, Mapping) or name not in turn:
                raise InputError(f"{place}: key '{name}' is missing in turn {number}")
        role, text = _ROLES.get(str(turn[who])), turn[what]
        if role is None:
            raise InputError(f"{place}: turn {number} is from '{turn[who]}': it must be one of {', '.join(_ROLES)}")
        if not isinstance(text, str):
            raise InputError(f"{place}: '{what}' of turn {number} must be text, got {_short(text)}")
        texts.append((role, text))
    return _conversation(place, texts, media)


def _conversation(place: str, texts: Sequence[tuple[str, str]], media: Mapping[str, list[Any]]) -> Conversation:
    """Put the media where the markers stand, and check the order of turns."""
    said = [role for role, _ in texts if role != "system"]
    if not said or said[0] != "user":
        raise InputError(f"{place}: the first turn must be a question (human), not an answer")
    if any(a == b for a, b in itertools.pairwise(said)):
        raise InputError(f"{place}: questions and answers must take turns")
    if said[-1] != "assistant":
        raise InputError(f"{place}: the last turn must be an answer (gpt): there is nothing to learn")
    left = {kind: list(files) for kind, files in media.items()}
    for kind, files in media.items():
        markers = sum(text.count(_MARKERS[kind]) for role, text in texts if role == "user")
        if markers and markers != len(files):
            raise InputError(f"{place}: {markers} {_MARKERS[kind]} markers but {len(files)} {kind}s")
    unmarked = [
        {"type": kind, kind: file}
        for kind, files in media.items()
        if not any(_MARKERS[kind] in text for role, text in texts if role == "user")
        for file in files
    ]
    messages: list[dict[str, Any]] = []
    for role, text in texts:
        if role != "user":
            if role == "assistant" and not text.strip():
                raise InputError(f"{place}: an answer is empty")
            messages.append({"role": role, "content": text})
            continue
        parts, unmarked = unmarked, []
        for kind, marker in _MARKERS.items():
            text = text.replace(marker, f"{_SPLIT}{kind}{_SPLIT}")
        for number, piece in enumerate(text.split(_SPLIT)):
            if number % 2:
                parts.append({"type": piece, piece: left[piece].pop(0)})
            elif piece:
                parts.append({"type": "text", "text": piece})
        messages.append({"role": role, "content": parts})
    return Conversation(place, messages)


def _media(record: Mapping[str, Any], kind: str, file: Path, place: str, paths: MediaPaths) -> list[Path]:
    value = record.get(kind, record.get(f"{kind}s"))
    listed = [] if value is None or value == "" else value if isinstance(value, list) else [value]
    for path in listed:
        if not isinstance(path, str) or not path:
            raise InputError(f"{place}: '{kind}' must be a path or a list of paths, got {_short(value)}")
    return [paths.resolve(path, file, place) for path in listed]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


class JsonlFile:
    """Random access to the lines of a JSONL file; only their places are held in memory."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._offsets, self._lines = array("q"), array("q")
        sha, at = hashlib.sha256(), 0
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                sha.update(line)
                if line.strip():
                    self._offsets.append(at)
                    self._lines.append(number)
                at += len(line)
        self.sha256 = sha.hexdigest()

    def __len__(self) -> int:
        return len(self._offsets)

    def conversation(self, index: int, paths: MediaPaths) -> Conversation:
        """The sample of the line at `index`; empty lines do not count."""
        with self.path.open("rb") as file:
            file.seek(self._offsets[index])
            line = file.readline()
        return self._parse(line, self._lines[index], paths)

    def conversations(self, paths: MediaPaths) -> Iterator[Conversation]:
        """All samples in order."""
        with self.path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    yield self._parse(line, number, paths)

    def _parse(self, line: bytes, number: int, paths: MediaPaths) -> Conversation:
        place = f"{self.path}:{number}"
        try:
            record = json.loads(line)
        except ValueError as error:
            hint = ": write one object a line, not a list of all" if line.lstrip().startswith(b"[") else ""
            raise InputError(f"{place}: not a JSON object ({error}){hint}") from error
        return parse_record(record, self.path, place, paths)


class ParquetFile:
    """Rows of (image, question, answer).

    The image as bytes, as {"bytes", "path"} or as a path; the answer a text or a list of which the first is learned.
    """

    def __init__(self, path: Path) -> None:
        import datasets

        self.path = path
        sha = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                sha.update(block)
        self.sha256 = sha.hexdigest()
        try:
            rows = datasets.Dataset.from_parquet(str(path))
        except Exception as error:  # whatever the reader's library raises is about this file
            raise InputError(f"{path}: can't be read as parquet ({one_line(error)})") from error
        if missing := [name for name in _COLUMNS if name not in rows.column_names]:
            raise InputError(f"{path}: column '{missing[0]}' is missing (found {', '.join(rows.column_names)})")
        if isinstance(rows.features["image"], datasets.Image):
            rows = rows.cast_column("image", datasets.Image(decode=False))
        self._rows = rows.select_columns(list(_COLUMNS))

    def __len__(self) -> int:
        return len(self._rows)

    def conversation(self, index: int, paths: MediaPaths) -> Conversation:
        """The sample of row `index`."""
        row, place = self._rows[index], f"{self.path}:{index + 1}"
        image, question, answer = (row[name] for name in _COLUMNS)
        if isinstance(image, Mapping):
            image = image.get("bytes") or image.get("path")
        if isinstance(image, str):
            image = paths.resolve(image, self.path, place)
        answer = answer[0] if isinstance(answer, list) and answer else answer
        for name, value in (("question", question), ("answer", answer)):
            if not isinstance(value, str):
                raise InputError(f"{place}: '{name}' must be text, got {_short(value)}")
        return _conversation(place, [("user", question), ("assistant", answer)], {"image": [image] if image else []})

    def conversations(self, paths: MediaPaths) -> Iterator[Conversation]:
        """All samples in order."""
        for index in range(len(self)):
            yield self.conversation(index, paths)


def open_file(path: str | Path) -> JsonlFile | ParquetFile:
    """A data file by its name: `.jsonl` (also `.json` with one object a line) or `.parquet`.

    Raises:
        InputError: not there, of another kind, or empty.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"training data '{path}' not found")
    if path.suffix not in (".jsonl", ".json", ".parquet"):
        raise InputError(f"training data '{path}' must be .jsonl or .parquet")
    opened = ParquetFile(path) if path.suffix == ".parquet" else JsonlFile(path)
    if not len(opened):
        raise InputError(f"training data '{path}' holds no samples")
    return opened
