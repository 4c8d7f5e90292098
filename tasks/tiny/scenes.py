"""Images of coloured shapes, and the mirrors that ask about them: VQAv2, GQA, VizWiz, MMBench and MMMU."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image, ImageEnhance, ImageFilter

from visionselector_eval.tasks.tiny.canvas import CELL, COLOURS, INK, SHAPES, Canvas, options, pick
from visionselector_eval.tasks.tiny.document import Document, Mark

WORDS = (
    "bus", "bar", "zoo", "gym", "tea", "pie", "jam", "hat", "car", "van", "toy", "art",
    "inn", "spa", "pub", "ice", "nut", "oil", "fox", "cat", "dog", "owl", "bee", "sun",
)  # fmt: skip
LETTERS = "ABCDE"

Object = tuple[str, str]  # colour and shape
Pairs = list[tuple[str, str]]  # open questions and their answers


def objects(rng: np.random.Generator, count: int) -> list[Object]:
    """`count` objects: different shapes in different colours, so that each is named by either."""
    colours, shapes = pick(rng, tuple(COLOURS), count), pick(rng, SHAPES, count)
    return list(zip(colours, shapes, strict=True))


def scene(
    rng: np.random.Generator, things: list[Object], side: int = 8, frame: int | None = None
) -> tuple[Canvas, list[tuple[int, int]], tuple[Mark, ...], Pairs]:
    """An image of these objects that don't touch, their cells, marks, and open questions about them."""
    canvas = Canvas(rng, side, side, rough=18.0)
    cells = canvas.choose(len(things), apart=True)
    marks = []
    for (row, column), (colour, shape) in zip(cells, things, strict=True):
        canvas.shape(row, column, shape, colour)
        marks.append(Mark(row, column, f"{colour} {shape}", frame))
    canvas.decoys()
    shapes, colours = [s for _, s in things], [c for c, _ in things]
    open_pairs = [(f"What colour is the {s}?", c) for c, s in things if shapes.count(s) == 1]
    open_pairs += [(f"Which shape is {c}?", s) for c, s in things if colours.count(c) == 1]
    return canvas, cells, tuple(marks), open_pairs


