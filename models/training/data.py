"""Training data: conversations about pictures from JSONL or parquet, as tokens of which only the answers are learned.

Every error names the file and the line (or row) of the sample.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import logging
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from visionselector_eval.baselines.errors import InputError
from visionselector_eval.models.inputs import MediaSettings, prepare_image, process, read_image, read_video

log = logging.getLogger(__name__)

IGNORED = -100
"""Label of tokens that are not learned."""

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

    Attributes
    ----------
    root: folder that relative paths start from; None for the folder of the JSONL file.
    policy: `relative` (paths below the root, nothing else) or `absolute` (absolute paths, nothing else).
    """

    root: Path | None = None
    policy: Literal["relative", "absolute"] = "relative"

    def resolve(self, path: str, file: Path, place: str) -> Path:
        """The file that `path` of a sample in `file` names; whether it exists is not looked at.

        Raises
        ------
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
    """One sample: messages in the form of transformers' chat templates, pictures and videos as paths or bytes.

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

    Raises
    ------
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
    """Rows of (image, question, answer): the image as bytes, as {"bytes", "path"} or as a path, the answer a text or a
    list of which the first is learned."""

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
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise InputError(f"{path}: can't be read as parquet ({reason})") from error
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

    Raises
    ------
    InputError: not there, of another kind, or empty.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"training data '{path}' is not there")
    if path.suffix not in (".jsonl", ".json", ".parquet"):
        raise InputError(f"training data '{path}' must be .jsonl or .parquet")
    opened = ParquetFile(path) if path.suffix == ".parquet" else JsonlFile(path)
    if not len(opened):
        raise InputError(f"training data '{path}' holds no samples")
    return opened


@dataclass(frozen=True)
class Unusable:
    """A sample that can't be trained on, and why (one line that names its place)."""

    reason: str


class Tokeniser:
    """From a conversation to tokens, labels and pixels, exactly as a prompt is made at inference.

    No token spans prompt and answer, as it can't when the model answers. A line break that begins the text behind a
    picture stays, unless the chat template puts one there by itself (LLaVA's does).

    Parameters
    ----------
    processor: the backbone's. settings: pixels and frames. max_length: longest sample in tokens.
    """

    def __init__(self, processor: Any, settings: MediaSettings, max_length: int) -> None:
        self.processor, self.settings, self.max_length = processor, settings, max_length

    def __call__(self, conversation: Conversation) -> dict[str, Any]:
        """Tensors of one sample: input_ids (S,), labels (S,) with `IGNORED` everywhere but on answers and what the
        chat template ends each with (Qwen's: `<|im_end|>` and a line break), and the processor's pixel values and
        grids; `place`.

        Raises
        ------
        InputError: a picture or video that can't be read, or more than `max_length` tokens.
        """
        place = conversation.place
        messages = [self._without_second_break(message) for message in conversation.messages]
        if self.settings.system_prompt is not None and messages[0]["role"] != "system":
            system = {"role": "system", "content": [{"type": "text", "text": self.settings.system_prompt}]}
            messages.insert(0, system)
        ids: list[Tensor] = []
        labels: list[Tensor] = []
        tensors: dict[str, list[Any]] = {}
        done, shown, before, said = 0, 0, "", ""
        for number, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self._render(messages[:number], True)
            whole = self._render(messages[: number + 1], False)
            if not whole.startswith(prompt) or not prompt.startswith(said):
                raise InputError(
                    f"{place}: the chat template changes a prompt when it is answered: it can't be trained"
                )
            answer, said = whole[len(prompt) :], whole
            if message["content"].strip() not in answer:
                raise InputError(
                    f"{place}: the chat template does not show the answer where it is trained: give the checkpoint one "
                    "that takes an answer's content as plain text"
                )
            question = prompt[done:]
            made = self._prompt(place, before + question, messages[shown:number], first=not done)
            asked = self._rest(before, made.pop("input_ids")[0])
            if asked is None:
                asked = self._prompt(place, question, messages[shown:number], first=False)["input_ids"][0]
            spoken = self._rest(question, self._tokens(question + answer))
            spoken = self._tokens(answer) if spoken is None else spoken
            done, shown, before = len(whole), number + 1, answer
            ids += [asked, spoken]
            labels += [torch.full_like(asked, IGNORED), spoken]
            for name, value in made.items():
                tensors.setdefault(name, []).append(value)
        sample: dict[str, Any] = {"input_ids": torch.cat(ids), "labels": torch.cat(labels), "place": place}
        if (length := len(sample["input_ids"])) > self.max_length:
            answers = int((sample["labels"] != IGNORED).sum())
            raise InputError(
                f"{place}: the sample has {length} tokens, {answers} of them answers, but the context holds "
                f"{self.max_length}: lower max_pixels, or skip it (on_bad_sample)"
            )
        for name, values in tensors.items():
            sample[name] = _joined(values)
        return sample

    @cached_property
    def _breaks(self) -> bool:
        """Whether the chat template itself puts a line break between a picture and the text behind it."""
        rendered = self._render(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "text"}]}], True
        )
        return rendered.partition("text")[0].endswith("\n")

    def _without_second_break(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """The message without line breaks behind pictures that the chat template adds as well."""
        if isinstance(message["content"], str) or not self._breaks:
            return dict(message)
        parts: list[Any] = []
        for part in message["content"]:
            follows = bool(parts) and parts[-1]["type"] != "text"
            if follows and part["type"] == "text" and part["text"].startswith("\n"):
                part = {**part, "text": part["text"][1:]}
                if not part["text"]:
                    continue
            parts.append(part)
        return {**message, "content": parts}

    def _render(self, messages: Sequence[Mapping[str, Any]], open_end: bool) -> str:
        return self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=open_end)

    def _tokens(self, text: str) -> Tensor:
        return self.processor.tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids[0]

    def _rest(self, before: str, whole: Tensor) -> Tensor | None:
        """The tokens of `whole` behind those of the text `before`, with which it begins; None where one spans both.

        Some tokenizers (Llama's) put a space before any text: tokenised alone, an answer would begin with one too many.
        """
        if not before:
            return whole
        lead = self._tokens(before)
        return whole[len(lead) :] if torch.equal(whole[: len(lead)], lead) else None

    def _prompt(self, place: str, text: str, messages: Sequence[Mapping[str, Any]], first: bool) -> dict[str, Any]:
        """What the processor makes of a part of a conversation; only the `first` has the token that begins it all."""
        images, videos, metadata = [], [], []
        try:
            for kind, source in Conversation(place, [dict(m) for m in messages]).media():
                if kind == "image":
                    value = BytesIO(source) if isinstance(source, bytes) else source
                    images.append(prepare_image(read_image(value), self.settings))
                else:
                    frames, about = read_video(source, self.settings)
                    videos.append(frames)
                    metadata.append(about)
        except InputError as error:
            raise InputError(f"{place}: {error}") from error
        made = process(self.processor, [text], images, videos, metadata, self.settings, begins=first)
        return {k: v for k, v in made.items() if k not in ("attention_mask", "mm_token_type_ids", "token_type_ids")}


