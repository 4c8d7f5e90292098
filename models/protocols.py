"""Named settings for pixels, frames and prompts, so that runs say which rules they followed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any, NamedTuple

from visionselector_eval.baselines.contract.errors import unknown

TOKEN = 28 * 28  # pixels of one visual token of Qwen2.5-VL


class Protocol(NamedTuple):
    """One row of the table.

    Attributes:
        about: what it is, in one line.
        fields: the fields of `MediaSettings` that it sets; the rest keeps the checkpoint's own.
        media_first: every image and video stands before one text, as lmms-eval's simple models ask; else where the
            task's own messages have it.
        new_tokens: task -> (the task's own `max_new_tokens`, the one that replaces it). Another value was asked for by
            the user, and stays.
    """

    about: str
    fields: Mapping[str, Any]
    media_first: bool = False
    new_tokens: Mapping[str, tuple[int, int]] = MappingProxyType({})


PROTOCOLS: dict[str, Protocol] = {
    "visionselector": Protocol(
        "as published with VisionSelector: 256 to 2048 tokens an image, images re-encoded as JPEG and before the "
        "text, 32 frames of 256 to 768 tokens, fewer where two frames a second are more than 300",
        {
            "min_pixels": 256 * TOKEN,
            "max_pixels": 2048 * TOKEN,
            "video_min_pixels": 256 * TOKEN,
            "video_max_pixels": 768 * TOKEN,
            "max_num_frames": 32,
            "system_prompt": "You are a helpful assistant.",
            "jpeg": True,
            "pillow_resize": "bounded",
            "share_pixels": "sampled",
        },
        media_first=True,
        # Of the thirteen tasks only this one had another limit in the published run than in lmms-eval 0.7.
        new_tokens={"mmmu_val": (128, 16), "tiny_mmmu_val": (128, 16)},
    ),
    "llava_stf": Protocol(
        "as published with LLaVA-STF: images padded to a square of 336 px",
        {"side": 336, "pad_square": True},
    ),
    "lmms_eval": Protocol(
        "as lmms-eval's own model of the family: for qwen2_5_vl 256 to 2048 tokens an image, 32 frames of 256 to 768 "
        "tokens; for llava_hf what the checkpoint says",
        {
            "min_pixels": 256 * TOKEN,
            "max_pixels": 2048 * TOKEN,
            "video_min_pixels": 256 * TOKEN,
            "video_max_pixels": 768 * TOKEN,
            "max_num_frames": 32,
            "pillow_resize": "rounded",
            "share_pixels": "shown",
        },
    ),
    "square_1008": Protocol(
        "as CDPruner is published on Qwen2.5-VL: images padded to a square of 1008 px (1296 tokens)",
        {"side": 1008, "pad_square": True},
    ),
    "square_896": Protocol(
        "as other papers on Qwen2.5-VL: images stretched to a square of 896 px (1024 tokens)",
        {"side": 896},
    ),
    "lossless": Protocol(
        "images and frames keep their own size, from 4 to 16384 tokens",
        {
            "min_pixels": 4 * TOKEN,
            "max_pixels": 16384 * TOKEN,
            "video_min_pixels": 4 * TOKEN,
            "video_max_pixels": 16384 * TOKEN,
        },
    ),
    "checkpoint": Protocol("what the checkpoint's own processor configuration says", {}),
}


def protocol_named(name: str) -> Protocol:
    """The row of this name.

    Raises:
        InputError: unknown protocol, with the nearest one.
    """
    if name not in PROTOCOLS:
        raise unknown("protocol", name, PROTOCOLS)
    return PROTOCOLS[name]


def media_fields(protocol: str, overrides: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Fields of `MediaSettings`: the protocol's, with `overrides` that are not None over them.

    `min_pixels` and `max_pixels` also bound a video's frames, which stay below the protocol's own largest frame unless
    the lower bound is above it; and they take the place of a fixed `side`.

    Raises:
        InputError: unknown protocol.
    """
    own = protocol_named(protocol).fields
    given = {key: value for key, value in (overrides or {}).items() if value is not None}
    fields = {**own, **given}
    if given.keys() & {"min_pixels", "max_pixels"} and "side" not in given:
        fields.pop("side", None)
    if "min_pixels" in given and "video_min_pixels" not in given:
        fields["video_min_pixels"] = given["min_pixels"]
    if "max_pixels" in given and "video_max_pixels" not in given:
        fields["video_max_pixels"] = min(given["max_pixels"], own.get("video_max_pixels", given["max_pixels"]))
    low, high = (fields.get(f"video_{bound}") for bound in ("min_pixels", "max_pixels"))
    if low and high and low > high and "video_max_pixels" not in given:
        fields["video_max_pixels"] = low
    return fields


def new_tokens(protocol: str, task: str, generation: Mapping[str, Any]) -> dict[str, Any]:
    """A task's generation settings under a protocol.

    Args:
        task: lmms-eval's name of it.
        generation: as the task gives them.
    """
    own, published = protocol_named(protocol).new_tokens.get(task, (None, None))
    if own is None or generation.get("max_new_tokens") != own:
        return dict(generation)
    return {**generation, "max_new_tokens": published}


def arranged(protocol: str, messages: Sequence[Mapping[str, Any]], text: str) -> list[dict[str, Any]]:
    """A task's conversation under a protocol: as it is, or all media and then the text.

    Args:
        messages: as the task's own code makes them, media where they are named.
        text: the question with the task's prompt, as lmms-eval's simple models get it (MMMU's keeps its literal `<image
            1>`).
    """
    if not protocol_named(protocol).media_first:
        return [dict(message) for message in messages]
    media = [
        part
        for message in messages
        for part in (message["content"] if not isinstance(message["content"], str) else ())
        if part["type"] != "text"
    ]
    return [{"role": "user", "content": [*media, {"type": "text", "text": text}]}]