def article(noun: str) -> str:
    """The noun with "a" or "an"."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def _in_columns(
    rng: np.random.Generator, things: list[Object]
) -> tuple[Canvas, list[Object], tuple[Mark, ...], Pairs, list[tuple[int, int]]]:
    """A scene whose objects are in different columns, and the objects from left to right."""
    while True:
        canvas, cells, marks, pairs = scene(rng, things)
        if len({column for _, column in cells}) == len(cells):
            order = sorted(range(len(things)), key=lambda i: cells[i][1])
            return canvas, [things[i] for i in order], marks, pairs, [cells[i] for i in order]


def vqa(rng: np.random.Generator, index: int) -> list[Document]:
    """VQAv2: "What color is the star?", "How many stars are in the image?", "Is there a ring in the image?"."""
    kind = index % 4
    if kind == 2:
        number, other = (int(v) for v in rng.permutation([1, 2, 3, 4])[:2])
        colours, shapes = pick(rng, tuple(COLOURS), 2), pick(rng, SHAPES, 2)
        things = [(colours[0], shapes[0])] * number + [(colours[1], shapes[1])]
        name = shapes[0] + ("es" if shapes[0].endswith("s") else "s")
        question, answer, wrong = f"How many {name} are in the image?", str(number), str(other)
        question_type, answer_type = "how many", "number"
    else:
        things = objects(rng, int(rng.integers(3, 6)))
        question = f"What color is the {things[0][1]}?"
        answer, wrong, question_type, answer_type = things[0][0], things[1][0], "what color is the", "other"
    if kind == 3:
        yes = index // 4 % 2 == 0
        absent = [s for s in SHAPES if s not in {t[1] for t in things}]
        shape = things[0][1] if yes else absent[int(rng.integers(len(absent)))]
        question, question_type, answer_type = f"Is there {article(shape)} in the image?", "is there a", "yes/no"
        answer, wrong = ("yes", "no") if yes else ("no", "yes")
    canvas, _, marks, pairs = scene(rng, things)
    row = {
        "question_type": question_type,
        "multiple_choice_answer": answer,
        # One of ten people does not see it: VQA accuracy still gives full marks to what the nine say.
        "answers": [
            {"answer": answer if i < 9 else "unclear", "answer_confidence": "yes", "answer_id": i + 1}
            for i in range(10)
        ],
        "image_id": index,
        "answer_type": answer_type,
        "question_id": index * 1000,
        "question": question,
    }
    return [Document(row, canvas.image, None, answer, wrong, marks, (*pairs, (question, answer)))]


def relations(rng: np.random.Generator, index: int) -> list[Document]:
    """GQA: questions of two steps, such as "What color is the shape to the left of the star?"."""
    canvas, things, marks, pairs, _ = _in_columns(rng, objects(rng, int(rng.integers(3, 5))))
    kind = index % 4
    colour, shape = things[1]
    if kind == 0:  # exactly one shape is left of the second one, exactly one right of the last but one
        ends = (things[0], things[1], "left"), (things[-1], things[-2], "right")
        neighbour, reference, side = ends[index // 4 % 2]
        question = f"What color is the shape to the {side} of the {reference[1]}?"
        answer, wrong, structural = neighbour[0], reference[0], "query"
    elif kind == 1:
        first, second = (things[0], things[-1]) if rng.random() < 0.5 else (things[-1], things[0])
        question = f"Is the {first[1]} to the left or to the right of the {second[1]}?"
        answer, wrong = ("left", "right") if first == things[0] else ("right", "left")
        structural = "choose"
    elif kind == 2:
        yes = index // 4 % 2 == 0
        side = "left" if yes else "right"
        question = f"Is there {article(things[0][0])} {things[0][1]} to the {side} of the {shape}?"
        answer, wrong = ("yes", "no") if yes else ("no", "yes")
        structural = "verify"
    else:
        unused = [c for c in COLOURS if c != colour]
        false = unused[int(rng.integers(len(unused)))]
        one, two = pick(rng, (colour, false), 2)
        question = f"Which color is the {shape}, {one} or {two}?"
        answer, wrong, structural = colour, false, "choose"
    row = {
        "id": f"{index:08d}",
        "imageId": f"n{index:06d}",
        "question": question,
        "answer": answer,
        "fullAnswer": f"{answer.capitalize()}.",
        "isBalanced": True,
        "types": {"structural": structural, "semantic": "attr" if kind in (0, 3) else "rel", "detailed": structural},
    }
    return [Document(row, canvas.image, None, answer, wrong, marks, (*pairs, (question, answer)))]


def snapshot(rng: np.random.Generator, index: int) -> list[Document]:
    """VizWiz: a blurred, badly lit image of one thing and one label; a quarter of the questions has no answer."""
    kind = index % 4
    canvas = Canvas(rng, 8, 8, rough=22.0)
    (colour, shape), (other_colour, other_shape) = objects(rng, 2)
    word, other_word = pick(rng, WORDS, 2)
    thing, label = canvas.choose(2, apart=True)
    canvas.shape(*thing, shape, colour)
    x, y = label[1] * CELL, label[0] * CELL
    canvas.draw.rectangle((x, y + 3, x + CELL - 1, y + CELL - 4), (245, 245, 238), INK)
    canvas.write(*label, word.upper(), 15, bold=True)
    canvas.decoys()
    image = canvas.image
    if kind == 3:  # the label is out of focus
        image.paste(image.filter(ImageFilter.GaussianBlur(9)).crop((x, y, x + CELL, y + CELL)), (x, y))
    image = image.filter(ImageFilter.GaussianBlur(0.6))
    image = ImageEnhance.Brightness(image).enhance(float(rng.uniform(0.75, 1.1)))
    marks = [Mark(*thing, f"{colour} {shape}")]
    pairs = [("What color is this shape?", colour), ("What shape is this?", shape)]
    if kind == 3:
        question, answer, wrong = "what does this label say?", "unanswerable", other_word
    else:
        marks.append(Mark(*label, word))
        pairs.append(("What does this label say?", word))
        question, answer = pairs[kind]
        wrong = (other_colour, other_shape, other_word)[kind]
    row = {
        "question_id": f"VizWiz_val_{index:08d}",
        "question": question,
        "answers": [answer] * 8 + ["unsuitable image"] * 2,
        "category": "unanswerable" if kind == 3 else "other",
    }
    return [Document(row, image, None, answer, wrong, tuple(marks), tuple(pairs))]


_CHINESE = {
    "red": "红色", "green": "绿色", "blue": "蓝色", "yellow": "黄色", "purple": "紫色",
    "circle": "圆形", "square": "正方形", "triangle": "三角形", "star": "星形", "cross": "十字形", "ring": "圆环",
    "top left": "左上", "top right": "右上", "bottom left": "左下", "bottom right": "右下",
    "What color is the {}?": "图中的{}是什么颜色\uff1f",
    "Where is the {} located in the image?": "{}位于图中的什么位置\uff1f",
    "Which shape is farthest to the left?": "最左边的是什么形状\uff1f",
}  # fmt: skip
_ASKED = (
    ("What color is the {}?", "attribute_recognition", "finegrained_perception (instance-level)"),
    ("Where is the {} located in the image?", "object_localization", "finegrained_perception (instance-level)"),
    ("Which shape is farthest to the left?", "spatial_relationship", "finegrained_perception (cross-instance)"),
)


def choices(rng: np.random.Generator, index: int, chinese: bool = False) -> list[Document]:
    """MMBench: one question asked twice with the options in another order; upstream counts it when both are right."""

    def say(text: str) -> str:
        return _CHINESE[text] if chinese else text

    kind = index % 3
    canvas, things, marks, pairs, cells = _in_columns(rng, objects(rng, 4))
    # The part of the image is asked of a thing that is clearly in one, if there is any.
    clear = [i for i, (r, c) in enumerate(cells) if not {r, c} & {3, 4}]
    among = clear if kind == 1 and clear else range(4)
    asked = 0 if kind == 2 else among[int(rng.integers(len(among)))]
    (row_at, column_at), (colour, shape) = cells[asked], things[asked]
    if kind == 0:
        right, others = colour, list(COLOURS)
    elif kind == 1:
        right = f"{'top' if row_at < 4 else 'bottom'} {'left' if column_at < 4 else 'right'}"
        others = ["top left", "top right", "bottom left", "bottom right"]
    else:
        right, others = shape, [s for _, s in things]
    question, category, ability = _ASKED[kind]
    texts, place = options(rng, right, others)
    documents = []
    for variant in range(2):
        turned = [texts[(i - variant) % 4] for i in range(4)]
        answer = LETTERS[(place + variant) % 4]
        document: dict[str, Any] = {
            "index": index + 1 + variant * 1_000_000,
            "question": say(question).format(say(shape)),
            "hint": None if chinese else "nan",
            **{letter: say(text) for letter, text in zip("ABCD", turned, strict=True)},
            "answer": answer,
            "category": category,
            "L2-category": ability,
            "source": "tiny",
            "comment": "nan",
            "split": "dev",
        }
        wrong = LETTERS[(place + variant + 1) % 4]
        documents.append(Document(document, canvas.image, None, answer, wrong, marks, tuple(pairs)))
    return documents


_SUBJECTS = ("Art", "Design", "Biology", "Math", "Economics", "Geography", "Music", "Physics")


def exam(rng: np.random.Generator, index: int) -> list[Document]:
    """MMMU: questions about one to three images, half of them multiple choice; the other images hold decoys."""
    kind = index % 4
    shapes, colours = pick(rng, SHAPES, 6), tuple(COLOURS)
    if kind == 0:  # the same shape in another colour in every image
        count = 2 + (index // 4) % 2
        asked = int(rng.integers(count))
        hues = pick(rng, colours, count)
        sets = []
        for i in range(count):
            rest = pick(rng, [c for c in colours if c != hues[i]], 2)
            sets.append([(hues[i], shapes[0]), (rest[0], shapes[1 + i]), (rest[1], shapes[4])])
        question = f"{_tokens(count)} What color is the {shapes[0]} in image {asked + 1}?"
        right, others, wrong = hues[asked], list(colours), hues[asked - 1]
    elif kind == 1:
        sets = [_painted(rng, [shapes[0], *shapes[1:3]]), _painted(rng, [shapes[0], *shapes[3:5]])]
        question, right = "Compare <image 1> with <image 2>: which shape is in both images?", shapes[0]
        others, wrong = shapes[1:5], shapes[1]
    elif kind == 2:
        sets = [_painted(rng, shapes[:3]), _painted(rng, [*shapes[1:3], shapes[3]])]
        question, right, wrong = "Which shape is in <image 1> but not in <image 2>?", shapes[0], shapes[1]
    else:
        sets = [objects(rng, 4)]
        question = f"What color is the {sets[0][0][1]} in <image 1>?"
        right, wrong = sets[0][0][0], sets[0][1][0]
    images: list[Image.Image] = []
    marks: tuple[Mark, ...] = ()
    pairs: Pairs = []
    for i, things in enumerate(sets):
        canvas, _, seen, about = scene(rng, things, side=6, frame=i if len(sets) > 1 else None)
        images.append(canvas.image)
        marks += seen
        # With several images an open question must name the image.
        pairs += about if len(sets) == 1 else [(f"{q[:-1]} in image {i + 1}?", a) for q, a in about]
    pairs.append((question.replace("<image ", "image ").replace(">", ""), right))
    texts: list[str] = []
    answer = right
    if kind < 2:
        texts, place = options(rng, right, others)
        answer, wrong = LETTERS[place], LETTERS[(place + 1) % 4]
    row = {
        "id": f"validation_{_SUBJECTS[index // 4 % len(_SUBJECTS)]}_{index + 1}",
        "question": question,
        "options": str(texts),
        "explanation": "",
        "img_type": "['Diagrams']",
        "answer": answer,
        "topic_difficulty": "Easy",
        "question_type": "multiple-choice" if kind < 2 else "open",
        "subfield": "Shapes",
    }
    return [Document(row, images[0], None, answer, wrong, marks, tuple(pairs), tuple(images[1:]))]


def _tokens(count: int) -> str:
    return " ".join(f"<image {i + 1}>" for i in range(count))


def _painted(rng: np.random.Generator, shapes: list[str]) -> list[Object]:
    """These shapes in random order, each in its own colour."""
    return list(zip(pick(rng, tuple(COLOURS), len(shapes)), pick(rng, shapes, len(shapes)), strict=True))
