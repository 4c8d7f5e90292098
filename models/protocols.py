"""Named settings for pixels, frames and the system prompt, so that runs say which rules they followed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from visionselector_eval.baselines.errors import unknown

TOKEN = 28 * 28  # pixels of one visual token of Qwen2.5-VL

# Each value is the fields of `MediaSettings` that it sets; the rest keeps the checkpoint's own.
PROTOCOLS: dict[str, tuple[str, dict[str, Any]]] = {
    "visionselector": (
        "as published with VisionSelector: 256 to 2048 tokens a picture, pictures re-encoded as JPEG, "
        "32 frames of 256 to 768 tokens",
        {
            "min_pixels": 256 * TOKEN,
            "max_pixels": 1605632,
            "video_min_pixels": 256 * TOKEN,
            "video_max_pixels": 768 * TOKEN,
            "max_num_frames": 32,
            "system_prompt": "You are a helpful assistant.",
            "jpeg": True,
        },
    ),
    "llava_stf": (
        "as published with LLaVA-STF: pictures padded to a square of 336 px",
        {"min_pixels": 336 * 336, "max_pixels": 336 * 336, "pad_square": True},
    ),
    "lmms_eval": (
        "the defaults of lmms-eval's own qwen2_5_vl: 256 to 2048 tokens a picture, 32 frames",
        {
            "min_pixels": 256 * TOKEN,
            "max_pixels": 1605632,
            "video_min_pixels": 256 * TOKEN,
            "video_max_pixels": 1605632,
            "max_num_frames": 32,
        },
    ),
    "lossless": (
        "pictures and frames keep their own size, from 4 to 16384 tokens",
        {
            "min_pixels": 4 * TOKEN,
            "max_pixels": 16384 * TOKEN,
            "video_min_pixels": 4 * TOKEN,
            "video_max_pixels": 16384 * TOKEN,
        },
    ),
    "checkpoint": ("what the checkpoint's own processor configuration says", {}),
}


def media_fields(protocol: str, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Fields of `MediaSettings`: the protocol's, with `overrides` that are not None over them.

    `min_pixels` and `max_pixels` also bound a video's frames where the protocol does not say otherwise.

    Raises
    ------
    InputError: unknown protocol.
    """
    if protocol not in PROTOCOLS:
        raise unknown("protocol", protocol, PROTOCOLS)
    given = {key: value for key, value in (overrides or {}).items() if value is not None}
    fields = {**PROTOCOLS[protocol][1], **given}
    for bound in ("min_pixels", "max_pixels"):
        if bound in given and f"video_{bound}" not in given:
            fields[f"video_{bound}"] = given[bound]
    return fields
