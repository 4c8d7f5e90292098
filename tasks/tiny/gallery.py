"""One image for each embedded benchmark: `python -m visionselector_eval.tasks.tiny.gallery docs/images/benchmarks`.

Each shows the first documents that sweeps ask (so that questions and answers beside it can be checked), frames of a
clip from left to right (every second one). Written small: the background's grain is smoothed, the colours are few, and
a file has at most `LARGEST` bytes.
"""

from __future__ import annotations

import io
import logging
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from visionselector_eval.baselines.contract.errors import InputError
from visionselector_eval.tasks.tiny import EVALUATION_SEED, MIRRORS, Document, generate, mirror
from visionselector_eval.tasks.tiny.canvas import COLOURS, INK

LARGEST = 40_000
_GAP = 6
_SHOWN = {"tiny_ocrbench": 6, "tiny_mmmu_val": 4, "tiny_videomme": 4, "tiny_nextqa_mc_test": 3}


def shown(name: str) -> list[Document]:
    """The documents in the image of a mirror, in order: its first scenes, as many as fit and as it has kinds."""
    found = mirror(name)
    scenes = _SHOWN.get(name, 3 if found.media == "image" else 2)
    return generate(name, EVALUATION_SEED, scenes * found.pair)[:: found.pair]


def sheet(name: str) -> Image.Image:
    """The shown documents of a mirror on white: single images side by side, clips and sets of images as rows."""
    rows = [_row(_thinned(document.images())) for document in shown(name)]
    if mirror(name).media == "image":
        rows = [_row(rows[i : i + 3]) for i in range(0, len(rows), 3)]
    width = max(row.shape[1] for row in rows)
    rows = [np.pad(row, ((0, _GAP), (0, width - row.shape[1]), (0, 0)), constant_values=255) for row in rows]
    return Image.fromarray(np.concatenate(rows)[:-_GAP])


def _row(images: list[np.ndarray]) -> np.ndarray:
    height = max(p.shape[0] for p in images)
    padded = [np.pad(p, ((0, height - p.shape[0]), (0, _GAP), (0, 0)), constant_values=255) for p in _thinned(images)]
    return np.concatenate(padded, axis=1)[:, :-_GAP]


def _thinned(images: list[np.ndarray]) -> list[np.ndarray]:
    return images[::2] if len(images) > 4 else images


def write(folder: Path) -> list[Path]:
    """Write one PNG for each mirror into `folder` (made if need be)."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        made = []
        for name in MIRRORS:
            path = folder / f"{name}.png"
            path.write_bytes(_small(sheet(name)))
            made.append(path)
    except OSError as error:
        raise InputError(f"cannot write images into {folder} ({error.strerror or error})") from error
    return made


def _without_grain(image: Image.Image) -> Image.Image:
    """What stands out stays as it is; elsewhere the background is blurred and cut to steps of 4 grey levels."""
    pixels = np.asarray(image).astype(np.int16)
    blurred = np.asarray(image.filter(ImageFilter.GaussianBlur(2))).astype(np.int16)
    flat = np.abs(pixels - blurred).max(axis=2, keepdims=True) < 12
    return Image.fromarray(np.where(flat, blurred // 4 * 4 + 2, pixels).astype(np.uint8))


def _small(image: Image.Image) -> bytes:
    image = _without_grain(image)
    fixed = [*COLOURS.values(), INK, (255, 255, 255)]  # rare, and what the questions are about
    for colours in (96, 64, 48, 32, 24, 16):
        common = image.quantize(colours, Image.Quantize.MEDIANCUT).getpalette() or []
        palette = Image.new("P", (1, 1))
        palette.putpalette([v for colour in fixed for v in colour] + common[: 3 * colours])
        buffer = io.BytesIO()
        image.quantize(palette=palette, dither=Image.Dither.NONE).save(buffer, "PNG", optimize=True)
        if buffer.tell() <= LARGEST:
            return buffer.getvalue()
    raise AssertionError("the sheet is too large for its bytes: show fewer documents")


def main(arguments: list[str]) -> int:
    """Write the images into the folder that is named; 2 for wrong use."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    log = logging.getLogger(__name__)
    if len(arguments) != 1:
        log.error("which folder? e.g. python -m visionselector_eval.tasks.tiny.gallery docs/images/benchmarks")
        return 2
    try:
        log.info("%d images in %s", len(write(Path(arguments[0]))), arguments[0])
    except InputError as error:
        log.error("%s", error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
