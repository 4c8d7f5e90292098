"""Batches of the stages: documents of the embedded benchmarks with other seeds than sweeps use, as tensors."""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from visionselector_eval.harness.training.tiny import network
from visionselector_eval.harness.training.tiny.lessons import COLOURS, SHAPES, Lesson, lesson
from visionselector_eval.tasks import tiny
from visionselector_eval.tasks.tiny import canvas, images

PICTURES = {
    "tiny_docvqa_val": 0.2,
    "tiny_chartqa": 0.2,
    "tiny_textvqa_val": 0.12,
    "tiny_pope": 0.15,
    "tiny_mme": 0.15,
    "tiny_scienceqa_img": 0.18,
}
"""The image benchmarks that are trained on, and how often."""

TALL = "tiny_docvqa_val"  # every second of its scenes is taller than wide
CLIPS = "tiny_mvbench_moving_direction"
KINDS = (*PICTURES, CLIPS)
TRAIN_SEED, CHECK_SEED = 1_000_003, 2_000_003
STAGES = ("vision", "language", "joint")
TEXT = 128  # tokens of packed questions a scene
OPEN = ("open", "doc", "chart", "text", "diagram_open", "video_open")
OPEN_FIRST = 250  # steps of the stage language with open questions alone
SHEETS_UNTIL = 500  # steps of the stage vision of which every second shows sheets


@functools.cache
def evaluation_digests(n: int = 64) -> frozenset[str]:
    """Digests of the first `n` documents of each mirror that sweeps ask."""
    return frozenset(d.digest() for name in KINDS for d in tiny.generate(name, tiny.EVALUATION_SEED, n))


def documents(name: str, seed: int, scene: int) -> list[Any]:
    """The documents of one scene, as `tasks.tiny.generate` makes them; never one that sweeps ask."""
    if seed == tiny.EVALUATION_SEED:
        raise ValueError("the evaluation's documents are not for training: choose another seed")
    made = tiny.MIRRORS[name].generator(np.random.default_rng([zlib.crc32(name.encode()), seed, scene]), scene)
    for document in made:
        if document.digest() in evaluation_digests():
            raise ValueError(f"scene {scene} of {name} with seed {seed} is a document that sweeps ask")
    return made


def sheet(rng: np.random.Generator) -> Lesson:
    """A page full of single cells in the manner of all image mirrors: glyphs without relations."""
    base = ((236, 232, 222), (240, 240, 244), (222, 230, 236), None, None)[int(rng.integers(5))]
    page = canvas.Canvas(rng, 8, 8, base, rough=float(rng.uniform(4, 20)))
    cells, shows = [], []

    def pick(items: Sequence[str]) -> str:
        return items[int(rng.integers(len(items)))]

    for cell in range(64):
        row, column = divmod(cell, 8)
        way = int(rng.integers(8))
        parts: tuple[str, str] = ("", "")
        if way == 0:
            parts = pick(images.GLYPHS), pick(images.GLYPHS)
            page.write(row, column, "".join(parts), 19, canvas.INK, bold=True)
        elif way == 1:
            parts = pick(images.LABELS), ""
            page.write(row, column, parts[0], 13, (60, 60, 80))
        elif way == 2:
            number = str(int(rng.integers(11, 95)))
            parts = number[0], number[1]
            page.write(row, column, number, 18, bold=True)
        elif way == 3:
            parts = pick(images.PEOPLE), ""
            page.write(row, column, parts[0], 13)
        elif way == 4:
            parts = pick(COLOURS), pick(images.WORDS)
            x, y = column * 28, row * 28
            page.draw.rectangle((x, y, x + 27, y + 27), canvas.COLOURS[parts[0]], (30, 30, 30))
            light = parts[0] == "yellow"
            fill = canvas.INK if light else (255, 255, 255)
            page.write(row, column, parts[1].upper(), 15, fill, bold=True)
        elif way == 5:
            parts = pick(COLOURS), pick(SHAPES)
            page.shape(row, column, parts[1], parts[0])
        elif way == 6:
            parts = pick("PQRSTUVW"), ""
            x, y = column * 28 + 14, row * 28 + 14
            page.draw.ellipse((x - 11, y - 11, x + 11, y + 11), (250, 250, 250), canvas.INK)
            page.write(row, column, parts[0], 17, bold=True, jitter=0)
        if parts[0]:
            cells.append(cell)
            shows.append((*parts, "?", "?"))
    page.decoys()
    places = np.array(cells)
    nowhere = np.full(len(places), -1)
    return Lesson(np.asarray(page.image)[None], places, shows, places, [], ("", "", "", -1), nowhere)


