"""Qwen3-VL behind the backbone interface: DeepStack, norms of queries and keys, videos as timestamped frames."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration, Qwen3VLProcessor, Qwen3VLVideoProcessor
from transformers.models.qwen3_vl.modeling_qwen3_vl import apply_rotary_pos_emb

from visionselector_eval.models.backbones.qwen2_vl import Qwen2_VL


class Qwen3_VL(Qwen2_VL):
    """Qwen3-VL, any dense size; 3-D positions, features of several vision layers, no windows, no CLS token.

    The scope of a compressor is a whole image or a whole video. A video's frames stand apart in the prompt, a timestamp
    before each; the timestamps are text and stay.
    """

    model_class = Qwen3VLForConditionalGeneration
    rotate = staticmethod(apply_rotary_pos_emb)

    def _tower_flops(self, grid: tuple[int, int, int]) -> int:
        vision = self.model.config.vision_config
        (t, h, w), merge = grid, vision.spatial_merge_size
        tokens, width = t * h * w, vision.hidden_size
        patches = tokens * merge**2
        voxels = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        linear = 4 * width * width + 2 * width * vision.intermediate_size
        out = width * merge**2
        mergers = (1 + len(vision.deepstack_visual_indexes)) * tokens * (out * out + out * vision.out_hidden_size)
        attention = 4 * width * vision.depth * t * (h * w * merge**2) ** 2
        return 2 * patches * (voxels * width + vision.depth * linear) + 2 * mergers + attention

    @classmethod
    def _config(cls, text: Mapping[str, Any], vision: Mapping[str, Any], **common: Any) -> Any:
        tower = {**vision, "patch_size": 16, "out_hidden_size": text["hidden_size"]}
        rope = {**text["rope_parameters"], "rope_theta": 5e6, "mrope_interleaved": True}
        return Qwen3VLConfig(text_config={**text, "rope_parameters": rope}, vision_config=tower, **common)

    @classmethod
    def processor_of(cls, vision: Mapping[str, Any], processor: Any, **more: Any) -> Any:
        """The family's own, with patches of 16 pixels and the tokenizer of `processor`."""
        images = type(processor.image_processor)(patch_size=16, temporal_patch_size=2, merge_size=2)
        return Qwen3VLProcessor(
            images,
            processor.tokenizer,
            Qwen3VLVideoProcessor(patch_size=16, temporal_patch_size=2, merge_size=2),
            chat_template=processor.chat_template,
        )