def _joined(values: Sequence[Any]) -> Any:
    """Tensors or lists, one after another."""
    return torch.cat(list(values)) if isinstance(values[0], Tensor) else list(itertools.chain.from_iterable(values))


class Conversations(Dataset):
    """The samples of several files, read when they are asked for.

    Parameters
    ----------
    files: JSONL or parquet. paths: what image paths mean. tokeniser: from conversation to tensors; may be set later.
    check: read every record once, so that a bad key or path ends the training before it begins.
    missing: called with the place and path of media that do not exist, during the check; raises by default.

    Attributes
    ----------
    kinds: "image", "video" or both, of the media that the check met (of parquet files the first row's).

    Raises
    ------
    InputError: no such file, a record that can't be used, media that are not there.
    """

    def __init__(
        self,
        files: Sequence[str | Path],
        paths: MediaPaths,
        tokeniser: Tokeniser | None = None,
        *,
        check: bool = True,
        missing: Callable[[str, Path], None] | None = None,
    ) -> None:
        self.files = [open_file(file) for file in files]
        self.paths, self.tokeniser = paths, tokeniser
        self.kinds: set[str] = set()
        self._ends = torch.tensor([len(file) for file in self.files]).cumsum(0).tolist()
        if check:
            self._check(missing or _refuse_missing)

    def _check(self, missing: Callable[[str, Path], None]) -> None:
        for file in self.files:
            if isinstance(file, JsonlFile):
                for conversation in file.conversations(self.paths):
                    for kind, source in conversation.media():
                        self.kinds.add(kind)
                        if not source.is_file():
                            missing(conversation.place, source)
            else:
                self.kinds.update(kind for kind, _ in file.conversation(0, self.paths).media())

    @property
    def sha256(self) -> str:
        """Names the data: a hash over the files' bytes in order (of a JSONL file not the pictures it names)."""
        return hashlib.sha256("".join(file.sha256 for file in self.files).encode()).hexdigest()

    def __len__(self) -> int:
        return self._ends[-1]

    def conversation(self, index: int) -> Conversation:
        """The sample `index` over all files in order."""
        number = next(i for i, end in enumerate(self._ends) if index < end)
        return self.files[number].conversation(index - (self._ends[number - 1] if number else 0), self.paths)

    def __getitem__(self, index: int) -> dict[str, Any] | Unusable:
        # Not raised: from a reading process the message would come with a traceback around it.
        assert self.tokeniser is not None
        try:
            return self.tokeniser(self.conversation(index))
        except InputError as error:
            return Unusable(str(error))


def _refuse_missing(place: str, path: Path) -> None:
    raise InputError(f"{place}: '{path}' is not there: is image_root right?")


@dataclass(frozen=True)
class Collator:
    """Pads samples to a batch.

    Attributes
    ----------
    pad: id of padding. side: where it goes. skip: leave samples out that can't be used; else `error` of the batch says
        what is wrong with the first.
    """

    pad: int
    side: Literal["left", "right"] = "left"
    skip: bool = False

    def __call__(self, samples: Sequence[dict[str, Any] | Unusable]) -> dict[str, Any]:
        """input_ids, attention_mask and labels (B, S) int64; pixel values and grids of all samples in order; `places`;
        `skipped` and `error` (None or one line)."""
        bad = [s.reason for s in samples if isinstance(s, Unusable)]
        good = [s for s in samples if not isinstance(s, Unusable)]
        batch: dict[str, Any] = {
            "places": [s["place"] for s in good],
            "skipped": bad if self.skip else [],
            "error": bad[0] if bad and not self.skip else None,
        }
        if not good:
            return batch
        size = max(len(s["input_ids"]) for s in good)
        ones = [torch.ones_like(s["input_ids"]) for s in good]
        for name, rows, fill in (
            ("input_ids", [s["input_ids"] for s in good], self.pad),
            ("labels", [s["labels"] for s in good], IGNORED),
            ("attention_mask", ones, 0),
        ):
            batch[name] = torch.stack([self._padded(row, size, fill) for row in rows])
        for name in dict.fromkeys(key for s in good for key in s):
            if name not in ("input_ids", "labels", "place"):
                values = [s[name] for s in good if name in s]
                batch[name] = _joined(values)
        return batch

    def _padded(self, row: Tensor, size: int, fill: int) -> Tensor:
        room = size - len(row)
        return F.pad(row, (room, 0) if self.side == "left" else (0, room), value=fill)
