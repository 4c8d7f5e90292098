"""The video mirrors: things move, appear in turn or change colour, and no single frame tells the answer."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw

from visionselector_eval.tasks.tiny.canvas import COLOURS, INK, SHAPES, Canvas, draw_shape, fitting, font, options, pick
from visionselector_eval.tasks.tiny.document import CELL, Document, Mark
from visionselector_eval.tasks.tiny.scenes import LETTERS, WORDS, Object, objects

SIDE = 6  # cells
FRAMES = 8
FPS = 2  # what lmms-eval's wrappers sample by default: every frame is seen
STEP = 6  # pixels a frame: 42 in all, so that where the object is says little about where it goes
DIRECTIONS = {"Up": (0, -1), "Down": (0, 1), "To the left": (-1, 0), "To the right": (1, 0)}


def moving(rng: np.random.Generator, index: int) -> list[Document]:
    """MVBench, moving direction: "What direction is the red star moving within the video?"."""
    canvas = Canvas(rng, SIDE, SIDE, rough=16.0)
    colours, shapes = pick(rng, tuple(COLOURS), 2), pick(rng, SHAPES, 2)
    answer = tuple(DIRECTIONS)[int(rng.integers(4))]
    path = _path(rng, answer, FRAMES, STEP)
    touched = {(y // CELL, x // CELL) for px, py in path for x in (px - 13, px + 13) for y in (py - 13, py + 13)}
    canvas.take(touched)
    still = canvas.choose(1)[0]
    canvas.shape(*still, shapes[1], colours[1])
    canvas.decoys()
    frames = []
    marks = [Mark(*still, f"{colours[1]} {shapes[1]}", frame=t) for t in range(FRAMES)]
    for t, (x, y) in enumerate(path):
        image = canvas.image.copy()
        draw_shape(ImageDraw.Draw(image), (x, y), 11, shapes[0], COLOURS[colours[0]])
        frames.append(np.asarray(image))
        marks.append(Mark(y // CELL, x // CELL, f"{colours[0]} {shapes[0]}", frame=t))
    candidates = pick(rng, tuple(DIRECTIONS), 4)
    place = candidates.index(answer)
    question = f"What direction is the {colours[0]} {shapes[0]} moving within the video?"
    row = {"video": f"clip_{index:04d}.mp4", "question": question, "candidates": candidates, "answer": answer}
    open_pairs = ((question, answer), ("Which shape is moving in the video?", shapes[0]))
    wrong = "ABCD"[(place + 1) % 4]
    return [Document(row, None, np.stack(frames), "ABCD"[place], wrong, tuple(marks), open_pairs)]


def _path(rng: np.random.Generator, direction: str, frames: int, step: int) -> list[tuple[int, int]]:
    """Pixels (x, y) of an object that moves `step` pixels a frame and stays inside the image."""
    dx, dy = DIRECTIONS[direction]
    margin, side, reach = CELL // 2, SIDE * CELL, step * (frames - 1)
    start = []
    for d in (dx, dy):
        low, high = margin + max(0, -d) * reach, side - margin - max(0, d) * reach
        start.append(int(rng.integers(low, high)))
    return [(start[0] + dx * step * t, start[1] + dy * step * t) for t in range(frames)]


Thing = Object | str  # a coloured shape, or a word on a white card
Shot = list[tuple[tuple[int, int], Thing]]  # pixel (x, y) and what is there, in one frame


def _say(thing: Thing) -> str:
    return thing if isinstance(thing, str) else " ".join(thing)


def _shoot(rng: np.random.Generator, shots: list[Shot]) -> tuple[np.ndarray, tuple[Mark, ...]]:
    """Frames (T, H, W, 3) over one background with decoys, and where something is seen."""
    canvas = Canvas(rng, SIDE, SIDE, rough=16.0)
    spots = {(x + dx, y + dy) for shot in shots for (x, y), _ in shot for dx in (-13, 13) for dy in (-13, 13)}
    canvas.take((y // CELL, x // CELL) for x, y in spots)
    canvas.decoys()
    frames, marks = [], []
    for t, shot in enumerate(shots):
        image = canvas.image.copy()
        draw = ImageDraw.Draw(image)
        for (x, y), thing in shot:
            if isinstance(thing, str):
                draw.rectangle((x - 13, y - 10, x + 13, y + 10), (248, 248, 240), INK)
                chosen = font(fitting(thing.upper(), 15, 24))
                for shift in range(2):
                    draw.text((x + shift, y), thing.upper(), INK, chosen, anchor="mm")
            else:
                draw_shape(draw, (x, y), 11, thing[1], COLOURS[thing[0]])
            marks.append(Mark(y // CELL, x // CELL, _say(thing), t))
        frames.append(np.asarray(image))
    return np.stack(frames), tuple(marks)


def _places(rng: np.random.Generator, count: int) -> list[tuple[int, int]]:
    """`count` pixels in the middle of cells that don't touch (9 at most)."""
    down, right = (int(v) for v in rng.integers(0, 2, 2))
    cells = [(2 * (int(i) // 3) + down, 2 * (int(i) % 3) + right) for i in rng.permutation(9)[:count]]
    return [_middle(cell) for cell in cells]


def _middle(cell: tuple[int, int]) -> tuple[int, int]:
    return cell[1] * CELL + CELL // 2, cell[0] * CELL + CELL // 2


def _aside(rng: np.random.Generator, path: list[tuple[int, int]]) -> tuple[int, int]:
    """A pixel in the middle of a cell that a moving object never touches."""
    near = {(y // CELL + dy, x // CELL + dx) for x, y in path for dy in (-1, 0, 1) for dx in (-1, 0, 1)}
    free = [(r, c) for r in range(SIDE) for c in range(SIDE) if (r, c) not in near]
    return _middle(free[int(rng.integers(len(free)))])


def _in_turn(rng: np.random.Generator, things: list[Thing], frames: int) -> list[Shot]:
    """Shots in which the things are seen one after another, each at its own place, about equally long."""
    places = _places(rng, len(things))
    return [[(places[i], things[i])] for i in _turns(len(things), frames)]


def _turns(count: int, frames: int) -> list[int]:
    # Qwen's vision encoder merges two video frames into one: changes fall between such pairs.
    together = 2 if frames == FRAMES else 1
    return [t // together * count // (frames // together) for t in range(frames)]


def _orders(things: list[Thing]) -> list[tuple[str, str]]:
    """Open questions about things that are seen in turn."""
    names = [_say(t) for t in things]
    pairs = [(f"What appears right after the {a}?", b) for a, b in pairwise(names)]
    return [*pairs, ("What appears first?", names[0]), ("What appears last?", names[-1])]


def procedure(rng: np.random.Generator, index: int) -> list[Document]:
    """SEED-Bench, video part: frames given as images; the order of events, or which way a thing moves."""
    frames = 4
    if index % 2 == 0:
        things: list[Thing] = [*objects(rng, 3)]
        shots = _in_turn(rng, things, frames)
        shapes = [t[1] for t in things]
        right = ", ".join(shapes)
        orders = [", ".join(shapes[i] for i in o) for o in ((0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))]
        texts, place = options(rng, right, orders)
        question, kind, pairs = "In which order do the shapes appear in the video?", 12, _orders(things)
    else:
        thing, other = objects(rng, 2)
        right = pick(rng, tuple(DIRECTIONS), 1)[0]
        path = _path(rng, right, frames, 14)
        spot = _aside(rng, path)
        shots = [[(at, thing), (spot, other)] for at in path]
        texts, place = options(rng, right, tuple(DIRECTIONS))
        question, kind = f"In which direction does the {_say(thing)} move in the video?", 10
        pairs = [(question, right), ("Which shape moves?", thing[1])]
    seen, marks = _shoot(rng, shots)
    row = {
        "question": question,
        **{f"choice_{letter}": text for letter, text in zip("abcd", texts, strict=True)},
        "answer": LETTERS[place],
        "data_id": f"clip_{index:04d}",
        "data_type": "video",
        "question_id": str(index),
        "question_type_id": kind,
        "segment": ["0", "4"],
    }
    return [Document(row, None, seen, LETTERS[place], LETTERS[(place + 1) % 4], marks, tuple(pairs))]


def events(rng: np.random.Generator, index: int) -> list[Document]:
    """Video-MME: what follows what, what a thing turns into, how many things are seen, which word comes last."""
    kind = index % 4
    if kind == 0:
        things: list[Thing] = [*objects(rng, 4)]
        after = int(rng.integers(1, 4))
        question, right = f"Which shape appears right after the {things[after - 1][1]}?", things[after][1]
        others = [s for s in SHAPES if s != things[after - 1][1]]
        kinds, pairs = ("Temporal Perception", "Knowledge", "Technology"), _orders(things)
    elif kind == 1:
        before, later = pick(rng, tuple(COLOURS), 2)
        shape = pick(rng, SHAPES, 1)[0]
        things = [(before, shape), (later, shape)]
        question, right = f"Which color does the {shape} turn into?", later
        others = [before, *pick(rng, [c for c in COLOURS if c not in (before, later)], 2)]
        kinds = ("Attribute Perception", "Life Record", "Daily Life")
        pairs = [(question, later), (f"Which color is the {shape} at first?", before)]
    elif kind == 2:
        things = [*objects(rng, int(rng.integers(1, 5)))]
        question, right = "How many different shapes appear in the video?", str(len(things))
        others = ["1", "2", "3", "4"]
        kinds, pairs = ("Counting Problem", "Sports Competition", "Athletics"), [*_orders(things), (question, right)]
    else:
        things = [*pick(rng, WORDS, 4)]
        after = int(rng.integers(1, 4))
        question, right = f"Which word is shown right after {_say(things[after - 1]).upper()}?", _say(things[after])
        others = [w for w in map(_say, things) if w != _say(things[after - 1])]
        others.append(next(w for w in WORDS if w not in things))
        kinds, pairs = ("OCR Problems", "Film & Television", "News Report"), _orders(things)
    shots = _in_turn(rng, things, FRAMES)
    if kind == 1:  # at one place: only the colour changes
        shots = [[(shots[0][0][0], thing)] for [(_, thing)] in shots]
    texts, place = options(rng, right, others)
    seen, marks = _shoot(rng, shots)
    row = {
        "video_id": f"{index:03d}",
        "duration": "short",
        "domain": kinds[1],
        "sub_category": kinds[2],
        "url": "",
        "videoID": f"clip_{index:04d}",
        "question_id": f"{index:03d}-1",
        "task_type": kinds[0],
        "question": question,
        "options": [f"{letter}. {text}" for letter, text in zip("ABCD", texts, strict=True)],
        "answer": LETTERS[place],
    }
    return [Document(row, None, seen, LETTERS[place], LETTERS[(place + 1) % 4], marks, tuple(pairs))]


_MOVES = {"moves up": "Up", "moves down": "Down", "moves left": "To the left", "moves right": "To the right"}
_COUNTS = ("one", "two", "three", "four", "five")


def causes(rng: np.random.Generator, index: int) -> list[Document]:
    """NExT-QA, multiple choice of five: what happens after or before something else, how often something happens."""
    kind = index % 3
    thing, cue = objects(rng, 2)
    shots: list[Shot]
    half = FRAMES // 2
    if kind == 0:  # the thing stands still; once the cue is seen it moves, or it does not
        moves = [*_MOVES, "does not move"]
        right = moves[int(rng.integers(5))]
        path = _path(rng, _MOVES.get(right, "Up"), half + 1, 14)
        path = [path[0]] * half + (path[1:] if right in _MOVES else [path[0]] * half)
        spot = _aside(rng, path)
        shots = [[(at, thing), *[(spot, cue)] * (t >= half)] for t, at in enumerate(path)]
        question = f"what does the {thing[1]} do after the {cue[1]} appears"
        others, kind_name = moves, "TN"
    elif kind == 1:  # two colours before the cue is seen: only the later one is right
        hues = pick(rng, tuple(COLOURS), 3)
        at, spot = _places(rng, 2)
        shots = [[(at, (hues[i], thing[1])), *[(spot, cue)] * (i == 2)] for i in _turns(3, FRAMES)]
        question, right = f"what color is the {thing[1]} right before the {cue[1]} appears", hues[1]
        others, kind_name = list(COLOURS), "TP"
    else:  # seen for one frame, gone for one
        count = int(rng.integers(1, 5))
        places = _places(rng, 5)
        shots = [[(places[4], cue), *[(places[t // 2], thing)] * (t % 2 == 0 and t // 2 < count)] for t in range(8)]
        question, right = f"how many times is the {thing[1]} shown", _COUNTS[count - 1]
        others, kind_name = list(_COUNTS), "DC"
    texts, place = options(rng, right, others, 5)
    seen, marks = _shoot(rng, shots)
    row = {
        "video": f"{10000 + index}",
        "frame_count": len(shots),
        "width": SIDE * CELL,
        "height": SIDE * CELL,
        "question": question,
        "answer": place,
        "qid": index,
        "type": kind_name,
        **{f"a{i}": text for i, text in enumerate(texts)},
    }
    pairs = ((question, right),)
    return [Document(row, None, seen, LETTERS[place], LETTERS[(place + 1) % 5], marks, pairs)]


def write_clip(path: Path, frames: np.ndarray, fps: int = FPS) -> None:
    """Write uint8 frames (T, H, W, 3) as an MP4 of nearly lossless quality (H.264, else MPEG-4)."""
    codec, options = "libx264", {"crf": "8", "preset": "ultrafast"}
    if codec not in av.codecs_available:
        codec, options = "mpeg4", {"qmin": "1", "qmax": "2"}
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=fps, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv420p"
        stream.thread_count = 1  # threads would make the bytes depend on the machine
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(Image.fromarray(frame))))
        container.mux(stream.encode(None))
