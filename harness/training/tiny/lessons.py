"""From documents of the embedded benchmarks to training examples: pixels, what each cell shows, questions, answers.

The documents are read by their attributes alone (`row`, `image`, `frames`, `marks`, `questions`), so that this floor
does not import the benchmarks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

SHORT = "\nAnswer the question using a single word or phrase."
WORD = "\nAnswer the question with a single word."
LETTER = "\nAnswer with the option's letter from the given choices directly."
NUMBERS = ("zero", "one", "two", "three", "four")
SHAPES = ("circle", "square", "triangle", "star", "cross", "ring")
COLOURS = ("red", "green", "blue", "yellow", "purple")
DIRECTIONS = ("Up", "Down", "To the left", "To the right")
PAIRED = ("tiny_docvqa_val", "tiny_chartqa", "tiny_scienceqa_img")  # marks come as (cell, partner), two by two


Question = tuple[str, str, str, int]


@dataclass(frozen=True)
class Lesson:
    """One scene with its questions.

    Attributes:
        pixels: (F, H, W, 3) uint8, F = 1 for an image.
        cells: (n,) places of informative tokens in raster order of the token grid.
        shows: n lists of up to four texts (two of the cell itself, two of what it belongs to); "" for nothing.
        groups: (n,) tokens of one group carry the same information.
        questions: (prompt as upstream words it, answer, kind of question, group that tells the answer or -1).
        asked: the document's own question, the same way.
        partners: (n,) cell that each cell belongs to, -1 for none.
    """

    pixels: np.ndarray
    cells: np.ndarray
    shows: list[tuple[str, str, str, str]]
    groups: np.ndarray
    questions: list[Question]
    asked: Question
    partners: np.ndarray

    @property
    def grid(self) -> tuple[int, int, int]:
        """(t, h, w) of the visual tokens."""
        frames, height, width, _ = self.pixels.shape
        return max(1, frames // 2), height // 28, width // 28


def _parts(text: str) -> tuple[str, str]:
    words = text.split()
    if len(words) == 2:
        return words[0], words[1]
    if len(text) == 2 and (text.isupper() or text.isdigit() or (text.isalnum() and not text.islower())):
        return text[0], text[1]
    return text, ""


def upstream_prompt(name: str, row: dict[str, Any]) -> str:
    """A document's question in the wording of lmms-eval's qwen2_5_vl (a test compares them)."""
    if name == "tiny_scienceqa_img":
        context = f"Context: {row['hint']}\n" if row["hint"] else ""
        options = "".join(f"\n{letter}. {c}" for letter, c in zip("ABCDE", row["choices"], strict=False))
        return f"{context}{row['question']}{options}{LETTER}"
    if name == "tiny_mvbench_moving_direction":
        options = "".join(f"({letter}) {c}\n" for letter, c in zip("ABCD", row["candidates"], strict=False))
        return f"Question:{row['question']}\nOption:\n{options}Only give the best option.\n"
    question = row["question"].replace(" Please answer yes or no.", "")
    if name == "tiny_textvqa_val":
        question = question.capitalize()
    return question + (WORD if name == "tiny_chartqa" else SHORT)


def _choice(rng: np.random.Generator, question: str, right: str, others: list[str], hint: str, group: int) -> Question:
    options = [right, *[others[int(i)] for i in rng.permutation(len(others))[: int(rng.integers(2, 4))]]]
    options = [options[int(i)] for i in rng.permutation(len(options))]
    row = {"hint": hint, "question": question, "choices": options}
    return upstream_prompt("tiny_scienceqa_img", row), "ABCDE"[options.index(right)], "choice", group


def _scene_questions(rng: np.random.Generator, marks: Any) -> list[Question]:
    objects = [tuple(m.text.split()) for m in marks]
    colours, shapes = [c for c, _ in objects], [s for _, s in objects]
    made: list[Question] = []
    for colour, shape in dict.fromkeys(objects):
        if shapes.count(shape) == 1:
            made.append((f"What colour is the {shape}?{SHORT}", colour, "open", objects.index((colour, shape))))
        if colours.count(colour) == 1:
            made.append((f"Which shape is {colour}?{SHORT}", shape, "open", objects.index((colour, shape))))
    absent = [s for s in SHAPES if s not in shapes]
    unused = [c for c in COLOURS if c not in colours]
    for _ in range(3):  # presence, half yes; a third of the negatives each: shape, colour, combination
        colour, shape = objects[int(rng.integers(len(objects)))]
        answer = "yes"
        if rng.random() < 0.5:
            answer, way = "no", int(rng.integers(3))
            if way == 0 or (way == 1 and not unused):
                shape = absent[int(rng.integers(len(absent)))]
            elif way == 1:
                colour = unused[int(rng.integers(len(unused)))]
            else:
                colour = colours[int(rng.integers(len(colours)))]
                answer = "yes" if (colour, shape) in objects else "no"
        made.append((f"Is there a {colour} {shape} in the image?{SHORT}", answer, "presence",
                     objects.index((colour, shape)) if answer == "yes" else -1))  # fmt: skip
    yes = bool(rng.random() < 0.5)
    shape = (shapes if yes else absent)[int(rng.integers(len(shapes if yes else absent)))]
    made.append((f"Is there a {shape} in this image?{SHORT}", "Yes" if yes else "No", "existence",
                 shapes.index(shape) if yes else -1))  # fmt: skip
    for _ in range(2):
        colour, shape = objects[int(rng.integers(len(objects)))]
        if rng.random() < 0.5:
            colour = colours[int(rng.integers(len(colours)))]
        if shapes.count(shape) == 1:
            answer = "Yes" if (colour, shape) in objects else "No"
            made.append((f"Is the {shape} {colour}?{SHORT}", answer, "color", shapes.index(shape)))
    a, b = (int(i) for i in rng.permutation(len(objects))[:2])
    if objects.count(objects[a]) == 1 == objects.count(objects[b]) and marks[a].column != marks[b].column:
        side = ("left", "right")[int(rng.integers(2))]
        true = (marks[a].column < marks[b].column) == (side == "left")
        text = f"Is the {marks[a].text} on the {side} of the {marks[b].text}?{SHORT}"
        made.append((text, "Yes" if true else "No", "position", -1))
    most = max(shapes, key=shapes.count)
    number = shapes.count(most)
    if number > 1 or rng.random() < 0.2:
        made.append((f"How many {most} shapes are there?{SHORT}", NUMBERS[number], "count_open", -1))
        other = number if rng.random() < 0.5 else 1 + int(rng.integers(4))
        many = most + ("es" if most.endswith("s") else "s")
        start = f"Are there {NUMBERS[other]} {many}" if other > 1 else f"Is there only one {most}"
        made.append((f"{start} in this image?{SHORT}", "Yes" if other == number else "No", "count", -1))
    colour, shape = objects[int(rng.integers(len(objects)))]
    if colours.count(colour) == 1:
        made.append(_choice(rng, f"Which shape is {colour}?", shape, [s for s in SHAPES if s != shape], "",
                            objects.index((colour, shape))))  # fmt: skip
    return made


def _questions(rng: np.random.Generator, name: str, document: Any) -> list[Question]:
    if name in ("tiny_pope", "tiny_mme"):
        return _scene_questions(rng, document.marks)
    pairs = list(document.questions)
    if name == "tiny_docvqa_val":
        return [(q + SHORT, a, "doc", i) for i, (q, a) in enumerate(pairs)]
    if name == "tiny_chartqa":
        count = len(pairs) - 2
        names = [q[len("What is the value of ") : -1] for q, _ in pairs[:count]]
        made = [(q + WORD, a, "chart", i) for i, (q, a) in enumerate(pairs[:count])]
        return made + [(q + WORD, a, "extreme", names.index(a)) for q, a in pairs[count:]]
    if name == "tiny_textvqa_val":
        return [(q.capitalize() + SHORT, a, "text", i) for i, (q, a) in enumerate(pairs)]
    if name == "tiny_scienceqa_img":
        half = len(pairs) // 2
        made = [(q + SHORT, a, "diagram_open", i % half) for i, (q, a) in enumerate(pairs)]
        kinds = {text.startswith("Which shape"): [a for q, a in pairs if q.startswith(text)] for text in
                 ("Which shape", "Which label")}  # fmt: skip
        for i in rng.permutation(len(pairs))[:5]:
            question, answer = pairs[int(i)]
            others = [a for a in kinds[question.startswith("Which shape")] if a != answer]
            hint = "Look at the labelled parts of the diagram." if rng.random() < 0.5 else ""
            made.append(_choice(rng, question, answer, others, hint, int(i) % half))
        return made
    made = [(q + SHORT, a, "video_open", 1) for q, a in pairs]
    for _ in range(3):
        candidates = [DIRECTIONS[int(i)] for i in rng.permutation(4)]
        row = {"question": document.row["question"], "candidates": candidates}
        letter = "ABCD"[candidates.index(document.row["answer"])]
        made.append((upstream_prompt(name, row), letter, "video_choice", 1))
    return made


def lesson(name: str, document: Any, rng: np.random.Generator) -> Lesson:
    """The training example of a document; `rng` chooses among the questions that could be asked."""
    pixels = document.frames if document.image is None else np.asarray(document.image)[None]
    columns, rows = pixels.shape[2] // 28, pixels.shape[1] // 28
    found: dict[int, tuple[tuple[str, str, str, str], int]] = {}
    marks = document.marks
    still = len(marks) // 2
    for i, m in enumerate(marks):
        own, other = _parts(m.text), ("", "")
        group = i
        if name in PAIRED:
            other, group = _parts(marks[i ^ 1].text), i // 2
        elif m.frame is not None:
            moving = i >= still
            other, group = (document.row["answer"] if moving else "", ""), int(moving)
        place = ((m.frame or 0) // 2 * rows + m.row) * columns + m.column
        found[place] = ((*own, *other), group)
    places = sorted(found)
    partners = [-1] * len(places)
    if name in PAIRED:
        cell = [m.row * columns + m.column for m in marks]
        other_cell = {cell[i]: cell[i ^ 1] for i in range(len(cell))}
        partners = [other_cell[p] for p in places]
    asked = (upstream_prompt(name, document.row), document.answer, name, -1)
    return Lesson(
        pixels,
        np.array(places),
        [found[p][0] for p in places],
        np.array([found[p][1] for p in places]),
        _questions(rng, name, document),
        asked,
        np.array(partners),
    )
