"""The video mirror: one object moves through a short clip, and no single frame tells where to."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
from PIL import Image, ImageDraw

from visionselector_eval.tasks.tiny.canvas import COLOURS, SHAPES, Canvas, draw_shape, pick
from visionselector_eval.tasks.tiny.document import CELL, Document, Mark

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
    dx, dy = DIRECTIONS[answer]
    margin, side, reach = CELL // 2, SIDE * CELL, STEP * (FRAMES - 1)
    start = []
    for step in (dx, dy):
        low, high = margin + max(0, -step) * reach, side - margin - max(0, step) * reach
        start.append(int(rng.integers(low, high)))
    path = [(start[0] + dx * STEP * t, start[1] + dy * STEP * t) for t in range(FRAMES)]
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
