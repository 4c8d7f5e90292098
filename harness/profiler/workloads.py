"""What is run: an image of exactly N visual tokens with a fixed question, or the documents of a task."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from visionselector_eval.baselines.contract.errors import InputError
from visionselector_eval.models.inputs import MediaSettings, build_inputs

if TYPE_CHECKING:
    from visionselector_eval.models.backbones.base import Backbone

QUESTION = "What is in the image?"
_LONGEST_SIDE = 200  # the family's processors refuse images that are longer than this in one direction


@dataclass(frozen=True)
class Item:
    """One prompt. `key` names the document; `make` decodes and preprocesses it (CPU tensors)."""

    key: str
    make: Callable[[], dict[str, Any]]


@dataclass(frozen=True)
class Workload:
    """Prompts that are measured together; round i runs prompt i, from the first again after the last.

    Attributes:
        name: `synthetic-1024`, or the task.
        tokens: visual tokens of every prompt, None where they differ.
        items: the prompts.
        settings: everything that makes it what it is, plain data.
    """

    name: str
    tokens: int | None
    items: Sequence[Item]
    settings: Mapping[str, Any]


def grid_of(tokens: int) -> tuple[int, int]:
    """The most nearly square (h, w) with h * w == tokens and h <= w.

    Raises:
        InputError: fewer than 4 tokens, or a number (a prime, say) whose image would be too long; names a near one.
    """
    found = _factors(tokens)
    if found is None:
        near = next(n for d in range(1, 10_000) for n in (tokens + d, tokens - d) if n >= 4 and _factors(n))
        raise InputError(f"--synthetic {tokens} has no image of {tokens} visual tokens: try {near}")
    return found


def _factors(tokens: int) -> tuple[int, int] | None:
    h = next((h for h in range(math.isqrt(max(tokens, 0)), 0, -1) if tokens % h == 0), 0)
    return (h, tokens // h) if tokens >= 4 and tokens // h < _LONGEST_SIDE * h else None


def textured_image(height: int, width: int, seed: int = 0) -> Image.Image:
    """An image with structure at two scales, so that its tokens differ and content-aware methods have to choose."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 255, (max(1, height // 56), max(1, width // 56), 3), dtype=np.uint8))
    fine = rng.integers(0, 60, (height, width, 3))
    return Image.fromarray((np.asarray(coarse.resize((width, height))) * 0.75 + fine).astype(np.uint8))


def synthetic(processor: Any, tokens: int, seed: int = 0) -> Workload:
    """`QUESTION` about one image of `tokens` visual tokens, or about as many images as have them.

    Args:
        processor: a transformers processor. Its image processor takes images of any size (patch_size, merge_size), or
            brings all to one (crop_size): then `tokens` is shared among several images.

    Raises:
        InputError: a number of tokens that no image has, and no number of images.
    """
    front = processor.image_processor
    images, media = 1, MediaSettings()
    if hasattr(front, "merge_size"):
        h, w = grid_of(tokens)
        side = front.patch_size * front.merge_size
        media = MediaSettings(min_pixels=h * w * side * side, max_pixels=h * w * side * side)
    else:
        side = processor.patch_size
        h, w = front.crop_size["height"] // side, front.crop_size["width"] // side
        images, rest = divmod(tokens, h * w)
        if rest or not images:
            raise InputError(
                f"--synthetic {tokens}: an image of this backbone has {h * w} visual tokens, "
                f"try {max(1, round(tokens / (h * w))) * h * w}"
            )
    shown = [textured_image(h * side, w * side, seed + number) for number in range(images)]
    content = [*({"type": "image", "image": image} for image in shown), {"type": "text", "text": QUESTION}]
    chat = [{"role": "user", "content": content}]
    return Workload(
        name=f"synthetic-{tokens}",
        tokens=tokens,
        items=[Item(f"synthetic/{tokens}", lambda: build_inputs(processor, [chat], media))],
        settings={
            "synthetic": tokens,
            "grid": [h, w],
            **({"pictures": images} if images > 1 else {}),
            "question": QUESTION,
            "picture_seed": seed,
        },
    )


def documents(
    task: str,
    backbone: Backbone,
    family: str,
    limit: int | None,
    media: MediaSettings,
    protocol: str,
    data_root: str | None = None,
    most: int | None = None,
) -> Workload:
    """The first `limit` documents of an lmms-eval task; the only workload that needs lmms-eval.

    Args:
        protocol: says where media stand in the prompts.
        most: take only so many of them, evenly spread.

    Raises:
        InputError: no such task, no data for it, or lmms-eval is not installed.
    """
    try:
        from visionselector_eval.harness.sweep.worker import bound_task
        from visionselector_eval.tasks import binding, lmms

        lmms.lmms_eval()
    except ImportError as error:
        raise InputError(f"--task {task} needs lmms-eval ({error}): install it, or use --synthetic N") from error
    bound = bound_task(task, family, limit, data_root)

    def item(request: Any) -> Item:
        return Item(request.key, lambda: build_inputs(backbone.processor, [request.messages()], media))

    items = [item(request) for request in binding.requests(bound, protocol)]
    if most is not None and len(items) > most:
        items = [items[round(i * (len(items) - 1) / max(1, most - 1))] for i in range(most)]
    settings: dict[str, Any] = {"task": task, "limit": limit, "documents": len(items), "data": bound.data_hash}
    settings |= {"protocol": protocol, "media": {k: v for k, v in asdict(media).items() if v is not None}}
    return Workload(name=task, tokens=None, items=items, settings=settings)


def check_length(config: Any, inputs: Mapping[str, Any], new_tokens: int, what: str) -> None:
    """Refuse a prompt that is longer than the model's positions.

    Args:
        config: the LLM's config.
        inputs: what the processor returned.
        what: how to call the workload in the message.

    Raises:
        InputError: the prompt and its answer have more tokens than `max_position_embeddings`.
    """
    most = getattr(config, "max_position_embeddings", None)
    length = int(inputs["input_ids"].shape[1])
    if most is not None and length + new_tokens > most:
        raise InputError(
            f"{what} has {length} prompt tokens and {new_tokens} new ones, more than the model's {most} positions: "
            f"give fewer visual tokens (at most about {most - new_tokens} with the text)"
        )
