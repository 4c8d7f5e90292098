"""The image mirrors: forms, bar charts, scene words, object scenes and labelled diagrams.

Each generator draws one scene and asks one question (two for MME) in the wording of the benchmark that it mirrors.
Columns that upstream's task code reads are all there; the others are kept where they cost nothing.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import numpy as np

from visionselector_eval.tasks.tiny.canvas import CELL, COLOURS, INK, SHAPES, Canvas, font, options, pick
from visionselector_eval.tasks.tiny.document import Document, Mark
from visionselector_eval.tasks.tiny.scenes import WORDS, article, objects, scene

LABELS = ("Date", "Item", "Qty", "Tax", "Size", "Key", "Lot", "Age", "Bin", "Gate", "Unit", "Zip", "Fax", "Day")
GLYPHS = "ACEHKLMPRTXY234679"
PEOPLE = ("Ann", "Bob", "Eve", "Kim", "Leo", "Max", "Sam", "Tom", "Zoe", "Ida", "Jan", "Lou")


def form(rng: np.random.Generator, index: int) -> list[Document]:
    """DocVQA: a form of labelled fields; "What is the Tax?"."""
    rows, columns = (8, 8) if index % 2 == 0 else (10, 8)
    canvas = Canvas(rng, rows, columns, (236, 232, 222), rough=5.0)
    title = pick(rng, ("INVOICE", "ORDER", "TICKET", "REPORT"), 1)[0]
    canvas.draw.text((8, 4), title, (70, 70, 90), font(16))
    canvas.draw.line((6, CELL - 3, columns * CELL - 6, CELL - 3), (120, 120, 130), 1)
    canvas.take((0, c) for c in range(columns))
    count = int(rng.integers(5, 8))
    labels = pick(rng, LABELS, count)
    places = [(r, half) for r in range(1, rows) for half in (0, 4)]
    marks: list[Mark] = []
    fields: dict[str, str] = {}
    for label, slot in zip(labels, rng.permutation(len(places)), strict=False):
        row, half = places[int(slot)]
        column = half + int(rng.integers(0, 2))
        value = _value(rng, set(fields.values()))
        canvas.write(row, column, label, 13, (60, 60, 80))
        canvas.write(row, column + 1, value, 19, INK, bold=True)
        left = (column + 1) * CELL
        canvas.draw.line((left + 2, (row + 1) * CELL - 2, left + CELL - 3, (row + 1) * CELL - 2), (150, 150, 160), 1)
        marks += [Mark(row, column, label), Mark(row, column + 1, value)]
        fields[label] = value
    canvas.decoys()
    asked = labels[0]
    document: dict[str, Any] = {
        "questionId": str(index),
        "question": f"What is the {asked}?",
        "question_types": ["form"],
        "docId": index,
        "ucsf_document_id": f"tiny{index:04d}",
        "ucsf_document_page_no": "1",
        "answers": [fields[asked]],
        "data_split": "val",
    }
    pairs = tuple((f"What is the {label}?", value) for label, value in fields.items())
    return [Document(document, canvas.image, None, fields[asked], fields[labels[1]], tuple(marks), pairs)]


def _value(rng: np.random.Generator, used: set[str]) -> str:
    while True:
        value = "".join(GLYPHS[int(i)] for i in rng.integers(0, len(GLYPHS), 2))
        # Sharing no glyph with another field keeps a neighbour's value from earning half of the edit-distance score.
        if not any(set(value) & set(other) for other in used) and value[0] != value[1]:
            return value


def chart(rng: np.random.Generator, index: int) -> list[Document]:
    """ChartQA: a bar chart with names below and numbers above the bars."""
    canvas = Canvas(rng, 8, 8, (240, 240, 244), rough=4.0)
    count = int(rng.integers(3, 6))
    names = pick(rng, PEOPLE, count)
    columns = sorted(int(c) + 1 for c in rng.permutation(7)[:count])
    # Steps of at least 9 keep any two bars further apart than ChartQA's 5 per cent tolerance, and the tallest one
    # clear.
    values = [int(v) for v in rng.permutation([11 + 9 * i + int(rng.integers(0, 3)) for i in range(10)])[:count]]
    floor = 7 * CELL
    canvas.draw.line((CELL - 8, 10, CELL - 8, floor), INK, 2)
    canvas.draw.line((CELL - 8, floor, 8 * CELL - 4, floor), INK, 2)
    for line in range(2, 7):
        canvas.draw.line((CELL - 6, line * CELL, 8 * CELL - 4, line * CELL), (205, 205, 212), 1)
    colours = list(COLOURS.values())
    marks: list[Mark] = []
    for name, column, value in zip(names, columns, values, strict=True):
        top = floor - 20 - round(1.25 * value)
        above = top // CELL - 1
        left = column * CELL + 5
        canvas.draw.rectangle((left, top, left + 17, floor - 1), colours[int(rng.integers(len(colours)))], INK)
        canvas.take((r, column) for r in range(8))
        canvas.write(above, column, str(value), 18, bold=True)
        canvas.write(7, column, name, 13)
        marks += [Mark(above, column, str(value)), Mark(7, column, name)]
    canvas.take((r, 0) for r in range(8))
    canvas.decoys()
    highest, lowest = names[int(np.argmax(values))], names[int(np.argmin(values))]
    pairs = [(f"What is the value of {n}?", str(v)) for n, v in zip(names, values, strict=True)]
    pairs += [("Who has the highest value?", highest), ("Who has the lowest value?", lowest)]
    if index % 4 == 3:
        question, answer = pairs[-2] if index % 8 == 3 else pairs[-1]
        kind, wrong = "human_test", next(n for n in names if n != answer)
    else:
        question, answer = pairs[int(rng.integers(count))]
        kind, wrong = "augmented_test", next(str(v) for v in values if str(v) != answer)
    row = {"type": kind, "question": question, "answer": answer}
    return [Document(row, canvas.image, None, answer, wrong, tuple(marks), tuple(pairs))]


def signs(rng: np.random.Generator, index: int) -> list[Document]:
    """TextVQA: words on coloured signs in a textured scene; "what does the red sign say?"."""
    canvas = Canvas(rng, 8, 8, rough=20.0)
    colours = pick(rng, tuple(COLOURS), int(rng.integers(3, 6)))
    words = pick(rng, WORDS, len(colours))
    marks: list[Mark] = []
    for (row, column), colour, word in zip(canvas.choose(len(colours), apart=True), colours, words, strict=True):
        x, y = column * CELL, row * CELL
        post = min(8 * CELL - 1, y + CELL + 14)
        canvas.draw.line((x + CELL // 2, y + CELL - 2, x + CELL // 2, post), (90, 80, 70), 3)
        canvas.draw.rectangle((x, y, x + CELL - 1, y + CELL - 1), COLOURS[colour], (30, 30, 30))
        light = colour == "yellow"
        canvas.write(row, column, word.upper(), 15, INK if light else (255, 255, 255), bold=True)
        canvas.take([(row + 1, column)])
        marks.append(Mark(row, column, f"{colour} {word}"))
    canvas.decoys()
    document: dict[str, Any] = {
        "image_id": f"tiny{index:06d}",
        "question_id": index,
        "question": f"what does the {colours[0]} sign say?",
        "image_width": canvas.image.width,
        "image_height": canvas.image.height,
        "answers": [words[0]] * 10,
        "ocr_tokens": [w.upper() for w in words],
        "set_name": "val",
    }
    pairs = tuple((f"what does the {c} sign say?", w) for c, w in zip(colours, words, strict=True))
    return [Document(document, canvas.image, None, words[0], words[1], tuple(marks), pairs)]


def presence(rng: np.random.Generator, index: int) -> list[Document]:
    """POPE: "Is there a red star in the image?", half yes and half no, with the three kinds of negatives."""
    things = objects(rng, int(rng.integers(3, 5)))
    canvas, _, marks, pairs = scene(rng, things)
    category = ("random", "popular", "adversarial")[index // 2 % 3]
    colour, shape = things[0]
    yes = index % 2 == 0
    if not yes:
        absent = [s for s in SHAPES if s not in {o[1] for o in things}]
        if category == "random":  # the shape is nowhere
            shape = absent[int(rng.integers(len(absent)))]
        elif category == "popular":  # the shape is there, the colour is nowhere
            unused = [c for c in COLOURS if c not in {o[0] for o in things}]
            colour = unused[int(rng.integers(len(unused)))]
        else:  # shape and colour are both there, on different things
            colour = things[1][0]
    row = {
        "id": str(index),
        "question_id": str(index),
        "question": f"Is there {article(colour)} {shape} in the image?",
        "answer": "yes" if yes else "no",
        "image_source": f"tiny_{index:06d}",
        "category": category,
    }
    answers = ("yes", "no") if yes else ("no", "yes")
    return [Document(row, canvas.image, None, *answers, marks, tuple(pairs))]


NUMBERS = ("zero", "one", "two", "three", "four")


def pairs(rng: np.random.Generator, index: int) -> list[Document]:
    """MME: two questions about one image, the first answered yes and the second no."""
    category = ("existence", "count", "position", "color")[index % 4]
    if category == "count":
        number, other = (int(v) for v in rng.permutation([1, 2, 3, 4])[:2])
        colours, shapes = pick(rng, tuple(COLOURS), 3), pick(rng, SHAPES, 3)
        things = [(colours[0], shapes[0])] * number + [(colours[1], shapes[1]), (colours[2], shapes[2])]
        canvas, _, marks, extra = scene(rng, things)
        many = shapes[0] + ("es" if shapes[0].endswith("s") else "s")
        asked = [
            f"{f'Are there {NUMBERS[n]} {many}' if n > 1 else f'Is there only one {shapes[0]}'} in this image?"
            for n in (number, other)
        ]
        extra.append((f"How many {shapes[0]} shapes are there?", NUMBERS[number]))
    else:
        things = objects(rng, int(rng.integers(3, 6)))
        canvas, cells, marks, extra = scene(rng, things)
        colour, shape = things[0]
        if category == "existence":
            absent = [s for s in SHAPES if s not in {o[1] for o in things}]
            missing = absent[int(rng.integers(len(absent)))]
            asked = [f"Is there {article(s)} in this image?" for s in (shape, missing)]
        elif category == "color":
            asked = [f"Is the {shape} {c}?" for c in (colour, things[1][0])]
        else:
            # `choose(apart=True)` may leave two objects in one column: take a pair that is clearly left and right.
            order = sorted(range(len(things)), key=lambda i: cells[i][1])
            left, right = order[0], order[-1]
            if cells[left][1] == cells[right][1]:
                return pairs(rng, index)
            names = [f"{things[i][0]} {things[i][1]}" for i in (left, right)]
            first, second = ("left", "right") if rng.random() < 0.5 else ("right", "left")
            subject, reference = names if first == "left" else names[::-1]
            asked = [f"Is the {subject} on the {side} of the {reference}?" for side in (first, second)]
    documents = []
    for question, answer, wrong in zip(asked, ("Yes", "No"), ("No", "Yes"), strict=True):
        row = {
            "question_id": f"{category}/{index:04d}.png",
            "question": f"{question} Please answer yes or no.",
            "answer": answer,
            "category": category,
        }
        documents.append(Document(row, canvas.image, None, answer, wrong, marks, tuple(extra)))
    return documents


def diagram(rng: np.random.Generator, index: int) -> list[Document]:
    """ScienceQA: a diagram whose parts carry letters; name the part at a letter, or the letter of a part."""
    canvas = Canvas(rng, 8, 8, (222, 230, 236), rough=8.0)
    parts = objects(rng, int(rng.integers(3, 6)))
    letters = pick(rng, tuple("PQRSTUVW"), len(parts))
    columns = [0, 3, 6]
    places = [(r, c) for r in range(0, 8, 2) for c in columns]
    marks: list[Mark] = []
    for (colour, shape), letter, slot in zip(parts, letters, rng.permutation(len(places)), strict=False):
        row, column = places[int(slot)]
        row += int(rng.integers(0, 2))
        swap = bool(rng.random() < 0.5)
        at, label = (column + 1, column) if swap else (column, column + 1)
        middle = row * CELL + CELL // 2
        canvas.draw.line((column * CELL + 14, middle, (column + 1) * CELL + 14, middle), (90, 90, 100), 2)
        canvas.shape(row, at, shape, colour, jitter=1)
        x, y = label * CELL + CELL // 2, middle
        canvas.draw.ellipse((x - 11, y - 11, x + 11, y + 11), (250, 250, 250), INK)
        canvas.write(row, label, letter, 17, bold=True, jitter=0)
        marks += [Mark(row, at, f"{colour} {shape}"), Mark(row, label, letter)]
    canvas.decoys()
    shapes = [shape for _, shape in parts]
    number = min(4, len(parts))
    if index % 2 == 0:
        question, right = f"Which shape has the label {letters[0]}?", shapes[0]
        choices = [right, *shapes[1:number]]
    else:
        question, right = f"Which label belongs to the {shapes[0]}?", letters[0]
        choices = [right, *letters[1:number]]
    choices = [choices[int(i)] for i in rng.permutation(number)]
    place = choices.index(right)
    document: dict[str, Any] = {
        "question": question,
        "choices": choices,
        "answer": place,
        "hint": "Look at the labelled parts of the diagram." if index % 4 < 2 else "",
        "task": "closed choice",
        "grade": "grade3",
        "subject": "natural science",
        "topic": "science-and-engineering-practices",
        "category": "Reading diagrams",
        "skill": "Match labels and parts",
        "lecture": "",
        "solution": "",
    }
    letter_of = "ABCDE"
    open_pairs = [(f"Which shape has the label {name}?", s) for name, s in zip(letters, shapes, strict=True)]
    open_pairs += [(f"Which label belongs to the {s}?", name) for name, s in zip(letters, shapes, strict=True)]
    wrong = letter_of[(place + 1) % number]
    return [Document(document, canvas.image, None, letter_of[place], wrong, tuple(marks), tuple(open_pairs))]


def flow(rng: np.random.Generator, index: int) -> list[Document]:
    """AI2D: a chain of labelled parts joined by arrows; what follows or precedes a part, and which label it has."""
    canvas = Canvas(rng, 8, 8, (226, 233, 222), rough=8.0)
    path = _chain(rng, int(rng.integers(4, 6)))
    parts, letters = objects(rng, len(path)), pick(rng, tuple("PQRSTUVW"), len(path))
    marks: list[Mark] = []
    for (y, x), (colour, shape), letter in zip(path, parts, letters, strict=True):
        row, column = 3 * y, 3 * x
        canvas.shape(row, column, shape, colour, jitter=1)
        # Below to the right, where no arrow passes.
        canvas.write(row + 1, column + 1, letter, 17, bold=True, jitter=2)
        marks += [Mark(row, column, f"{colour} {shape}"), Mark(row + 1, column + 1, letter)]
    for (y, x), (to_y, to_x) in pairwise(path):
        marks.append(_arrow(canvas, (3 * y, 3 * x), to_y - y, to_x - x))
    canvas.decoys()
    shapes = [shape for _, shape in parts]
    labels = [(f"Which label does the {s} have?", name, letters) for s, name in zip(shapes, letters, strict=True)]
    joined = list(pairwise(shapes))
    after = [(f"What does the arrow from the {a} point to?", b, [s for s in SHAPES if s != a]) for a, b in joined]
    before = [(f"What comes directly before the {b}?", a, [s for s in SHAPES if s != b]) for a, b in joined]
    asked = (labels, after, before)[index % 3]
    question, right, others = asked[int(rng.integers(len(asked)))]
    texts, place = options(rng, right, others)
    pairs = [(q, a) for q, a, _ in (*labels, *after, *before)]
    document = {"question": question, "options": texts, "answer": str(place)}
    answer, wrong = "ABCD"[place], "ABCD"[(place + 1) % 4]
    return [Document(document, canvas.image, None, answer, wrong, tuple(marks), tuple(pairs))]


def _chain(rng: np.random.Generator, length: int) -> list[tuple[int, int]]:
    """`length` places of a 3 x 3 grid, each beside the one before."""
    while True:
        path = [(int(rng.integers(3)), int(rng.integers(3)))]
        while len(path) < length:
            y, x = path[-1]
            steps = [(y + dy, x + dx) for dy, dx in ((0, 1), (1, 0), (0, -1), (-1, 0))]
            steps = [s for s in steps if s not in path and 0 <= s[0] < 3 and 0 <= s[1] < 3]
            if not steps:
                break
            path.append(steps[int(rng.integers(len(steps)))])
        else:
            return path


def _arrow(canvas: Canvas, start: tuple[int, int], down: int, right: int) -> Mark:
    """An arrow over the two cells between a part and the next; its head, and so its direction, is in the second."""
    row, column = start
    cells = [(row + down * i, column + right * i) for i in (1, 2)]
    canvas.take(cells)
    middles = [(c * CELL + CELL // 2, r * CELL + CELL // 2) for r, c in cells]
    (x0, y0), (x1, y1) = middles
    canvas.draw.line((x0 - 10 * right, y0 - 10 * down, x1, y1), (80, 80, 95), 3)
    head = [(x1 + 11 * right, y1 + 11 * down)]
    head += [(x1 - 5 * right + side * 8 * down, y1 - 5 * down + side * 8 * right) for side in (1, -1)]
    canvas.draw.polygon(head, (80, 80, 95))
    return Mark(*cells[1], "arrow " + ("down" if down > 0 else "up" if down else "right" if right > 0 else "left"))
