"""The embedded LLaVA-1.5's network: tokenizer, configuration, and the batched forward over the stock model's weights.

A patch of its CLIP tower is one cell of the embedded benchmarks' images, so that a 2 x 2 window of tokens, which
token fusion and pooling make one, holds up to four things that a question can ask for.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from visionselector_eval.harness.training.tiny import network

SIZE, PATCH = 224, 28
TOWER = 128  # width of the vision tower
BLOCKS = 5  # of which LLaVA leaves out the last one's patches
LAYERS = 4  # of the LLM

# As in the checkpoints that lmms-eval's llava_hf loads, all images first and then the text, but for answers: they end
# with the end token, without which nothing would teach it, and begin right after the colon.
CHAT_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}ASSISTANT:"
    "{% elif message['role'] != 'system' %}{{ message['role'].upper() + ': '}}{% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% if message['role'] != 'assistant' %}{{ ' ' }}{% endif %}{% else %}"
    "{% for content in message['content'] if content['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for content in message['content'] if content['type'] == 'text' %}{{ content['text'] }}"
    "{% if message['role'] != 'assistant' %}{{ ' ' }}{% endif %}{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ '<|im_end|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)

PROCESSOR = {
    "processor_class": "LlavaProcessor",
    "image_token": "<image>",
    "num_additional_image_tokens": 1,
    "patch_size": PATCH,
    "vision_feature_select_strategy": "default",
}
IMAGE_PROCESSOR = {
    "image_processor_type": "CLIPImageProcessor",
    "processor_class": "LlavaProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"shortest_edge": SIZE},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": SIZE, "width": SIZE},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": network.IMAGE_PROCESSOR["image_mean"],
    "image_std": network.IMAGE_PROCESSOR["image_std"],
}


def tokenizer() -> PreTrainedTokenizerFast:
    """The other family's tokens, a placeholder for images, and one token for each part of the prompt."""
    return network.tokenizer(CHAT_TEMPLATE, ("<image>",), ("USER: ", " ASSISTANT:"))


