"""Training data: conversations about images from JSONL or parquet, as tokens of which only the answers are learned.

Every error names the file and the line (or row) of the sample.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import Dataset

from visionselector_eval.baselines.contract.errors import InputError
from visionselector_eval.models.inputs import MediaSettings, prepare_image, process, read_image, read_video
from visionselector_eval.models.training.records import Conversation, JsonlFile, MediaPaths, open_file

IGNORED = -100
"""Label of tokens that are not learned."""


@dataclass(frozen=True)
class Unusable:
    """A sample that can't be trained on, and why (one line that names its place)."""

    reason: str


class Tokeniser:
    """From a conversation to tokens, labels and pixels, exactly as a prompt is made at inference.

    No token spans prompt and answer, as it can't when the model answers. A line break that begins the text behind an
    image stays, unless the chat template puts one there by itself (LLaVA's does).

    Args:
        processor: the backbone's.
        settings: pixels and frames.
        max_length: longest sample in tokens.
    """

    def __init__(self, processor: Any, settings: MediaSettings, max_length: int) -> None:
        self.processor, self.settings, self.max_length = processor, settings, max_length

    def __call__(self, conversation: Conversation) -> dict[str, Any]:
        """Tensors of one sample.

        input_ids (S,), labels (S,) with `IGNORED` everywhere but on answers and what the chat template ends each with
        (Qwen's: `<|im_end|>` and a line break), and the processor's pixel values and grids; `place`.

        Raises:
            InputError: an image or video that can't be read, or more than `max_length` tokens.
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
        """Whether the chat template itself puts a line break between an image and the text behind it."""
        rendered = self._render(
            [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "text"}]}], True
        )
        return rendered.partition("text")[0].endswith("\n")

    def _without_second_break(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """The message without line breaks behind images that the chat template adds as well."""
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

    Args:
        files: JSONL or parquet.
        paths: what image paths mean.
        tokeniser: from conversation to tensors; may be set later.
        check: read every record once, so that a bad key or path ends the training before it begins.
        missing: called with the place and path of media that do not exist, during the check; raises by default.

    Attributes:
        kinds: "image", "video" or both, of the media that the check met (of parquet files the first row's).

    Raises:
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
        """Names the data: a hash over the files' bytes in order (of a JSONL file not the images it names)."""
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
    raise InputError(f"{place}: '{path}' not found: is image_root right?")


@dataclass(frozen=True)
class Collator:
    """Pads samples to a batch.

    Attributes:
        pad: id of padding.
        side: where it goes.
        skip: leave samples out that can't be used; else `error` of the batch says what is wrong with the first.
    """

    pad: int
    side: Literal["left", "right"] = "left"
    skip: bool = False

    def __call__(self, samples: Sequence[dict[str, Any] | Unusable]) -> dict[str, Any]:
        """One batch, left-padded.

        input_ids, attention_mask and labels (B, S) int64; pixel values and grids of all samples in order; `places`;
        `skipped` and `error` (None or one line).
        """
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
