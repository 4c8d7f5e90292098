"""Qwen2-VL behind the backbone interface: Qwen2.5-VL's prompt and positions, a vision tower without windows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration, Qwen2VLProcessor
from transformers.models.qwen2_vl.modeling_qwen2_vl import apply_rotary_pos_emb

from visionselector_eval.models.backbones.qwen2_5_vl import Qwen2_5_VL

if TYPE_CHECKING:
    from torch import Tensor


class Qwen2_VL(Qwen2_5_VL):
    """Qwen2-VL, any size; 3-D positions, every block attends over a whole image or temporal step, no CLS token."""

    model_class: ClassVar[Any] = Qwen2VLForConditionalGeneration
    rotate = staticmethod(apply_rotary_pos_emb)

    @property
    def ranking_block(self) -> int:  # type: ignore[override]
        """The last block."""
        return self.encoder_depth - 1

    def _raster(self, thw: tuple[int, int, int]) -> Tensor:
        return torch.arange(math.prod(thw) // self._merge**2)

    def _segments(self, block: int, thw: tuple[int, int, int]) -> list[int]:
        return [thw[1] * thw[2]] * thw[0]

    def _tower_flops(self, grid: tuple[int, int, int]) -> int:
        vision = self.model.config.vision_config
        (t, h, w), merge = grid, vision.spatial_merge_size
        patches, width = t * h * w * merge**2, vision.embed_dim
        voxels = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        linear = 4 * width * width + 2 * width * int(width * vision.mlp_ratio)
        out = width * merge**2
        merger = t * h * w * (out * out + out * vision.hidden_size)
        attention = 4 * width * vision.depth * t * (h * w * merge**2) ** 2
        return 2 * patches * (voxels * width + vision.depth * linear) + 2 * merger + attention

    @classmethod
    def processor_of(cls, vision: Mapping[str, Any], processor: Any, **more: Any) -> Any:
        """The family's own, which says nothing of the time between frames, with the parts of `processor`."""
        return Qwen2VLProcessor(
            processor.image_processor,
            processor.tokenizer,
            processor.video_processor,
            chat_template=processor.chat_template,
        )

    @classmethod
    def _config(cls, text: Mapping[str, Any], vision: Mapping[str, Any], **common: Any) -> Any:
        tower = {**vision, "hidden_size": text["hidden_size"]}
        return Qwen2VLConfig(text_config=dict(text), vision_config=tower, **common)
