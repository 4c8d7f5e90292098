"""Writes a trained backbone as a checkpoint folder of the family's layout."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig

from visionselector_eval.harness.training.tiny.network import Network


def write_checkpoint(model: Any, folder: Path, family: type[Network] = Network) -> None:
    """Weights in bfloat16, tokenizer with chat template, processors.

    Args:
        model: as `family.create` makes it; it is bfloat16 afterwards.
        folder: made where it is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokens = family.tokenizer()
    # Released Qwen2.5 checkpoints carry a repetition penalty of 1.05: one is kept here, so that every test meets it,
    # as small as answers that repeat words of the question need.
    model.generation_config = GenerationConfig(
        do_sample=False,
        repetition_penalty=1.001,
        eos_token_id=[tokens.eos_token_id, tokens.pad_token_id],
        pad_token_id=tokens.pad_token_id,
    )
    model.bfloat16().save_pretrained(folder)
    tokens.save_pretrained(folder)
    family.write_processors(folder)


CARD = """---
license: apache-2.0
---

# {title}

Trained from scratch on generated images; see docs/embedded.md for what it is for, and for the command. A photograph
means nothing to it.

Exact match in percent on fresh documents that neither training nor sweeps use, with all visual tokens, by the batched
forward of the trainer{shown}:

| embedded benchmark | its own question |
|---|---:|
{asked}

| kind of question | all that could be asked |
|---|---:|
{other}

{weak}

`training.jsonl` is the log of all stages.{note}
"""

_WEAK = """Weak: telling whether a thing is left of another (`position`) and counting (`count`, `count_open`) are near
chance; the yes/no questions of `tiny_mme` hold a share of both. Embedded benchmarks that are not in the first table
were not trained on: expect chance."""
_SQUARE = """

Images that are not 224 x 224, such as every second document of `tiny_docvqa_val`, are padded and scaled: what they
show then no longer fills one patch, and is not read. The tables are of square images alone."""
_CARDS: dict[str, dict[str, str]] = {
    "qwen2_5_vl": {"title": "The embedded model", "shown": "", "weak": _WEAK},
    "llava": {
        "title": "The embedded LLaVA-1.5",
        "shown": ", on images of 224 x 224 pixels",
        "weak": _WEAK + _SQUARE,
    },
    "llava_stf": {
        "title": "The embedded LLaVA-1.5 with trained token fusion",
        "shown": ", on images of 224 x 224 pixels",
        "weak": _WEAK + _SQUARE,
    },
}


def finish_checkpoint(
    folder: Path, logs: Mapping[str, Path], figures: Path, note: str = "", family: str = Network.family
) -> None:
    """Make every weight of a checkpoint bfloat16, and write its card and the log of its training.

    Args:
        logs: JSON lines of each stage.
        figures: what stage evaluate wrote.
        note: a sentence for the card.
        family: whose.
    """
    weights = folder / "model.safetensors"
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})
    weights.chmod(0o644)
    stored = folder / "config.json"
    stored.write_text(
        stored.read_text(encoding="utf-8").replace('"dtype": "float32"', '"dtype": "bfloat16"'), encoding="utf-8"
    )
    lines = [
        json.dumps({"stage": stage, **json.loads(line)})
        for stage, path in logs.items()
        for line in (path.read_text(encoding="utf-8").splitlines() if path.is_file() else ())
    ]
    (folder / "training.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    found = json.loads(figures.read_text(encoding="utf-8")) if figures.is_file() else {"asked": {}, "other": {}}
    tables = {part: "\n".join(f"| {name} | {value} |" for name, value in found[part].items()) for part in found}
    card = CARD.format(**_CARDS[family], **tables, note=f" {note}" if note else "")
    (folder / "README.md").write_text(card, encoding="utf-8")
