"""From chat messages with pictures and videos to what the backbone's processor returns."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from visionselector_eval.baselines.base import InputError


class UnsupportedMediaError(InputError):
    """A kind of media that the backbone does not take at all: no document of the kind can be answered."""


@dataclass(frozen=True, kw_only=True)
class MediaSettings:
    """How pictures and videos become pixels; None leaves the checkpoint's own processor setting.

    Attributes
    ----------
    min_pixels, max_pixels: bounds of a picture's area after resizing; they do not move vision towers that take one
        picture size alone (LLaVA-1.5).
    video_min_pixels, video_max_pixels: bounds of one frame's area.
    max_num_frames: most frames of a video that are shown, evenly spread; never a frame twice.
    fps: frames a second to show (still at most max_num_frames); None spreads max_num_frames over the whole video.
    system_prompt: first turn of every conversation; None leaves the chat template's own.
    jpeg: re-encode each picture as JPEG at Pillow's default quality, as the published harness does. Hurts small text.
    pad_square: pad each picture to a square in the mean colour of CLIP's training pictures, as LLaVA does.
    repeat_frames: the published harness's sampling: 2 frames a second, then exactly `max_num_frames` of these by index,
        so that short clips show frames several times, and a clock that always says 2 frames a second. Off everywhere
        unless asked for: repeated frames are free redundancy for a compressor.
    """

    min_pixels: int | None = None
    max_pixels: int | None = None
    video_min_pixels: int | None = None
    video_max_pixels: int | None = None
    max_num_frames: int = 32
    fps: float | None = None
    system_prompt: str | None = None
    jpeg: bool = False
    pad_square: bool = False
    repeat_frames: bool = False

    def __post_init__(self) -> None:
        for low, high in ((self.min_pixels, self.max_pixels), (self.video_min_pixels, self.video_max_pixels)):
            if any(v is not None and v < 1 for v in (low, high)) or (low and high and low > high):
                raise InputError(f"pixel bounds {low}..{high} are not usable: give 1 <= min <= max")
        if self.max_num_frames < 1 or (self.fps is not None and not self.fps > 0):
            raise InputError(f"max_num_frames={self.max_num_frames}, fps={self.fps}: both must be positive")


_PUBLISHED_FPS, _PUBLISHED_MOST = 2.0, 768  # of the harness published with VisionSelector, arXiv 2510.16598
_CLIP_MEAN = (122, 116, 104)  # 8-bit mean of CLIP's training pictures


def published_frame_indices(total: int, native_fps: float, most: int) -> list[int]:
    """The frames that the published harness shows: `most` of them, repeated where the clip is short.

    Decoded at 2 frames a second (at most 768), of these `most` by a rounded-down linspace, first and last included.
    """
    sampled = frame_indices(total, native_fps, _PUBLISHED_MOST, _PUBLISHED_FPS)
    return [sampled[int(i)] for i in np.linspace(0, len(sampled) - 1, most)]


def frame_indices(total: int, native_fps: float, most: int, fps: float | None) -> list[int]:
    """Which frames of a video are shown: at most `most`, evenly spread from first to last, each once.

    Parameters
    ----------
    total: frames in the file. native_fps: its frame rate. most: the limit. fps: wanted rate, or None for `most` frames.
    """
    count = min(total, most)
    if fps is not None:
        count = min(count, max(1, math.floor(total / native_fps * fps + 1e-9)))
    if count == 1:
        return [total // 2]
    return [round(i * (total - 1) / (count - 1)) for i in range(count)]


def read_video(path: str | Path, settings: MediaSettings) -> tuple[np.ndarray, dict[str, Any]]:
    """Decode the frames that are shown, with their true places in time.

    Returns
    -------
    frames: (T, H, W, 3) uint8; metadata: fps, frames_indices and total_num_frames as transformers' processors take it.

    Raises
    ------
    InputError: where the file is missing or is no video that can be decoded.
    """
    import av  # images need no video decoder, and a machine without network may have none

    path = Path(path)
    if not path.is_file():
        raise InputError(f"video '{path}' is not there")
    try:
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            stream.thread_type = "AUTO"
            rate = float(stream.average_rate or stream.guessed_rate or 0)
            total = stream.frames
            if not total:  # some containers do not say: count by reading the packets once
                total = sum(1 for _ in container.decode(stream))
                container.seek(0)
            rate = rate or 24.0
            if settings.repeat_frames:
                indices = published_frame_indices(total, rate, settings.max_num_frames)
            else:
                indices = frame_indices(total, rate, settings.max_num_frames, settings.fps)
            wanted, frames = set(indices), {}
            for number, frame in enumerate(container.decode(stream)):
                if number in wanted:
                    frames[number] = frame.to_ndarray(format="rgb24")
                if number >= indices[-1]:
                    break
    except (av.FFmpegError, IndexError, ValueError) as error:
        raise InputError(
            f"video '{path}' can't be decoded: {str(error).splitlines()[0] if str(error) else error!r}"
        ) from error
    if not frames:
        raise InputError(f"video '{path}' has no frames")
    shown = [i for i in indices if i in frames]  # a file may hold fewer frames than its header says
    metadata: dict[str, Any] = {"fps": rate, "frames_indices": shown, "total_num_frames": total}
    if settings.repeat_frames:  # the published clock: frame after frame, half a second apart, whatever the video's
        metadata = {"fps": _PUBLISHED_FPS, "frames_indices": list(range(len(shown))), "total_num_frames": len(shown)}
    return np.stack([frames[i] for i in shown]), metadata


def read_image(value: Any) -> Image.Image:
    """A PIL picture in RGB from a picture, a path or an array.

    Raises
    ------
    InputError: where the file is missing or is no picture.
    """
    if isinstance(value, Image.Image):
        return value.convert("RGB")
    if isinstance(value, np.ndarray):
        return Image.fromarray(value).convert("RGB")
    try:
        with Image.open(value) as image:
            return image.convert("RGB")
    except FileNotFoundError:
        raise InputError(f"image '{value}' is not there") from None
    except Exception as error:
        raise InputError(
            f"image '{value}' can't be read: {str(error).splitlines()[0] if str(error) else error!r}"
        ) from error


def prepare_image(image: Image.Image, settings: MediaSettings) -> Image.Image:
    """A picture as the protocol wants it, before the processor resizes it."""
    if settings.jpeg:
        buffer = BytesIO()
        image.save(buffer, format="JPEG")
        image = Image.open(buffer).convert("RGB")
    if settings.pad_square and image.width != image.height:
        side = max(image.size)
        square = Image.new("RGB", (side, side), _CLIP_MEAN)
        square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
        image = square
    return image


def build_inputs(
    processor: Any, conversations: Sequence[Sequence[Mapping[str, Any]]], settings: MediaSettings
) -> dict[str, Any]:
    """Tokenise a batch of conversations with their pictures and videos.

    Parameters
    ----------
    processor: the backbone's transformers processor.
    conversations: one a sample; a message is {"role", "content"}, content a list of {"type": "text", "text"},
        {"type": "image", "image": picture or path} and {"type": "video", "video": path or (frames, metadata)}.
    settings: pixels, frames and system prompt.

    Returns
    -------
    what the processor returns: input_ids (B, S) left-padded, attention_mask, pixel values and grids.

    Raises
    ------
    InputError: media that can't be read, a text that holds a placeholder token.
    UnsupportedMediaError: a video for a backbone that takes none.
    """
    texts, images, videos, metadata = [], [], [], []
    for conversation in conversations:
        messages = [dict(message) for message in conversation]
        if settings.system_prompt is not None and (not messages or messages[0]["role"] != "system"):
            messages.insert(0, {"role": "system", "content": [{"type": "text", "text": settings.system_prompt}]})
        for message in messages:
            if isinstance(message["content"], str):
                _refuse_placeholders(processor, message["content"])
                continue
            for part in message["content"]:
                if part["type"] == "text":
                    _refuse_placeholders(processor, part["text"])
                elif part["type"] == "image":
                    images.append(prepare_image(read_image(part["image"]), settings))
                elif part["type"] == "video":
                    if getattr(processor, "video_processor", None) is None:
                        raise UnsupportedMediaError(
                            "this backbone takes pictures, no videos: its checkpoint has no video processor"
                        )
                    source = part["video"]
                    frames, about = source if isinstance(source, tuple) else read_video(source, settings)
                    videos.append(frames)
                    metadata.append(about)
        texts.append(processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    return process(processor, texts, images, videos, metadata, settings)


def _refuse_placeholders(processor: Any, text: str) -> None:
    # In a text it would stand for an image that does not exist, or take the place of another prompt's in the batch.
    for name in ("image_token", "video_token"):
        token = getattr(processor, name, None)
        if isinstance(token, str) and token and token in text:
            raise InputError(
                f"invalid prompt text: expected none of the family's placeholder tokens (got {token!r} in the text); "
                "reword the question"
            )


def process(
    processor: Any,
    texts: Sequence[str],
    images: Sequence[Image.Image],
    videos: Sequence[np.ndarray],
    metadata: Sequence[Mapping[str, Any]],
    settings: MediaSettings,
    *,
    begins: bool = True,
) -> dict[str, Any]:
    """Run the backbone's processor over rendered prompts and the media that they show, with the pixels of `settings`.

    Parameters
    ----------
    texts: prompts with one placeholder for each picture and video. images: RGB, all prompts' in order.
    videos: (T, H, W, 3) uint8 each; metadata: of each, as `read_video` gives it.
    begins: whether texts begin a conversation, and so with the token that some tokenizers put there.

    Returns
    -------
    as `build_inputs`.
    """
    arguments: dict[str, Any] = {}
    if images:
        arguments["images"] = list(images)
        if size := _size(processor.image_processor, settings.min_pixels, settings.max_pixels):
            arguments["images_kwargs"] = {"size": size}
    if videos:
        arguments["videos"] = list(videos)
        # Frames are chosen above; what the processor may not do is choose again or change each frame's size with their
        # number (a default that moved between transformers releases).
        arguments["videos_kwargs"] = {
            "video_metadata": list(metadata),
            "do_sample_frames": False,
            "cap_pixels_per_frame": False,
            "input_data_format": "channels_last",
        }
        if size := _size(processor.video_processor, settings.video_min_pixels, settings.video_max_pixels):
            arguments["videos_kwargs"]["size"] = size
    return dict(
        processor(
            text=list(texts),
            **arguments,
            text_kwargs={
                "padding": True,
                "padding_side": "left",
                **({} if begins else {"add_special_tokens": False}),
            },
            common_kwargs={"return_tensors": "pt"},
        )
    )


def _size(processor: Any, low: int | None, high: int | None) -> dict[str, int] | None:
    own = processor.size
    if (low is None and high is None) or "longest_edge" not in own:  # a tower of one picture size has no bounds
        return None
    low = own["shortest_edge"] if low is None else low
    high = own["longest_edge"] if high is None else high
    return {"shortest_edge": min(low, high), "longest_edge": max(low, high)}
