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


def named_stops(until: Any, filled_in: str | None = None) -> tuple[str, ...]:
    """The stop strings that a task names itself, of its setting `until`: nothing, a string or a list of strings.

    lmms-eval puts a task's few-shot delimiter (an empty line unless it says otherwise) where the task names none. That
    would cut answers at their first empty line, and no model of its own obeys it. A task may name the same text.

    Args:
        filled_in: the delimiter as the task's configuration holds it. What was filled in is the same object; what a
            task names was read from its file and is another, even where the text is equal.
    """
    if until is None:
        return ()
    stops = [until] if isinstance(until, str) else list(until)
    return tuple(str(stop) for stop in stops if filled_in is None or stop is not filled_in)


def cut(text: str, until: Sequence[str]) -> str:
    """`text` up to the first of the stop strings."""
    for stop in until:
        if stop:
            text = text.split(stop, 1)[0]
    return text


def kv_cache(of: Any) -> Any:
    """The keys and values held by a call or an output of transformers' models; None where there are none.

    Args:
        of: the keyword arguments of a model's or a layer's call, or the model's output (which is a mapping, too).

        transformers 5.24 calls it `cache`, the releases before it `past_key_values`; this is the one place that knows.
    """
    # The new name first: newer outputs answer to the old one with a warning.
    return of["cache"] if "cache" in of else of.get("past_key_values")
