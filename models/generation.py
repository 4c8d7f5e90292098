"""Generation settings: what tasks may say and how transformers takes it. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

# What transformers' generate() understands; tasks also carry keys of other model families, which mean nothing here.
GENERATION_KEYS = (
    "do_sample",
    "length_penalty",
    "max_new_tokens",
    "min_new_tokens",
    "min_p",
    "no_repeat_ngram_size",
    "num_beams",
    "repetition_penalty",
    "temperature",
    "top_k",
    "top_p",
)
DEFAULT_MAX_NEW_TOKENS = 128  # lmms-eval's qwen2_5_vl, for tasks that say nothing (textvqa_val)


def generation_arguments(generation: Mapping[str, Any]) -> dict[str, Any]:
    """A task's generation settings as transformers' `generate` takes them.

    Temperature above 0 samples. Temperature 0, or none without `do_sample`, is greedy, whatever the checkpoint's own
    generation config says, as in lmms-eval's models.
    """
    arguments = {k: v for k, v in generation.items() if k in GENERATION_KEYS and v is not None}
    arguments.setdefault("max_new_tokens", DEFAULT_MAX_NEW_TOKENS)
    arguments.setdefault("num_beams", 1)
    temperature = arguments.get("temperature")
    if float(temperature or 0) > 0 or (temperature is None and arguments.get("do_sample")):
        arguments["do_sample"] = True
    else:
        # None takes the checkpoint's own sampling values away, which transformers else warns about.
        arguments.update(do_sample=False, temperature=None, top_p=None, top_k=None)
    return arguments


def cut(text: str, until: Sequence[str]) -> str:
    """`text` up to the first of the stop strings."""
    for stop in until:
        if stop:
            text = text.split(stop, 1)[0]
    return text
