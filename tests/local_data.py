"""Folders of a few documents in the layout of the real benchmarks, as a data root holds them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from visionselector_eval.tasks.local.upstream import members
from visionselector_eval.tasks.tiny.clips import write_clip

PICTURE = Image.new("RGB", (56, 56), "white")


def _documents() -> dict[str, tuple[str, list[dict[str, Any]]]]:
    four = range(4)
    ask = "What is written?"
    choices = ["wind", "sun", "rain", "snow"]
    video_mme = {"duration": "short", "domain": "Knowledge", "sub_category": "Geography", "task_type": "OCR Problems"}
    answers = [{"answer": "yes", "answer_confidence": "yes", "answer_id": k} for k in range(10)]
    open_questions = [{"question_id": i, "question": ask, "answers": answers, "image": PICTURE} for i in four]
    lettered = [
        {
            "index": i,
            "question": "Which?",
            **dict(zip("ABCD", choices, strict=True)),
            "answer": "ABCD"[i],
            "hint": "nan",
            "category": "ocr",
            "L2-category": "perception",
            "source": "web",
            "split": "dev",
            "image": PICTURE,
        }
        for i in four
    ]
    return {
        "docvqa_val": (
            "validation",
            [{"questionId": str(i), "question": ask, "answers": ["yes", "Yes"], "image": PICTURE} for i in four],
        ),
        "chartqa": (
            "test",
            [{"type": "human_test", "question": ask, "answer": str(i), "image": PICTURE} for i in four],
        ),
        "textvqa_val": (
            "validation",
            [
                {"question_id": i, "question": ask, "answers": ["stop"] * 10, "image": PICTURE, "image_id": f"p{i}"}
                for i in four
            ],
        ),
        "ocrbench": (
            "test",
            [
                {
                    "dataset": "IIIT5K",
                    "question": ask,
                    "question_type": "Regular Text Recognition",
                    "answer": ["stop"],
                    "image": PICTURE,
                }
                for _ in four
            ],
        ),
        "scienceqa_img": (
            "test",
            [{"question": "Which?", "choices": choices, "answer": i, "hint": "", "image": PICTURE} for i in four],
        ),
        "ai2d_no_mask": (
            "test",
            [{"question": "Which?", "options": choices, "answer": str(i), "image": PICTURE} for i in four],
        ),
        "mmmu_val": (
            "validation",
            [
                {
                    "id": f"validation_Art_{i}",
                    "question": "Which? <image 1>",
                    "options": str(choices),
                    "question_type": "multiple-choice",
                    "answer": "ABCD"[i],
                    **{f"image_{k}": PICTURE if k == 1 else None for k in range(1, 8)},
                }
                for i in four
            ],
        ),
        "mme": (
            "test",
            [
                {
                    "question_id": f"count/{i // 2}",
                    "question": "Is it one?",
                    "answer": ("Yes", "No")[i % 2],
                    "category": "count",
                    "image": PICTURE,
                }
                for i in four
            ],
        ),
        "pope": (
            "test",
            [
                {
                    "question_id": str(i),
                    "question": "Is there a dog?",
                    "answer": ("yes", "no")[i % 2],
                    "image_source": f"p{i // 2}",
                    "image": PICTURE,
                }
                for i in four
            ],
        ),
        "seedbench": (
            "test",
            [
                {
                    "question_id": str(i),
                    "question": "Which?",
                    **{f"choice_{c}": c for c in "abcd"},
                    "answer": "B",
                    "data_type": "video",
                    "data_id": f"v{i // 2}",
                    "image": [PICTURE, PICTURE],
                }
                for i in four
            ],
        ),
        "vqav2_val": ("validation", [dict(row) for row in open_questions]),
        "vizwiz_vqa_val": ("val", [{**row, "answers": ["yes"] * 10} for row in open_questions]),
        "mmbench_en_dev_static": ("dev", [dict(row) for row in lettered]),
        "mmbench_cn_dev": ("dev", [dict(row) for row in lettered]),
        "gqa": ("testdev", [{"question": "Which?", "answer": "dog", "image": PICTURE} for _ in four]),
        "videomme": (
            "test",
            [
                {
                    "videoID": f"clip{i // 2}",
                    "question": "Which?",
                    "options": [f"{letter}. {word}" for letter, word in zip("ABCD", choices, strict=True)],
                    "answer": "A",
                    "question_id": str(i),
                    **video_mme,
                }
                for i in four
            ],
        ),
        "nextqa_mc_test": (
            "test",
            [
                {"video": i // 2, "question": "why", **{f"a{k}": f"cause {k}" for k in range(5)}, "answer": i}
                for i in four
            ],
        ),
        "mvbench_moving_direction": (
            "train",
            [
                {"video": f"video_{i}.mp4", "question": "Where to?", "candidates": ["Up", "Down"], "answer": "Up"}
                for i in four
            ],
        ),
    }


DOCUMENTS = _documents()
SPLITS = {task: split for task, (split, _) in DOCUMENTS.items()}
# Tasks whose right answers are with a server.
SERVER: dict[str, tuple[str, list[dict[str, Any]]]] = {
    **{
        task: ("test", [{"question_id": i, "question": "What is it?", "image": PICTURE} for i in range(4)])
        for task in ("vqav2_test", "vizwiz_vqa_test")
    },
    **{
        task: ("test", [{**row, "answer": "nan"} for row in DOCUMENTS[original][1]])
        for task, original in (("mmbench_en_test", "mmbench_en_dev_static"), ("mmbench_cn_test", "mmbench_cn_dev"))
    },
}
# Where the clips of each video task go: flat, and in upstream's sub folders.
CLIPS = {
    "videomme": [f"videomme/videos/data/clip{i}.mp4" for i in range(2)],
    "nextqa_mc_test": [f"nextqa/videos/NExTVideo/{i}.mp4" for i in range(2)],
    "mvbench_moving_direction": [f"mvbench_moving_direction/videos/video_{i}.mp4" for i in range(4)],
}


def dataset(rows: list[dict[str, Any]]) -> datasets.Dataset:
    """Rows with their images as the hub has them."""
    plain = [{k: v for k, v in row.items() if not _is_image(v)} for row in rows]
    images: dict[str, Any] = {}
    for row in rows:
        for name, value in row.items():
            if _is_image(value):
                images[name] = datasets.List(datasets.Image()) if isinstance(value, list) else datasets.Image()
    plain = [{k: v for k, v in row.items() if k not in images} for row in plain]
    features = {**datasets.Dataset.from_list(plain).features, **images}
    order = list(rows[0])
    return datasets.Dataset.from_list(rows, features=datasets.Features({name: features[name] for name in order}))


def _is_image(value: Any) -> bool:
    return isinstance(value, Image.Image) or (isinstance(value, list) and bool(value) and _is_image(value[0]))


def write_task(root: Path, task: str, rows: list[dict[str, Any]] | None = None, clips: bool = True) -> Path:
    """One parquet file of `task` below `root`, and its clips; returns the file."""
    split, own = {**DOCUMENTS, **SERVER}[task]
    file = root / task / f"{split}.parquet"
    file.parent.mkdir(parents=True, exist_ok=True)
    dataset(own if rows is None else rows).to_parquet(file)
    for clip in CLIPS.get(task, []) if clips else []:
        write_clips(root / clip)
    return file


def write_mvbench(root: Path) -> None:
    """The 20 tasks of the group mvbench below `root`, with clips of their own in one shared folder."""
    rows = DOCUMENTS["mvbench_moving_direction"][1]
    for of in members("mvbench"):
        names = [f"{of.task}_{i}.mp4" for i in range(len(rows))]
        (root / of.task).mkdir(parents=True, exist_ok=True)
        own = [{**row, "video": name} for row, name in zip(rows, names, strict=True)]
        dataset(own).to_parquet(root / of.task / "train.parquet")
        write_clips(*(root / "mvbench" / "videos" / name for name in names))


def break_image(file: Path, number: int) -> None:
    """Put bytes that are no image into one row of a parquet file."""
    table = pq.read_table(file)
    place, column = table.schema.get_field_index("image"), table.column("image").to_pylist()
    column[number] = {"bytes": b"no image", "path": None}
    field = table.schema.field("image")
    pq.write_table(table.set_column(place, field, pa.array(column, type=field.type)), file)


def write_clips(*files: Path) -> None:
    """A short clip in each of these places."""
    frames = np.stack([np.full((56, 56, 3), 40 * t, dtype=np.uint8) for t in range(4)])
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_clip(file, frames)
