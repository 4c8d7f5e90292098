"""What a generator of an embedded benchmark makes: documents in the upstream column layout, with their media."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

CELL = 28
"""Side in pixels of one visual token of the Qwen2/2.5-VL family: 2 x 2 patches of 14. Information is drawn this
large."""


@dataclass(frozen=True)
class Mark:
    """A cell of the 28-pixel grid that carries information, for training and for images; never part of a question.

    `row` and `column` count cells from the top left; `text` says what the cell shows ("K7", "red star");
    `frame` is the video frame, or the place of the image where a question has several; None for a single image.
    """

    row: int
    column: int
    text: str
    frame: int | None = None


@dataclass(frozen=True)
class Document:
    """One document of a mirror.

    Attributes:
        row: the upstream columns without the media (JSON types only).
        image: the image, RGB, sides multiples of 28; None for a clip.
        frames: uint8 (T, H, W, 3) of a clip; None for an image.
        more: further images of the same question, after `image`.
        answer: a response that upstream's metric gives full marks.
        wrong: a plausible response that upstream's metric gives nothing.
        marks: where the information is.
        questions: other (question, short answer) pairs about the same media, open ones included, for training.
    """

    row: dict[str, Any]
    image: Image.Image | None
    frames: np.ndarray | None
    answer: str
    wrong: str
    marks: tuple[Mark, ...] = ()
    questions: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    more: tuple[Image.Image, ...] = ()

    def images(self) -> list[np.ndarray]:
        """The images or frames in order, uint8 (H, W, 3) each."""
        if self.image is None:
            assert self.frames is not None
            return list(self.frames)
        return [np.asarray(p) for p in (self.image, *self.more)]

    def digest(self) -> str:
        """SHA-256 of columns and pixels: what is shown and asked, whatever the file format."""
        sha = hashlib.sha256(json.dumps(self.row, sort_keys=True, ensure_ascii=True).encode())
        for pixels in self.images():
            sha.update(repr(pixels.shape).encode())
            sha.update(np.ascontiguousarray(pixels).tobytes())
        return sha.hexdigest()


Generator = Callable[[np.random.Generator, int], list[Document]]
"""Makes the documents of one scene (two for a benchmark of pairs) from a random generator and the scene's index."""