class Packer:
    """Turns lessons of one grid into tensors, with the prompts of a family."""

    def __init__(self, family: type[network.Network] = network.Network) -> None:
        self.family, self.tokens = family, family.tokenizer()
        self._ids: dict[str, list[int]] = {}
        self.none = self.tokens.pad_token_id
        self.prefix = self.ids(family.before)
        letters = [(f"\n{x}. ", x) for x in "ABCDE"] + [(f"\n({x}) ", x) for x in "BCD"] + [("\nOption:\n(A) ", "A")]
        self.options = {self.ids(text)[0]: letter for text, letter in letters}
        self.content = {self.ids(text)[0] for text in (*network.WORDS, *"PQRSTUVW")}

    def ids(self, text: str) -> list[int]:
        """Token ids of a text, remembered."""
        if text not in self._ids:
            if len(self._ids) > 50_000:
                self._ids.clear()
            self._ids[text] = self.tokens(text, add_special_tokens=False)["input_ids"]
        return self._ids[text]

    def code(self, text: str) -> int:
        """Codebook entry of a text; -1 where nothing is known."""
        if text == "?":
            return -1
        return self.ids(text)[0] if text else self.none

    def pack(
        self, lessons: list[Lesson], rng: np.random.Generator, share: float, only_asked: bool = False
    ) -> dict[str, Any]:
        """Tensors of a batch; `share` of the visual tokens is kept, and below 1 one token of a group may be dropped.

        Long because it fills fifteen arrays side by side, position by position.
        """
        b, (t, h, w) = len(lessons), lessons[0].grid
        n, most = t * h * w, max(len(x.cells) for x in lessons)
        k = n if share >= 1 else max(int(share * n), 20)
        cells = np.zeros((b, most), np.int64)
        codes = np.full((b, most, 4), -1, np.int64)
        keep = np.zeros((b, k), np.int64)
        ids = np.full((b, TEXT), self.none, np.int64)
        target = np.full((b, TEXT), -100, np.int64)
        segments = np.full((b, TEXT), -1, np.int64)
        offsets = np.zeros((b, TEXT), np.int64)
        aim = np.full((b, TEXT), -1, np.int64)
        text_aims = {name: np.zeros((b, TEXT, TEXT), bool) for name in ("letter", "word", "option")}
        shown = np.full((b, k), -2, np.int64)
        partners = np.full((b, most), -1, np.int64)
        kinds: list[list[str]] = []
        for i, x in enumerate(lessons):
            cells[i, : len(x.cells)] = x.cells
            partners[i, : len(x.cells)] = x.partners
            codes[i, : len(x.cells)] = [[self.code(s) for s in texts] for texts in x.shows]
            if share >= 1:
                keep[i] = np.arange(n)
            else:
                keep[i] = _kept(x, rng, n, k)
            group_of = np.full(n, -2, np.int64)
            group_of[x.cells] = x.groups
            shown[i] = group_of[keep[i]]
            asked = [x.asked] if only_asked else [x.questions[int(j)] for j in rng.permutation(len(x.questions))]
            at = 0
            used: list[str] = []
            for prompt, answer, kind, group in asked:
                front = self.ids(self.family.after.format(prompt))
                back = [*self.ids(answer), self.tokens.eos_token_id]
                row = [*front, *back]
                if at + len(row) > TEXT:
                    continue
                here = slice(at, at + len(row))
                ids[i, here], segments[i, here], offsets[i, here] = row, len(used) + 1, np.arange(len(row))
                target[i, at + len(front) - 1 : at + len(row) - 1] = back
                said = slice(at + len(front) - 1, at + len(row) - 1)  # where the answer's tokens are predicted
                aim[i, said] = group
                options = [j for j, token in enumerate(front) if token in self.options]
                first = options[0] if options else len(front)
                for j, token in enumerate(front[:first]):
                    if token in self.content:
                        text_aims["word"][i, said, at + j] = True
                for j in options:
                    text_aims["letter"][i, at + j + 1, at + j] = True
                    if self.options[front[j]] == answer:
                        text_aims["option"][i, at + len(front) - 1, at + j + 1] = True
                at += len(row)
                used.append(kind)
            kinds.append(used)
        arrays = {
            "cells": cells,
            "codes": codes,
            "keep": keep,
            "ids": ids,
            "target": target,
            "segments": segments,
            "offsets": offsets,
            "aim": aim,
            "shown": shown,
            "partners": partners,
        }
        out: dict[str, Any] = {name: torch.from_numpy(a) for name, a in arrays.items()}
        out["pixels"] = torch.from_numpy(np.stack([x.pixels for x in lessons]))
        out["grid"], out["kinds"] = (t, h, w), kinds
        out["text_aims"] = {name: torch.from_numpy(a) for name, a in text_aims.items()}
        return out


