"""One list of compressors, many checks: a new method adds a row here and is put through all of them.

`PROMPTS` makes the prompts that every compressor has to survive, on the embedded checkpoint: one image, two images with
text between, video, image and video mixed, text only, and a left-padded batch of three.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from PIL import Image

from visionselector_eval.baselines import build


@dataclass(frozen=True)
class Row:
    """A compressor of the battery.

    Attributes
    ----------
    name, options: for `build`.
    exact_count: whether budgets give the canonical K exactly (the down-sampling control: whole grids of at most K).
    merges: whether kept features may differ from the encoder's.
    """

    name: str
    options: dict[str, Any] = field(default_factory=dict)
    exact_count: bool = True
    merges: bool = False

    def __str__(self) -> str:
        said = [value if isinstance(value, str) else f"{key}{value}" for key, value in self.options.items()]
        return "-".join([self.name, *("upstream" if s == "upstream_exactTrue" else s for s in said)])

    def build(self) -> Any:
        return build(self.name, **self.options)


COMPRESSORS = [
    Row("full"),
    Row("random"),
    Row("uniform"),
    Row("downsample", exact_count=False, merges=True),
    Row("visionselector"),
    Row("divprune"),
    Row("visionzip", merges=True),
    Row("prumerge_plus", merges=True),
    Row("holov"),
    Row("cdpruner"),
    Row("vispruner"),
    Row("idpruner"),
    Row("id_selection"),
    Row("tome", merges=True),
    Row("fusion2x2", merges=True),
    Row("pooling", merges=True),
    Row("fastv"),
    Row("dart"),
    Row("sparsevlm", merges=True),
    Row("pyramiddrop"),
    Row("dynamic_qwen"),
    Row("downsample", {"upstream_exact": True}, exact_count=False, merges=True),
    Row("visionselector", {"upstream_exact": True}),
    Row("divprune", {"upstream_exact": True}),
    Row("visionzip", {"upstream_exact": True}, merges=True),
    Row("prumerge_plus", {"upstream_exact": True}, merges=True),
    Row("holov", {"upstream_exact": True}),
    Row("cdpruner", {"upstream_exact": True}),
    Row("vispruner", {"upstream_exact": True}),
    Row("idpruner", {"upstream_exact": True}),
    Row("id_selection", {"upstream_exact": True}),
    Row("tome", {"upstream_exact": True}, merges=True),
    Row("fusion2x2", {"upstream_exact": True}, merges=True),
    Row("pooling", {"upstream_exact": True}, merges=True),
    Row("fastv", {"upstream_exact": True}),
    Row("fastv", {"rows": "all", "layer": 3}),
    Row("pyramiddrop", {"upstream_exact": True}),
    Row("dart", {"upstream_exact": True}),
    Row("dynamic_qwen", {"upstream_exact": True}),
    Row("sparsevlm", {"upstream_exact": True}, merges=True),
]
CANONICAL = [row for row in COMPRESSORS if not row.options]


def draw_image(height: int, width: int, seed: int = 0) -> Image.Image:
    """An image with structure at every scale, so that tokens differ."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 255, (height // 28, width // 28, 3), dtype=np.uint8))
    fine = rng.integers(0, 60, (height, width, 3))
    return Image.fromarray((np.asarray(coarse.resize((width, height))) * 0.75 + fine).astype(np.uint8))


def clip(frames: int = 6, height: int = 112, width: int = 140, seed: int = 0) -> tuple[np.ndarray, dict[str, Any]]:
    """Frames (T, H, W, 3) uint8 at 2 frames a second, with their metadata."""
    stack = np.stack([np.asarray(draw_image(height, width, seed + i)) for i in range(frames)])
    return stack, {"fps": 2.0, "frames_indices": list(range(frames)), "total_num_frames": frames}


def user(*parts: Any) -> list[dict[str, Any]]:
    """A conversation of one user turn: text, images and clips in the order given."""
    content = []
    for part in parts:
        if isinstance(part, str):
            content.append({"type": "text", "text": part})
        elif isinstance(part, Image.Image):
            content.append({"type": "image", "image": part})
        else:
            content.append({"type": "video", "video": part})
    return [{"role": "user", "content": content}]


PROMPTS: dict[str, Callable[[], list[list[dict[str, Any]]]]] = {
    "one image": lambda: [user(draw_image(224, 280), "What is it?")],
    "two images": lambda: [user(draw_image(224, 280), "and", draw_image(140, 112, 1), "What is it?")],
    "video": lambda: [user(clip(), "What moves?")],
    "image and video": lambda: [user(draw_image(168, 140), "What moves in", clip(4), "and here?")],
    "text only": lambda: [user("What is the capital of France?")],
    "batch of three": lambda: [
        user(draw_image(224, 280), "What is it?"),
        user(draw_image(140, 112, 1), "and", draw_image(112, 112, 2), "What are they, and which is larger?"),
        user("Just text."),
    ],
    "batch with video": lambda: [
        user(clip(4, 84, 84), "What moves?"),
        user(draw_image(140, 168), "A long question: what is it?"),
    ],
}


def same_tensor(a: torch.Tensor, b: torch.Tensor, tolerance: float) -> bool:
    """Whether two tensors agree to an absolute tolerance."""
    return a.shape == b.shape and bool((a - b).abs().max() <= tolerance) if a.numel() else a.shape == b.shape
