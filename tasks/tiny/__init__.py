"""The embedded benchmarks: small mirrors of public ones, generated on first use, scored by upstream's own task code.

`generate(name, seed, n)` makes documents; `visionselector_eval.tasks.tiny.store` keeps them in a cache folder in the
layout that lmms-eval loads. The evaluation documents are those of `EVALUATION_SEED`: train on any other seed.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import numpy as np

from visionselector_eval.baselines.contract.errors import InputError, unknown
from visionselector_eval.tasks.tiny import clips, images, reading, scenes
from visionselector_eval.tasks.tiny.document import CELL, Document, Generator, Mark

__all__ = [
    "CELL",
    "EVALUATION_SEED",
    "GENERATOR_VERSION",
    "MIRRORS",
    "Document",
    "Mark",
    "Mirror",
    "generate",
    "mirror",
]

EVALUATION_SEED = 0
"""The seed of the documents that sweeps ask. Never train on it."""

GENERATOR_VERSION = 1
"""Raise it whenever a generator draws or asks something else: caches and digests then change with it."""


@dataclass(frozen=True)
class Mirror:
    """One embedded benchmark.

    Attributes:
        name: our task name, e.g. "tiny_chartqa".
        upstream: the lmms-eval task whose prompts and metrics it uses.
        config: that task's YAML file below lmms-eval's `tasks` folder.
        split: the split that the upstream task reads.
        generator: draws one scene.
        pair: documents a scene (2 for MME and MMBench, else 1).
        media: where upstream looks for what is shown: the column `image`; the columns `image_1` to `image_7`; a list of
            `frames` in the column `image`; or a `clip`, an MP4 file.
        clip: for a clip, the column that names the file (without or with ".mp4").
        changes: further keys of the task file to replace.
    """

    name: str
    upstream: str
    config: str
    split: str
    generator: Generator
    pair: int = 1
    media: Literal["image", "images", "frames", "clip"] = "image"
    clip: str = ""
    changes: Mapping[str, Any] = field(default_factory=dict)


# Upstream lets MMBench's answers grow to 1024 tokens, for models that reason before they name a letter. The embedded
# model before its training would write on to the limit.
_SHORT: dict[str, Any] = {
    "generation_kwargs": {
        "until": ["ASSISTANT:"],
        "max_new_tokens": 16,
        "temperature": 0,
        "top_p": 1.0,
        "num_beams": 1,
        "do_sample": False,
    }
}

MIRRORS: dict[str, Mirror] = {
    m.name: m
    for m in (
        Mirror("tiny_docvqa_val", "docvqa_val", "docvqa/docvqa_val.yaml", "validation", images.form),
        Mirror("tiny_chartqa", "chartqa", "chartqa/chartqa.yaml", "test", images.chart),
        Mirror("tiny_textvqa_val", "textvqa_val", "textvqa/textvqa_val.yaml", "validation", images.signs),
        Mirror("tiny_pope", "pope", "pope/pope.yaml", "test", images.presence),
        Mirror("tiny_mme", "mme", "mme/mme.yaml", "test", images.pairs, pair=2),
        Mirror("tiny_scienceqa_img", "scienceqa_img", "scienceqa/scienceqa_img.yaml", "test", images.diagram),
        Mirror(
            "tiny_mvbench_moving_direction",
            "mvbench_moving_direction",
            "mvbench/mvbench_moving_direction.yaml",
            "train",
            clips.moving,
            media="clip",
            clip="video",
        ),
        Mirror("tiny_ocrbench", "ocrbench", "ocrbench/ocrbench.yaml", "test", reading.ocr),
        Mirror("tiny_ai2d_no_mask", "ai2d_no_mask", "ai2d/ai2d_no_mask.yaml", "test", images.flow),
        Mirror("tiny_mmmu_val", "mmmu_val", "mmmu/mmmu_val.yaml", "validation", scenes.exam, media="images"),
        Mirror("tiny_seedbench", "seedbench", "seedbench/seedbench.yaml", "test", clips.procedure, media="frames"),
        Mirror(
            "tiny_videomme", "videomme", "videomme/videomme.yaml", "test", clips.events, media="clip", clip="videoID"
        ),
        Mirror(
            "tiny_nextqa_mc_test",
            "nextqa_mc_test",
            "nextqa/nextqa_mc_test.yaml",
            "test",
            clips.causes,
            media="clip",
            clip="video",
        ),
        Mirror("tiny_vqav2_val", "vqav2_val", "vqav2/vqav2_val.yaml", "validation", scenes.vqa),
        # Upstream joins GQA's images from a second data set of the hub; here they are in the first.
        Mirror("tiny_gqa", "gqa", "gqa/gqa.yaml", "testdev", scenes.relations, changes={"process_docs": None}),
        Mirror("tiny_vizwiz_vqa_val", "vizwiz_vqa_val", "vizwiz_vqa/vizwiz_vqa_val.yaml", "val", scenes.snapshot),
        Mirror(
            "tiny_mmbench_en_dev_static",
            "mmbench_en_dev_static",
            "mmbench/mmbench_en_dev_static.yaml",
            "dev",
            scenes.choices,
            pair=2,
            changes=_SHORT,
        ),
        Mirror(
            "tiny_mmbench_cn_dev",
            "mmbench_cn_dev",
            "mmbench/mmbench_cn_dev.yaml",
            "dev",
            partial(scenes.choices, chinese=True),
            pair=2,
            changes=_SHORT,
        ),
    )
}


def mirror(name: str) -> Mirror:
    """The mirror called `name`; `InputError` with the nearest name if there is none."""
    if name not in MIRRORS:
        raise unknown("embedded benchmark", name, MIRRORS)
    return MIRRORS[name]


def generate(name: str, seed: int, n: int) -> list[Document]:
    """The first `n` documents of the mirror `name` for `seed`.

    A document depends on name, seed and its place alone, so a longer list starts with the shorter one. Raises
    `InputError` for an unknown name, a negative seed, `n` < 1, or an odd `n` where documents come in pairs.
    """
    found = mirror(name)
    if n < 1 or seed < 0:
        raise InputError(
            f"cannot generate {n} documents with seed {seed}: both must be whole numbers, n >= 1, seed >= 0"
        )
    if n % found.pair:
        raise InputError(f"cannot generate {n} documents of {name}: they come in pairs, ask for an even number")
    stream = zlib.crc32(name.encode())
    return [
        document
        for scene in range(n // found.pair)
        for document in found.generator(np.random.default_rng([stream, seed, scene]), scene)
    ]
