"""From chat messages with images and videos to what the backbone's processor returns."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from visionselector_eval.baselines.contract.errors import InputError, one_line, unknown


class UnsupportedMediaError(InputError):
    """A kind of media that the backbone does not take at all: no document of the kind can be answered."""


@dataclass(frozen=True, kw_only=True)
class MediaSettings:
    """How images and videos become pixels; None leaves the checkpoint's own processor setting.

    Attributes:
        min_pixels, max_pixels: bounds of an image's area after resizing; they do not move vision towers that take one
            image size alone (LLaVA-1.5).
        side: images become squares of this many pixels a side, stretched unless `pad_square`, instead of those
            bounds.
        pillow_resize: what Pillow does to an image before the processor sees it. None: nothing. "bounded": resizes it
            to whole tokens within min_pixels..max_pixels. "rounded": resizes it to whole tokens near its own size, so
            that the processor resizes it a second time; transparent parts become white.
        video_min_pixels, video_max_pixels: bounds of one frame's area.
        share_pixels: frames of a clip share the pixels of 115,200 tokens, two frames each (`largest_frame`). "shown":
            the frames that are shown do; "sampled": those do that two a second would be. None: they do not.
        max_num_frames: most frames of a video that are shown, evenly spread; never a frame twice, and an even number
            unless it is one, because towers of videos take frames by two.
        fps: frames a second to show (still at most max_num_frames); None spreads max_num_frames over the whole video.
        system_prompt: first turn of every conversation; None leaves the chat template's own.
        jpeg: re-encode each image as JPEG at Pillow's default quality, as the published harness does. Hurts small
            text.
        pad_square: pad each image to a square in the mean colour of CLIP's training images, as LLaVA does.
        repeat_frames: the published harness's sampling: 2 frames a second (at least 4, at most 768), then exactly
            `max_num_frames` of these by index, so that short clips show frames several times, and a clock that always
            says 2 frames a second. Off everywhere unless asked for: repeated frames are free redundancy for a
            compressor.
    """

    min_pixels: int | None = None
    max_pixels: int | None = None
    side: int | None = None
    pillow_resize: Literal["bounded", "rounded"] | None = None
    video_min_pixels: int | None = None
    video_max_pixels: int | None = None
    share_pixels: Literal["shown", "sampled"] | None = None
    max_num_frames: int = 32
    fps: float | None = None
    system_prompt: str | None = None
    jpeg: bool = False
    pad_square: bool = False
    repeat_frames: bool = False

    def __post_init__(self) -> None:
        for low, high in ((self.min_pixels, self.max_pixels), (self.video_min_pixels, self.video_max_pixels)):
            if any(v is not None and v < 1 for v in (low, high)) or (low and high and low > high):
                raise InputError(f"invalid pixel bounds {low}..{high}: expected 1 <= min <= max")
        if self.side is not None and self.side < 1:
            raise InputError(f"invalid side={self.side}: expected a number of pixels, at least 1")
        for name, kinds in (("pillow_resize", ("bounded", "rounded")), ("share_pixels", ("shown", "sampled"))):
            if (value := getattr(self, name)) not in (None, *kinds):
                raise unknown(name, str(value), kinds)
        if self.max_num_frames < 1 or (self.fps is not None and not self.fps > 0):
            raise InputError(f"max_num_frames={self.max_num_frames}, fps={self.fps}: both must be positive")


_FRAMES_BY = 2  # frames that Qwen's vision towers take together
_SAMPLED_FPS, _SAMPLED_LEAST, _SAMPLED_MOST = 2.0, 4, 768  # of qwen_vl_utils, where nothing else is asked for
_CLIP_CONTEXT, _CLIP_PART = 128_000, 0.9  # of qwen_vl_utils: tokens of a context, and what a clip may fill of it
_PILLOW_TOKENS = (4, 16_384)  # of qwen_vl_utils: an image's tokens, where no bounds are given
_MOST_OBLONG = 200  # of the family's processors: longest side over shortest
_CLIP_MEAN = (122, 116, 104)  # 8-bit mean of CLIP's training images


def sampled_frames(total: int, native_fps: float) -> int:
    """How many frames the published harness decodes: 2 a second, at least 4 and at most 768, an even number.

    Args:
        total: frames in the file.
        native_fps: its frame rate.
    """
    expected = max(total / native_fps * _SAMPLED_FPS, _SAMPLED_LEAST)
    return _even(min(expected, _even(min(_SAMPLED_MOST, total))))


def published_frame_indices(total: int, native_fps: float, most: int) -> list[int]:
    """The frames that the published harness shows: `most` of them, repeated where the clip is short.

    Of the `sampled_frames`, evenly spread, `most` by a rounded-down linspace, first and last included.
    """
    sampled = _spread(total, sampled_frames(total, native_fps))
    return [sampled[int(i)] for i in np.linspace(0, len(sampled) - 1, most)]


def frame_indices(total: int, native_fps: float, most: int, fps: float | None) -> list[int]:
    """Which frames of a video are shown: at most `most`, evenly spread from first to last, each once.

    An even number of them or one: a tower that takes frames by two would show the last of an odd number twice.

    Args:
        total: frames in the file.
        native_fps: its frame rate.
        most: the limit.
        fps: wanted rate, or None for `most` frames.
    """
    count = min(total, most)
    if fps is not None:
        count = min(count, max(1, math.floor(total / native_fps * fps + 1e-9)))
    return _spread(total, _even(count))


def _even(count: float) -> int:
    return max(1, math.floor(count / _FRAMES_BY) * _FRAMES_BY)


def _spread(total: int, count: int) -> list[int]:
    if count == 1:
        return [total // 2]
    # In float32 and by torch, as qwen_vl_utils does: in very long videos another frame is the nearest then.
    return torch.linspace(0, total - 1, count).round().long().tolist()


def read_video(path: str | Path, settings: MediaSettings) -> tuple[np.ndarray, dict[str, Any]]:
    """Decode the frames that are shown, with their true places in time.

    Returns:
        frames: (T, H, W, 3) uint8; metadata: fps, frames_indices and total_num_frames as transformers' processors take
        it, and where frames share pixels, `sharing`: how many do.

    Raises:
        InputError: where the file is missing or is no video that can be decoded.
    """
    import av  # images need no video decoder, and a machine without network may have none

    path = Path(path)
    if not path.is_file():
        raise InputError(f"video '{path}' not found")
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
            expected, frames = set(indices), {}
            for number, frame in enumerate(container.decode(stream)):
                if number in expected:
                    frames[number] = frame.to_ndarray(format="rgb24")
                if number >= indices[-1]:
                    break
    except (av.FFmpegError, IndexError, ValueError) as error:
        raise InputError(f"video '{path}' can't be decoded: {one_line(error)}") from error
    if not frames:
        raise InputError(f"video '{path}' has no frames")
    shown = [i for i in indices if i in frames]  # a file may hold fewer frames than its header says
    metadata: dict[str, Any] = {"fps": rate, "frames_indices": shown, "total_num_frames": total}
    if settings.repeat_frames:  # the published clock: frame after frame, half a second apart, whatever the video's
        metadata = {"fps": _SAMPLED_FPS, "frames_indices": list(range(len(shown))), "total_num_frames": len(shown)}
    if settings.share_pixels:
        metadata["sharing"] = sampled_frames(total, rate) if settings.share_pixels == "sampled" else len(shown)
    return np.stack([frames[i] for i in shown]), metadata


def read_image(value: Any, *, on_white: bool = False) -> Image.Image:
    """A PIL image in RGB from an image, a path or an array; with `on_white`, transparent parts are white.

    Raises:
        InputError: where the file is missing or is no image.
    """
    if isinstance(value, np.ndarray):
        value = Image.fromarray(value)
    if isinstance(value, Image.Image):
        return _opaque(value, on_white)
    try:
        with Image.open(value) as image:
            return _opaque(image, on_white)
    except FileNotFoundError:
        raise InputError(f"image '{value}' not found") from None
    except Exception as error:
        raise InputError(f"image '{value}' can't be read: {one_line(error)}") from error


def _opaque(image: Image.Image, on_white: bool) -> Image.Image:
    if not on_white or image.mode != "RGBA":
        return image.convert("RGB")
    white = Image.new("RGB", image.size, (255, 255, 255))
    white.paste(image, mask=image.getchannel("A"))
    return white


def prepare_image(image: Image.Image, settings: MediaSettings) -> Image.Image:
    """An image as the protocol requires, before the processor resizes it."""
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
    """Tokenise a batch of conversations with their images and videos.

    Args:
        processor: the backbone's transformers processor.
        conversations: one a sample; a message is {"role", "content"}, content a list of {"type": "text", "text"},
            {"type": "image", "image": image or path} and {"type": "video", "video": path or (frames, metadata)}.
        settings: pixels, frames and system prompt.

    Returns:
        what the processor returns: input_ids (B, S) left-padded, attention_mask, pixel values and grids.

    Raises:
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
                    shown = read_image(part["image"], on_white=settings.pillow_resize == "rounded")
                    images.append(prepare_image(shown, settings))
                elif part["type"] == "video":
                    if getattr(processor, "video_processor", None) is None:
                        raise UnsupportedMediaError(
                            "this backbone takes images, no videos: its checkpoint has no video processor"
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

    Args:
        texts: prompts with one placeholder for each image and video.
        images: RGB, all prompts' in order.
        videos: (T, H, W, 3) uint8 each;
        metadata: of each, as `read_video` gives it.
        begins: whether texts begin a conversation, and so with the token that some tokenizers put there.

    Returns:
        as `build_inputs`.
    """
    arguments: dict[str, Any] = {}
    if images:
        low, high = (settings.side**2,) * 2 if settings.side else (settings.min_pixels, settings.max_pixels)
        bounds = _bounds(processor.image_processor, low, high)
        arguments["images"] = [_resized_image(image, processor.image_processor, bounds, settings) for image in images]
        if bounds and (low, high) != (None, None):
            arguments["images_kwargs"] = {"size": {"shortest_edge": bounds[0], "longest_edge": bounds[1]}}
    if videos:
        low, high = settings.video_min_pixels, settings.video_max_pixels
        bounds = _bounds(processor.video_processor, low, high)
        arguments["videos"], arguments["videos_kwargs"] = list(videos), _videos_kwargs(metadata)
        if bounds and settings.share_pixels:  # each clip has bounds of its own, and the processor takes one pair
            arguments["videos"] = [
                _resized_frames(frames, about.get("sharing", len(frames)), processor.video_processor, bounds)
                for frames, about in zip(videos, metadata, strict=True)
            ]
            arguments["videos_kwargs"]["do_resize"] = False
        elif bounds and (low, high) != (None, None):
            arguments["videos_kwargs"]["size"] = {"shortest_edge": bounds[0], "longest_edge": bounds[1]}
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


def _videos_kwargs(metadata: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    # Frames are chosen by `read_video`; what the processor may not do is choose again or change each frame's size with
    # their number (a default that moved between transformers releases).
    return {
        "video_metadata": [{k: v for k, v in about.items() if k != "sharing"} for about in metadata],
        "do_sample_frames": False,
        "cap_pixels_per_frame": False,
        "input_data_format": "channels_last",
    }


def _bounds(processor: Any, low: int | None, high: int | None) -> tuple[int, int] | None:
    """Smallest and largest area that a processor is to give; None for a tower of one image size, which has none."""
    own = processor.size
    if "longest_edge" not in own or "shortest_edge" not in own or not hasattr(processor, "merge_size"):
        return None
    low = own["shortest_edge"] if low is None else low
    high = own["longest_edge"] if high is None else high
    return min(low, high), max(low, high)


def whole_tokens(height: int, width: int, token: int, low: float, high: float) -> tuple[int, int]:
    """Height and width in pixels, each a whole number of tokens, whose area is within bounds where the shape allows it.

    The rule of Qwen's models as qwen_vl_utils has it: round each side to tokens; where the area is out of bounds, scale
    both sides of the original by one factor, and round down (area too large) or up (too small).

    Args:
        token: side of a token.
        low, high: bounds of the area.

    Raises:
        InputError: an image longer than the family's processors take.
    """
    if max(height, width) > _MOST_OBLONG * min(height, width):
        raise InputError(
            f"an image of {width}x{height} pixels is more than {_MOST_OBLONG} times as long as wide: crop it"
        )
    sides = [max(1, round(side / token)) * token for side in (height, width)]
    if sides[0] * sides[1] > high:
        shrink = math.sqrt(height * width / high)
        sides = [max(1, math.floor(side / shrink / token)) * token for side in (height, width)]
    elif sides[0] * sides[1] < low:
        grow = math.sqrt(low / (height * width))
        sides = [math.ceil(side * grow / token) * token for side in (height, width)]
    return sides[0], sides[1]


def largest_frame(sharing: int, token: int, low: float, high: float) -> float:
    """Largest area of a frame, in pixels, where the frames of a clip share the pixels that a context has room for.

    The rule of qwen_vl_utils: 90 % of 128,000 tokens, each of two frames, in equal parts, but at least 1.05 `low`.

    Args:
        sharing: frames that share.
        token: side of a token.
        low, high: bounds of a frame's area.
    """
    share = _CLIP_CONTEXT * token * token * _CLIP_PART / sharing * _FRAMES_BY
    return min(high, max(share, int(low * 1.05)))


def _resized_image(
    image: Image.Image, processor: Any, bounds: tuple[int, int] | None, settings: MediaSettings
) -> Image.Image:
    if bounds is None or not (settings.side or settings.pillow_resize):
        return image
    if settings.side:  # through bounds alone, a square of some sizes would come out a token larger or smaller
        return image.resize((settings.side, settings.side))
    token = processor.patch_size * processor.merge_size
    low, high = bounds if settings.pillow_resize == "bounded" else (n * token * token for n in _PILLOW_TOKENS)
    height, width = whole_tokens(image.height, image.width, token, low, high)
    return image.resize((width, height))


def _resized_frames(frames: np.ndarray, sharing: int, processor: Any, bounds: tuple[int, int]) -> np.ndarray:
    from torchvision.transforms import InterpolationMode
    from torchvision.transforms.functional import resize

    token, (low, high) = processor.patch_size * processor.merge_size, bounds
    _, height, width, _ = frames.shape
    size = whole_tokens(height, width, token, low, largest_frame(sharing, token, low, high))
    channels_first = torch.from_numpy(frames).permute(0, 3, 1, 2)
    resized = resize(channels_first, list(size), interpolation=InterpolationMode.BICUBIC, antialias=True)
    return resized.permute(0, 2, 3, 1).numpy()
