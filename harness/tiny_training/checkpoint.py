"""Writes a trained backbone as a checkpoint folder of the family's layout."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig

from visionselector_eval.harness.tiny_training.network import IMAGE_PROCESSOR, tokenizer


def write_checkpoint(model: Any, folder: Path) -> None:
    """Weights in bfloat16, tokenizer with chat template, processors.

    Parameters
    ----------
    model: a `Qwen2_5_VLForConditionalGeneration`; it is bfloat16 afterwards. folder: made where it is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokens = tokenizer()
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
    (folder / "preprocessor_config.json").write_text(json.dumps(IMAGE_PROCESSOR, indent=2) + "\n")
    video = {**IMAGE_PROCESSOR, "video_processor_type": "Qwen2VLVideoProcessor"}
    del video["image_processor_type"]
    (folder / "video_preprocessor_config.json").write_text(json.dumps(video, indent=2) + "\n")


CARD = """---
license: apache-2.0
---

# The embedded model

Trained from nothing on generated pictures; see docs/embedded.md for what it is for, and for the command. A photograph
means nothing to it.

Exact match in percent on fresh documents that neither training nor sweeps use, with all visual tokens, by the batched
forward of the trainer:

| embedded benchmark | its own question |
|---|---:|
{asked}

| kind of question | all that could be asked |
|---|---:|
{other}

Weak: telling whether a thing is left of another (`position`) and counting (`count`, `count_open`) are near chance; the
yes/no questions of `tiny_mme` hold a share of both. Embedded benchmarks that are not in the first table were not
trained on: expect chance.

`training.jsonl` is the log of all stages.{note}
"""


def finish_checkpoint(folder: Path, logs: Mapping[str, Path], figures: Path, note: str = "") -> None:
    """Make every weight of a checkpoint bfloat16, and write its card and the log of its training.

    Parameters
    ----------
    logs: JSON lines of each stage. figures: what stage evaluate wrote. note: a paragraph for the card.
    """
    weights = folder / "model.safetensors"
    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})
    weights.chmod(0o644)
    lines = [
        json.dumps({"stage": stage, **json.loads(line)})
        for stage, path in logs.items()
        for line in (path.read_text().splitlines() if path.is_file() else ())
    ]
    (folder / "training.jsonl").write_text("\n".join(lines) + "\n")
    found = json.loads(figures.read_text()) if figures.is_file() else {"asked": {}, "other": {}}
    tables = {part: "\n".join(f"| {name} | {value} |" for name, value in found[part].items()) for part in found}
    (folder / "README.md").write_text(CARD.format(**tables, note=f" {note}" if note else ""))