def config(tokens: PreTrainedTokenizerFast) -> LlavaConfig:
    """LLM: Llama of width 192, 4 layers, 6/2 heads. Vision tower: CLIP of width 128, 5 blocks, 8 x 8 patches."""
    ends = {"bos_token_id": None, "eos_token_id": tokens.eos_token_id, "pad_token_id": tokens.pad_token_id}
    vision = CLIPVisionConfig(
        hidden_size=TOWER,
        intermediate_size=3 * TOWER,
        num_hidden_layers=BLOCKS,
        num_attention_heads=4,
        image_size=SIZE,
        patch_size=PATCH,
    )
    language = LlamaConfig(
        vocab_size=len(tokens),
        hidden_size=network.WIDTH,
        intermediate_size=384,
        num_hidden_layers=LAYERS,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        rms_norm_eps=1e-6,
        rope_parameters={"rope_type": "default", "rope_theta": 100.0},
        tie_word_embeddings=True,
        **ends,
    )
    return LlavaConfig(
        vision_config=vision,
        text_config=language,
        image_token_index=tokens.vocab["<image>"],
        image_seq_length=(SIZE // PATCH) ** 2,
        vision_feature_layer=-2,
        vision_feature_select_strategy="default",
        tie_word_embeddings=True,
        **ends,
    )


def create(seed: int) -> Any:
    """A stock model with seeded weights of a size that trains from the first step."""
    tokens = tokenizer()
    torch.manual_seed(seed)
    model: Any = LlavaForConditionalGeneration(config(tokens))
    network.fill(
        model,
        seed,
        depth=lambda name: BLOCKS if "vision_tower" in name else LAYERS,
        last=("o_proj.weight", "out_proj.weight", "down_proj.weight", "fc2.weight"),
        factors={"projector.linear_2.weight": 0.2, "patch_embedding.weight": 5},
    )
    with torch.no_grad():
        # Waves, so that the tower soon finds neighbours and columns; they and the patches' weights start large, because
        # patches grow by an order of magnitude in the first hundred steps, and small positions are then lost.
        places = model.model.vision_tower.embeddings.position_embedding.weight
        places[1:] = 12 * _waves(SIZE // PATCH, TOWER)
    return model


def _waves(side: int, width: int) -> Tensor:
    """(side * side, width) sines and cosines of row and column."""
    rate = (2 * math.pi / side / 2) * 2 ** (torch.arange(width // 4) * 3 / (width // 4))
    angle = torch.arange(side)[:, None] * rate
    axis = torch.cat([angle.sin(), angle.cos()], -1)
    row, column = axis[:, None].expand(-1, side, -1), axis[None].expand(side, -1, -1)
    return torch.cat([row, column], -1).reshape(side * side, width)


def normalised(pixels: Tensor) -> Tensor:
    """(B, 3, H, W) as the processor gives it, from (B, 1, H, W, 3) uint8."""
    mean, std = (255 * torch.tensor(IMAGE_PROCESSOR[name]) for name in ("image_mean", "image_std"))
    return ((pixels[:, 0].float() - mean) / std).permute(0, 3, 1, 2)


def _norm(x: Tensor, module: Any) -> Tensor:
    return F.layer_norm(x, (x.shape[-1],), module.weight, module.bias, module.eps)


def _block(x: Tensor, block: Any) -> Tensor:
    n, p, width = x.shape
    a = block.self_attn
    z = _norm(x, block.layer_norm1)
    q, k, v = (proj(z).view(n, p, a.num_heads, -1).transpose(1, 2) for proj in (a.q_proj, a.k_proj, a.v_proj))
    out = F.scaled_dot_product_attention(q, k, v)
    x = x + a.out_proj(out.transpose(1, 2).reshape(n, p, width))
    return x + block.mlp(_norm(x, block.layer_norm2))


def _looks(x: Tensor, block: Any, cells: Tensor, partners: Tensor) -> Tensor:
    there = partners >= 0
    if not bool(there.any()):
        return x.new_zeros(())
    a = block.self_attn
    z = _norm(x, block.layer_norm1)
    q, k = (proj(z).view(*z.shape[:2], a.num_heads, -1)[:, :, :2] for proj in (a.q_proj, a.k_proj))
    q = q.gather(1, (cells + 1)[..., None, None].expand(-1, -1, *q.shape[2:]))
    seen = (torch.einsum("nihd,njhd->nhij", q, k) * a.scale).log_softmax(-1)
    aim = (partners.clamp_min(0) + 1)[:, None, :, None].expand(-1, 2, -1, 1)
    return -seen.gather(-1, aim)[..., 0].transpose(1, 2)[there].mean()


class LlavaNetwork(network.Network):
    """The batched forward of the embedded LLaVA-1.5."""

    family = "llava"
    clips = False
    parts: ClassVar[dict[str, tuple[str, ...]]] = {
        "vision": ("model.vision_tower", "model.multi_modal_projector"),
        "language": ("model.language_model",),
    }
    guided: ClassVar[dict[str, int]] = {"letter": 0, "word": 1, "visual": 2, "option": 3}
    before = "USER: "
    after = "\n{} ASSISTANT:"

    @staticmethod
    def tokenizer() -> PreTrainedTokenizerFast:
        return tokenizer()

    @staticmethod
    def create(seed: int) -> Any:
        return create(seed)

    @staticmethod
    def write_processors(folder: Path) -> None:
        for name, value in (("processor_config", PROCESSOR), ("preprocessor_config", IMAGE_PROCESSOR)):
            (folder / f"{name}.json").write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")

    def positions(self, grid: Sequence[int], keep: Tensor, offsets: Tensor, prefix: int) -> Tensor:
        start = torch.arange(prefix).expand(len(keep), prefix)
        return torch.cat([start, keep + prefix, offsets + prefix + math.prod(grid)], 1)[None]

    def vision(self, pixels: Tensor, cells: Tensor | None = None, partners: Tensor | None = None) -> Any:
        """As of the other family; pixels: (B, 1, SIZE, SIZE, 3) uint8."""
        features, guide, _ = self._tower(pixels, cells, partners, whole=False)
        return features if cells is None else (features, guide)

    def shown(self, batch: dict[str, Any], codes: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Also teaches the CLS token, as a real CLIP's knows it, what there is to see anywhere in the image.

        Without that nothing would give methods that rank by the attention of the CLS token anything to go by.
        """
        features, guide, summary = self._tower(batch["pixels"], batch["cells"], batch["partners"], whole=True)
        expected = batch["codes"][..., :2].flatten(1)
        there = ((expected >= 0) & (expected != self.model.config.text_config.pad_token_id)).float()
        words = F.normalize(codes[0][:, :TOWER], dim=-1)
        said = (summary @ words.T).log_softmax(-1).gather(1, expected.clamp_min(0))
        return features, {"partner": guide, "summary": -(said * there).sum() / there.sum().clamp_min(1)}

    def _tower(self, pixels: Tensor, cells: Tensor | None, partners: Tensor | None, whole: bool) -> Any:
        """Visual tokens, the guide as in `vision`, and with `whole` the CLS token's output (B, TOWER)."""
        tower, b, side = self.model.model.vision_tower, len(pixels), SIZE // PATCH
        x = normalised(pixels).view(b, 3, side, PATCH, side, PATCH).permute(0, 2, 4, 1, 3, 5)
        embeddings = tower.embeddings
        weight = embeddings.patch_embedding.weight
        x = x.reshape(b, side * side, -1) @ weight.reshape(len(weight), -1).T
        x = torch.cat([embeddings.class_embedding.expand(b, 1, -1), x], 1) + embeddings.position_embedding.weight
        x = _norm(x, tower.pre_layrnorm)
        guide = x.new_zeros(())
        blocks = tower.encoder.layers
        for i, block in enumerate(blocks[:-1]):
            if cells is not None and partners is not None and i == len(blocks) - 2:
                guide = _looks(x, block, cells, partners)
            x = _block(x, block)
        features = self.model.model.multi_modal_projector(x[:, 1:])
        return features, guide, _norm(_block(x, blocks[-1])[:, 0], tower.post_layernorm) if whole else None

    def _angle(self, positions: Tensor) -> Tensor:
        return positions[0, :, :, None].float() * self.model.model.language_model.rotary_emb.inv_freq
