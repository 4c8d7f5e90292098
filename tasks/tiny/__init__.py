"""The embedded benchmarks: small mirrors of public ones, generated on first use, scored by upstream's own task code.

`generate(name, seed, n)` makes documents; `visionselector_eval.tasks.tiny.store` keeps them in a cache folder in the
layout that lmms-eval loads. The evaluation documents are those of `EVALUATION_SEED`: train on any other seed.
"""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import numpy as np

from visionselector_eval.baselines.errors import InputError, unknown
from visionselector_eval.tasks.tiny import clips, pictures
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

    Attributes
    ----------
    name: our task name, e.g. "tiny_chartqa".
    upstream: the lmms-eval task whose prompts and metrics it uses.
    config: that task's YAML file below lmms-eval's `tasks` folder.
    split: the split that the upstream task reads.
    generator: draws one scene.
    pair: documents a scene (2 for MME, else 1).
    """

    name: str
    upstream: str
    config: str
    split: str
    generator: Generator
    pair: int = 1


MIRRORS: dict[str, Mirror] = {
    m.name: m
    for m in (
        Mirror("tiny_docvqa_val", "docvqa_val", "docvqa/docvqa_val.yaml", "validation", pictures.form),
        Mirror("tiny_chartqa", "chartqa", "chartqa/chartqa.yaml", "test", pictures.chart),
        Mirror("tiny_textvqa_val", "textvqa_val", "textvqa/textvqa_val.yaml", "validation", pictures.signs),
        Mirror("tiny_pope", "pope", "pope/pope.yaml", "test", pictures.presence),
        Mirror("tiny_mme", "mme", "mme/mme.yaml", "test", pictures.pairs, pair=2),
        Mirror("tiny_scienceqa_img", "scienceqa_img", "scienceqa/scienceqa_img.yaml", "test", pictures.diagram),
        Mirror(
            "tiny_mvbench_moving_direction",
            "mvbench_moving_direction",
            "mvbench/mvbench_moving_direction.yaml",
            "train",
            clips.moving,
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
