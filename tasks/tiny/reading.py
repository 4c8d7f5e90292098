"""The text mirror of OCRBench: its ten kinds of questions, from single words to forms and formulas."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from PIL import Image, ImageDraw

from visionselector_eval.tasks.tiny.canvas import CELL, COLOURS, INK, Canvas, fitting, font, pick
from visionselector_eval.tasks.tiny.document import Document, Mark
from visionselector_eval.tasks.tiny.images import form, signs
from visionselector_eval.tasks.tiny.scenes import WORDS

_KINDS = (  # OCRBench's question type, and a data set that it takes such questions from
    ("Regular Text Recognition", "IIIT5K"),
    ("Irregular Text Recognition", "CTW"),
    ("Artistic Text Recognition", "WordArt"),
    ("Handwriting Recognition", "IAM"),
    ("Digit String Recognition", "ORAND"),
    ("Non-Semantic Text Recognition", "NonSemanticText"),
    ("Scene Text-centric VQA", "textVQA"),
    ("Doc-oriented VQA", "docVQA"),
    ("Key Information Extraction", "FUNSD"),
    ("Handwritten Mathematical Expression Recognition", "HME100k"),
)
_CONSONANTS = "BCDFGHKLMNPRSTVX"


def ocr(rng: np.random.Generator, index: int) -> list[Document]:
    """OCRBench: its ten kinds take turns; "what is written in the image?"."""
    kind, dataset = _KINDS[index % len(_KINDS)]
    made = _DRAWN.get(kind, _recognise)(rng, index)
    row = {"dataset": dataset, "question": made.row["question"], "question_type": kind, "answer": [made.answer]}
    return [Document(row, made.image, None, made.answer, made.wrong, made.marks, made.questions)]


def _recognise(rng: np.random.Generator, index: int) -> Document:
    """One word somewhere in the image, printed, turned, outlined, slanted, or no word at all."""
    kind = index % len(_KINDS)
    canvas = Canvas(rng, 4, 6, rough=20.0)
    word, other = (w.upper() for w in pick(rng, WORDS, 2))
    if kind == 4:
        word, other = ("".join(pick(rng, tuple("0123456789"), 3)) for _ in range(2))
    elif kind == 5:
        word, other = ("".join(pick(rng, tuple(_CONSONANTS), 3)) for _ in range(2))
    if word == other:
        return _recognise(rng, index)
    cell = canvas.choose(1)[0]
    colour = COLOURS[pick(rng, ("red", "green", "blue", "purple"), 1)[0]] if kind == 2 else INK
    angle = float(rng.choice([-1, 1]) * rng.uniform(15, 35)) if kind == 1 else 0.0
    slant = float(rng.uniform(0.25, 0.5)) if kind == 3 else 0.0
    _stamp(canvas, cell, word, colour, angle, slant, outline=kind == 2)
    canvas.decoys(0.12)
    question = "what is the number in the image?" if kind == 4 else "what is written in the image?"
    return Document({"question": question}, canvas.image, None, word, other, (Mark(*cell, word),), ((question, word),))


def _read_sign(rng: np.random.Generator, index: int) -> Document:
    return signs(rng, index)[0]


def _read_form(rng: np.random.Generator, index: int) -> Document:
    return form(rng, index)[0]


def _extract(rng: np.random.Generator, index: int) -> Document:
    made = form(rng, index)[0]
    made.row["question"] += " Answer this question using the text in the image directly."
    return made


def _formula(rng: np.random.Generator, index: int) -> Document:
    """Three slanted symbols in a row: "x+4", some with an exponent."""
    canvas = Canvas(rng, 4, 6, (238, 236, 228), rough=8.0)
    row, column = int(rng.integers(4)), int(rng.integers(4))
    letter, sign = pick(rng, tuple("abkmnxyz"), 1)[0], pick(rng, ("+", "-", "="), 1)[0]
    number, other = pick(rng, tuple("3456789"), 2)
    square = index // len(_KINDS) % 2 == 1
    slant = float(rng.uniform(0.1, 0.3))
    for i, text in enumerate((letter, sign, number)):
        _stamp(canvas, (row, column + i), text, (35, 45, 120), slant=slant, size=22)
    if square:  # the embedded font has no raised 2
        at = (column * CELL + 22, row * CELL + 6)
        canvas.draw.text(at, "2", (35, 45, 120), font(13), anchor="mm")
    start = letter + "^{2}" * square + sign
    marks = [Mark(row, column + i, text) for i, text in enumerate((start[:-1], sign, number))]
    canvas.decoys()
    question = "Please write out the expression of the formula in the image using LaTeX format."
    answer, wrong = start + number, start + other
    return Document({"question": question}, canvas.image, None, answer, wrong, tuple(marks), ((question, answer),))


_DRAWN: dict[str, Callable[[np.random.Generator, int], Document]] = {
    "Scene Text-centric VQA": _read_sign,
    "Doc-oriented VQA": _read_form,
    "Key Information Extraction": _extract,
    "Handwritten Mathematical Expression Recognition": _formula,
}


def _stamp(
    canvas: Canvas,
    cell: tuple[int, int],
    text: str,
    fill: tuple[int, int, int],
    angle: float = 0.0,
    slant: float = 0.0,
    outline: bool = False,
    size: int = 19,
) -> None:
    """Write `text` into a cell: turned by `angle` degrees, slanted as by hand, or in colour with an outline."""
    x, y = canvas.centre(*cell, jitter=1)
    room = CELL - 4 - 2 * outline - round(4 * abs(slant))
    patch = Image.new("RGBA", (CELL, CELL), (*fill, 0))
    stroke = {"stroke_width": 1, "stroke_fill": (255, 255, 255)} if outline else {}
    middle, chosen = CELL // 2, font(fitting(text, size, room))
    for shift in range(2):
        ImageDraw.Draw(patch).text((middle + shift, middle), text, fill, chosen, anchor="mm", **stroke)
    if angle:
        patch = patch.rotate(angle, Image.Resampling.BICUBIC)
    if slant:
        patch = patch.transform(
            patch.size, Image.Transform.AFFINE, (1, slant, -slant * middle, 0, 1, 0), Image.Resampling.BICUBIC
        )
    canvas.image.paste(patch, (x - middle, y - middle), patch)
