"""Writes a trained backbone as a checkpoint folder of the family's layout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

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
