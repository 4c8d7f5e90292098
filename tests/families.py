"""A small checkpoint of each family of backbones, for the battery: a new adapter adds a row to `FAMILIES`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from battery import PROMPTS
from llava_checkpoint import save_llava

from visionselector_eval.models import load_backbone


@dataclass
class Subject:
    """A checkpoint under test.

    Attributes
    ----------
    source: for `load_backbone`. plain_positions: positions are counted, (B, S), instead of (3, B, S).
    inputs: what the processor makes of the prompts. stock: answers of the unmodified model, as they are asked for.
    """

    source: str
    plain_positions: bool
    inputs: dict[str, Any] = field(default_factory=dict)
    stock: dict[Any, torch.Tensor] = field(default_factory=dict)

    @cached_property
    def backbone(self) -> Any:
        return load_backbone(self.source)

    @cached_property
    def eager(self) -> Any:
        return load_backbone(self.source, attn_implementation="eager")

    @cached_property
    def half(self) -> Any:
        return load_backbone(self.source, dtype="bfloat16")

    def visual(self, ids: torch.Tensor) -> torch.Tensor:
        """Places of visual placeholders."""
        config = self.backbone.model.config
        video = getattr(config, "video_token_id", None)
        return (ids == config.image_token_id) | (ids == (-1 if video is None else video))

    def for_language_model(self, positions: torch.Tensor) -> torch.Tensor:
        """(P, S) positions of one prompt as its language model takes them."""
        if self.plain_positions:
            return positions
        return torch.cat([torch.arange(positions.shape[1])[None, None], positions[:, None]])

    def stock_planes(self, compressed: Any, row: int, length: int) -> dict[str, Any]:
        """Arguments with which a stock LLM adds the planes of one prompt, unpadded, to its first layers."""
        if not compressed.planes:
            return {}
        visual = compressed.visual[row, compressed.attention_mask[row].bool()]
        where = torch.cat([visual, visual.new_zeros(length - len(visual))])[None]
        return {
            "visual_pos_masks": where,
            "deepstack_visual_embeds": [plane[row] for plane in compressed.planes],
        }


@dataclass(frozen=True)
class Family:
    """How to come by a checkpoint: `load` gets pytest's `tmp_path_factory`; `prompts` name some of the battery's."""

    load: Callable[[Any], Subject]
    prompts: tuple[str, ...]


def save_shape(name: str, folder: Path) -> Path:
    """A checkpoint of a shape of `profile --random-weights`, with weights that tell its tokens apart."""
    from safetensors.torch import load_file, save_file

    from visionselector_eval.harness.profiler.random_weights import build_random

    made = build_random(name)
    made.model.save_pretrained(folder)
    made.processor.save_pretrained(folder)
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, **made.host.extra_weights}, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


_NO_VIDEO = tuple(name for name in PROMPTS if "video" not in name)

FAMILIES: dict[str, Family] = {
    "qwen2_5_vl": Family(lambda folders: Subject("tiny", plain_positions=False), tuple(PROMPTS)),
    "qwen2_vl": Family(
        lambda folders: Subject(str(save_shape("qwen2_vl_tiny", folders.mktemp("qwen2_vl"))), plain_positions=False),
        ("one image", "two images", "image and video", "batch of three"),  # all others are the code of qwen2_5_vl
    ),
    "qwen3_vl": Family(
        lambda folders: Subject(str(save_shape("qwen3_vl_tiny", folders.mktemp("qwen3_vl"))), plain_positions=False),
        ("one image", "two images", "image and video", "batch of three"),
    ),
    "llava": Family(lambda folders: Subject(str(save_llava(folders.mktemp("llava"))), plain_positions=True), _NO_VIDEO),
}