def _kept(lesson: Lesson, rng: np.random.Generator, n: int, k: int) -> np.ndarray:
    """(k,) of the n tokens of a lesson's image, ascending: those that tell something, others drawn at random."""
    informative = list(lesson.cells)
    if rng.random() < 0.6:  # each group keeps at least one of its tokens
        by_group = defaultdict(list)
        for cell, group in zip(lesson.cells, lesson.groups, strict=True):
            by_group[int(group)].append(int(cell))
        informative = []
        for members in by_group.values():
            number = int(rng.integers(1, len(members) + 1))
            informative += [members[int(j)] for j in rng.permutation(len(members))[:number]]
    free = np.setdiff1d(np.arange(n), lesson.cells)
    rest = rng.permutation(free)[: k - len(informative)]
    return np.sort(np.concatenate([np.array(informative[:k], np.int64), rest]))


class Batches(torch.utils.data.Dataset):
    """Batch number i of a stage; every process takes its own scenes."""

    def __init__(
        self, stage: str, rank: int, world: int, size: int, family: type[network.Network] = network.Network
    ) -> None:
        self.stage, self.rank, self.world, self.size, self.family = stage, rank, world, size, family
        self._packer: Packer | None = None

    def __getitem__(self, step: int) -> dict[str, Any]:
        torch.set_num_threads(1)
        self._packer = self._packer or Packer(self.family)
        stage, size = self.stage, self.size
        rng = np.random.default_rng([TRAIN_SEED, list(STAGES).index(stage), step, self.rank])
        first = (step * self.world + self.rank) * 64  # scenes never repeat within a stage
        seed = TRAIN_SEED + list(STAGES).index(stage)
        if stage == "vision" and step % 2 == 0 and step < SHEETS_UNTIL:
            return self._packer.pack([sheet(rng) for _ in range(size)], rng, 1.0)
        group = "square"
        if self.family.clips:
            group = "clip" if step % 4 == 3 else "tall" if step % 16 == 6 else "square"
        size = size // 2 if group == "clip" else size * 3 // 4 if group == "tall" else size
        made: list[Lesson] = []
        for i in range(size):
            scene = first + 2 * i
            name = CLIPS
            if group == "tall":
                name, scene = TALL, scene + 1
            elif group == "square":
                name = list(PICTURES)[int(rng.choice(len(PICTURES), p=list(PICTURES.values())))]
                if name != TALL:
                    scene += int(rng.integers(2))
            made.append(lesson(name, documents(name, seed, scene)[0], rng))
        if stage == "language" and step < OPEN_FIRST:
            made = [dataclasses.replace(x, questions=[q for q in x.questions if q[2] in OPEN]) for x in made]
        share = 1.0
        if stage == "language":
            share = 0.16 if group == "clip" else 0.3
        elif stage == "joint" and rng.random() < 0.6:
            share = float((0.2, 0.35, 0.5)[int(rng.integers(3))])
        return self._packer.pack(made, rng, share)
