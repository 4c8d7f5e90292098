"""Drawing for the embedded benchmarks: textured backgrounds, glyphs and shapes about one 28-pixel cell in size.

Everything is a function of the `numpy.random.Generator` handed in, so that a seed gives the same pixels again. The
only font is the one embedded in Pillow: no file of the host system is read.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from visionselector_eval.tasks.tiny.document import CELL

COLOURS = {
    "red": (205, 35, 40),
    "green": (25, 140, 50),
    "blue": (35, 70, 205),
    "yellow": (240, 205, 30),
    "purple": (140, 45, 165),
}
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
DECOYS = "#&@%=?*+"
INK = (25, 25, 35)


@functools.lru_cache(maxsize=64)
def font(size: int) -> ImageFont.FreeTypeFont:
    """Pillow's embedded font at `size` pixels."""
    found = ImageFont.load_default(size)
    assert isinstance(found, ImageFont.FreeTypeFont), "Pillow was built without FreeType"
    return found


@functools.lru_cache(maxsize=1024)
def fitting(text: str, largest: int, width: int) -> int:
    """The largest font size up to `largest` at which `text` is at most `width` pixels wide."""
    for size in range(largest, 7, -1):
        if font(size).getlength(text) <= width:
            return size
    return 8


def pick(rng: np.random.Generator, items: Sequence[str], count: int) -> list[str]:
    """`count` different items in random order."""
    return [items[int(i)] for i in rng.permutation(len(items))[:count]]


def options(rng: np.random.Generator, right: str, others: Sequence[str], count: int = 4) -> tuple[list[str], int]:
    """`count` choices in random order, `right` and some of `others` (which may hold it), and the place of `right`."""
    choices = pick(rng, [right, *pick(rng, [o for o in others if o != right], count - 1)], count)
    return choices, choices.index(right)


class Canvas:
    """An image of `rows` x `columns` cells of 28 pixels on a textured background.

    Args:
        base: mean background colour; None draws a muted one at random.
        rough: strength of the slow texture, in grey levels.
    """

    def __init__(
        self,
        rng: np.random.Generator,
        rows: int,
        columns: int,
        base: tuple[int, int, int] | None = None,
        rough: float = 14.0,
    ) -> None:
        self.rng, self.rows, self.columns = rng, rows, columns
        self.image = Image.fromarray(texture(rng, rows * CELL, columns * CELL, base, rough))
        self.draw = ImageDraw.Draw(self.image)
        self.free = {(r, c) for r in range(rows) for c in range(columns)}

    def take(self, cells: Iterable[tuple[int, int]]) -> None:
        """Mark cells as used, so that no decoy is drawn there."""
        self.free.difference_update(cells)

    def centre(self, row: int, column: int, jitter: int = 2) -> tuple[int, int]:
        """Pixel (x, y) of the middle of a cell, moved by up to `jitter` pixels each way; the cell becomes used."""
        self.take([(row, column)])
        dx, dy = (int(v) for v in self.rng.integers(-jitter, jitter + 1, 2))
        return column * CELL + CELL // 2 + dx, row * CELL + CELL // 2 + dy

    def write(
        self,
        row: int,
        column: int,
        text: str,
        size: int = 19,
        fill: tuple[int, int, int] = INK,
        bold: bool = False,
        jitter: int = 1,
    ) -> None:
        """Write `text` into one cell, made smaller until it fits."""
        chosen = font(fitting(text, size, CELL - 2 * jitter - bold))
        x, y = self.centre(row, column, jitter)
        for shift in range(2 if bold else 1):  # the embedded font has one weight: print twice for a bolder one
            self.draw.text((x + shift, y), text, fill, chosen, anchor="mm")

    def shape(self, row: int, column: int, shape: str, colour: str, jitter: int = 2) -> None:
        """Draw one object about 22 pixels in size into a cell."""
        draw_shape(self.draw, self.centre(row, column, jitter), 11, shape, COLOURS[colour])

    def decoys(self, share: float = 0.08) -> None:
        """Draw symbols that no question asks for into about `share` of all cells, so that looking odd is no clue."""
        count = round(share * self.rows * self.columns)
        free = sorted(self.free)
        for i in self.rng.permutation(len(free))[:count]:
            row, column = free[int(i)]
            symbol = DECOYS[int(self.rng.integers(len(DECOYS)))]
            red, green, blue = (int(v) for v in self.rng.integers(30, 150, 3))
            self.write(row, column, symbol, 20, (red, green, blue), jitter=2)

    def choose(self, count: int, rows: range | None = None, apart: bool = False) -> list[tuple[int, int]]:
        """`count` free cells in random order (within `rows`); `apart` keeps chosen cells from touching."""
        cells = [c for c in sorted(self.free) if rows is None or c[0] in rows]
        chosen: list[tuple[int, int]] = []
        for i in self.rng.permutation(len(cells)):
            cell = cells[int(i)]
            if apart and any(max(abs(cell[0] - r), abs(cell[1] - c)) < 2 for r, c in chosen):
                continue
            chosen.append(cell)
            if len(chosen) == count:
                break
        assert len(chosen) == count, "not enough free cells"
        self.take(chosen)
        return chosen


def texture(
    rng: np.random.Generator, height: int, width: int, base: tuple[int, int, int] | None = None, rough: float = 14.0
) -> np.ndarray:
    """A textured background, uint8 (height, width, 3): slow clouds plus a fine grain around a base colour."""
    mean = np.array(base if base is not None else rng.integers(150, 215, 3), dtype=np.float32)
    coarse = rng.normal(0.0, 1.0, (height // CELL + 2, width // CELL + 2)).astype(np.float32)
    clouds = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    grain = rng.integers(-4, 5, (height, width)).astype(np.float32)
    pixels = mean + (clouds * rough + grain)[..., None]
    return np.clip(np.rint(pixels), 0, 255).astype(np.uint8)


def draw_shape(
    draw: ImageDraw.ImageDraw, centre: tuple[int, int], radius: int, shape: str, fill: tuple[int, int, int]
) -> None:
    """Draw one of `SHAPES`, filled and outlined, around a pixel."""
    x, y = centre
    box = (x - radius, y - radius, x + radius, y + radius)

    def around(angles: Iterable[float], radii: Iterable[float]) -> list[tuple[float, float]]:
        return [(x + r * math.sin(a), y - r * math.cos(a)) for a, r in zip(angles, radii, strict=True)]

    if shape == "circle":
        draw.ellipse(box, fill, INK)
    elif shape == "ring":
        draw.ellipse(box, None, INK, 6)
        draw.ellipse((x - radius + 1, y - radius + 1, x + radius - 1, y + radius - 1), None, fill, 4)
    elif shape == "square":
        draw.rectangle((x - radius + 1, y - radius + 1, x + radius - 1, y + radius - 1), fill, INK)
    elif shape == "triangle":
        draw.polygon([(x, y - radius), (x + radius, y + radius - 1), (x - radius, y + radius - 1)], fill, INK)
    elif shape == "star":
        turns = [i * math.pi / 5 for i in range(10)]
        draw.polygon(around(turns, [radius + 1, radius * 0.42] * 5), fill, INK)
    elif shape == "cross":
        a, b = radius, radius // 3
        arm = [(-b, -a), (b, -a), (b, -b)]
        corners = [*arm, *((-v, u) for u, v in arm), *((-u, -v) for u, v in arm), *((v, -u) for u, v in arm)]
        draw.polygon([(x + u, y + v) for u, v in corners], fill, INK)
    else:
        raise ValueError(f"no such shape: {shape}")
