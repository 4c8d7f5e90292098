"""The embedded checkpoint's network: tokenizer, configuration, and a batched forward over the stock model's weights.

The weights live in a stock `Qwen2_5_VLForConditionalGeneration`. Its own forward runs each attention window by itself,
which on a CPU costs more than the arithmetic; `vision` and `language` compute the same numbers for batches of equal
grids (a test compares them).
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

SPECIALS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)

# The prompt layout of the Qwen2.5-VL family: ChatML, a default system turn, one pad token for each image or video.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' or 'image' in part %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' or 'video' in part %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif 'text' in part %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

IMAGE_PROCESSOR = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "processor_class": "Qwen2_5_VLProcessor",
    "patch_size": 14,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "min_pixels": 4 * 28 * 28,
    "max_pixels": 144 * 28 * 28,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}

WIDTH = 192  # of the LLM
WORDS = (
    "Date", "Item", "Qty", "Tax", "Size", "Key", "Lot", "Age", "Bin", "Gate", "Unit", "Zip", "Fax", "Day",
    "Ann", "Bob", "Eve", "Kim", "Leo", "Max", "Sam", "Tom", "Zoe", "Ida", "Jan", "Lou",
    "bus", "bar", "zoo", "gym", "tea", "pie", "jam", "hat", "car", "van", "toy", "art",
    "inn", "spa", "pub", "ice", "nut", "oil", "fox", "cat", "dog", "owl", "bee", "sun",
    "red", "green", "blue", "yellow", "purple",
    "circle", "square", "triangle", "star", "cross", "ring",
    "circles", "squares", "triangles", "stars", "crosses", "rings",
    "zero", "one", "two", "three", "four", "left", "right", "yes", "no", "Yes", "No",
    "Up", "Down", "To the left", "To the right",
)  # fmt: skip
PHRASES = (
    "system\n", "user\n", "assistant\n", "You are a helpful assistant.",
    "\nAnswer the question using a single word or phrase.", "\nAnswer the question with a single word.",
    "\nAnswer with the option's letter from the given choices directly.", " Please answer yes or no.",
    "What is the ", "What is the value of ", "Who has the highest value", "Who has the lowest value",
    "What does the ", " sign say", "What colour is the ", "Which shape is ", "How many ", " shapes are there",
    "Is there a ", "Is there an ", " in the image", " in this image", "Are there ", "Is there only one ", "Is the ",
    " on the left of the ", " on the right of the ", "Context: Look at the labelled parts of the diagram.\n",
    "Which shape has the label ", "Which label belongs to the ", "Question:", "What direction is the ",
    " moving within the video", "Which shape is moving in the video", "\nOption:\n(A) ", "\n(B) ", "\n(C) ", "\n(D) ",
    "\nOnly give the best option.\n", "\nA. ", "\nB. ", "\nC. ", "\nD. ", "\nE. ",
)  # fmt: skip


def tokenizer(
    template: str = CHAT_TEMPLATE, specials: Sequence[str] = (), phrases: Sequence[str] = ()
) -> PreTrainedTokenizerFast:
    """Bytes, so that any text is tokenised, plus one token for each frequent phrase and word of the benchmarks.

    Args:
        template: chat template.
        specials, phrases: tokens of another family, which get the last ids.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    inner = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in SPECIALS])
    inner.add_tokens([AddedToken(p, normalized=False) for p in PHRASES])
    inner.add_tokens([AddedToken(w, normalized=False, single_word=True) for w in WORDS])
    inner.add_special_tokens([AddedToken(s, special=True, normalized=False) for s in specials])
    inner.add_tokens([AddedToken(p, normalized=False) for p in phrases])
    return PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=[*SPECIALS[1:], *specials],
        chat_template=template,
        padding_side="left",
        model_max_length=32768,
    )


def config(tokens: PreTrainedTokenizerFast) -> Qwen2_5_VLConfig:
    """LLM: width 192, 6 layers, 6/2 heads. Vision tower: width 128, 4 blocks, full attention in blocks 1 and 3."""
    ids: dict[str, Any] = {
        f"{name}_token_id": tokens.convert_tokens_to_ids(f"<|{token}|>")
        for name, token in (
            ("image", "image_pad"),
            ("video", "video_pad"),
            ("vision_start", "vision_start"),
            ("vision_end", "vision_end"),
        )
    }
    common = {"bos_token_id": None, "eos_token_id": tokens.eos_token_id, "pad_token_id": tokens.pad_token_id}
    return Qwen2_5_VLConfig(
        text_config={
            "vocab_size": len(tokens),
            "hidden_size": WIDTH,
            "intermediate_size": 384,
            "num_hidden_layers": 6,
            "num_attention_heads": 6,
            "num_key_value_heads": 2,
            "max_position_embeddings": 32768,
            "rope_parameters": {"rope_type": "default", "rope_theta": 50.0, "mrope_section": [4, 6, 6]},
            "tie_word_embeddings": True,
            **common,
        },
        vision_config={
            "depth": 4,
            "hidden_size": 128,
            "intermediate_size": 256,
            "num_heads": 4,
            "out_hidden_size": WIDTH,
            "fullatt_block_indexes": [1, 3],
            "window_size": 112,
            "tokens_per_second": 2,
        },
        tie_word_embeddings=True,
        **ids,
        **common,
    )


def create(seed: int) -> Any:
    """A stock model with seeded weights of a size that trains from the first step."""
    tokens = tokenizer()
    torch.manual_seed(seed)
    model: Any = Qwen2_5_VLForConditionalGeneration(config(tokens))
    fill(
        model,
        seed,
        depth=lambda name: 4 if "visual" in name else 6,
        last=("o_proj.weight", "attn.proj.weight", "down_proj.weight"),
        factors={"merger.mlp.2.weight": 0.2},
    )
    return model


@torch.no_grad()
def fill(
    model: Any, seed: int, *, depth: Callable[[str], int], last: tuple[str, ...], factors: Mapping[str, float]
) -> None:
    """Seeded weights that train from the first step; a text's embedding is the code of what its cell shows first.

    Args:
        depth: of the stack that a parameter belongs to.
        last: endings of the names of each block's last projections, which begin smaller in deep stacks.
        factors: for other endings.
    """
    generator = torch.Generator().manual_seed(seed)
    for name, p in sorted(model.named_parameters()):
        if p.ndim == 1:
            p.fill_(1.0 if name.endswith("weight") and ("norm" in name or "ln_q" in name) else 0.0)
            continue
        std = 0.07 if "embed_tokens" in name else 1 / math.sqrt(math.prod(p.shape[1:]))
        if name.endswith(last):
            std *= 0.5 / math.sqrt(2 * depth(name))
        for ending, factor in factors.items():
            if name.endswith(ending):
                std *= factor
        p.copy_(std * torch.randn(p.shape, generator=generator))
    embeddings = model.get_input_embeddings().weight
    embeddings.copy_(codebook(len(embeddings))[0])


def codebook(vocabulary: int, seed: int = 7) -> Tensor:
    """(4, vocabulary, WIDTH): what a visual token shows, as a sum of random codes, one for each of four slots.

    Slots 0 and 1 name what the cell itself shows ("red", "star"; "K", "7"), 2 and 3 what it belongs to (the label of a
    field, the name of a bar, the direction of a moving object). Never changed and not part of the checkpoint.
    """
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(4, vocabulary, WIDTH, generator=generator) / math.sqrt(WIDTH)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding; cos and sin broadcast against x."""
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def norm(x: Tensor, weight: Tensor) -> Tensor:
    """Root-mean-square norm with the family's epsilon."""
    return F.rms_norm(x, (x.shape[-1],), weight, 1e-6)


@functools.lru_cache(maxsize=16)
def _layout(h: int, w: int, head: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor | None]:
    """Window order of an h x w grid (merged cells), its inverse, rotary tables in that order, window mask or None."""
    cell = torch.arange(h * w).view(h, w)
    rows = [cell[r : r + 4, c : c + 4].reshape(-1) for r in range(0, h, 4) for c in range(0, w, 4)]
    order = torch.cat(rows)
    patch_row = (order // w * 2)[:, None] + torch.tensor([0, 0, 1, 1])
    patch_col = (order % w * 2)[:, None] + torch.tensor([0, 1, 0, 1])
    inverse = 1 / 10000 ** (torch.arange(0, head // 2, 2).float() / (head // 2))
    angle = torch.cat([p.reshape(-1, 1) * inverse for p in (patch_row, patch_col)], -1)
    angle = torch.cat([angle, angle], -1)
    mask = None
    if h % 4 or w % 4:
        window = torch.cat([torch.full((4 * len(r),), i) for i, r in enumerate(rows)])
        mask = window[:, None] == window[None]
    return order, torch.argsort(order), angle.cos()[:, None], angle.sin()[:, None], mask


def _block(x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor | None, windows: int, block: Any) -> Tensor:
    n, p, width = x.shape
    heads = block.attn.num_heads
    qkv = block.attn.qkv(norm(x, block.norm1.weight)).view(n, p, 3, heads, -1)
    q, k = rotate(qkv[:, :, 0], cos, sin), rotate(qkv[:, :, 1], cos, sin)
    q, k, v = (z.reshape(n * windows, p // windows, heads, -1).transpose(1, 2) for z in (q, k, qkv[:, :, 2]))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    x = x + block.attn.proj(out.transpose(1, 2).reshape(n, p, width))
    z = norm(x, block.norm2.weight)
    return x + block.mlp.down_proj(F.silu(block.mlp.gate_proj(z)) * block.mlp.up_proj(z))


def _looks(x: Tensor, cos: Tensor, sin: Tensor, block: Any, cells: Tensor, partners: Tensor) -> Tensor:
    n, p, _ = x.shape
    heads = block.attn.num_heads
    qkv = block.attn.qkv(norm(x, block.norm1.weight)).view(n, p, 3, heads, -1)[..., :2, :]
    q, k = rotate(qkv[:, :, 0], cos, sin), rotate(qkv[:, :, 1], cos, sin)  # (n, p, 2, d)
    places = (cells[..., None] * 4 + torch.arange(4)).reshape(n, -1)
    q = q.gather(1, places[..., None, None].expand(-1, -1, *q.shape[2:]))
    seen = (torch.einsum("nihd,njhd->nhij", q, k) * block.attn.scaling).log_softmax(-1)
    seen = seen.view(n, 2, -1, p // 4, 4).logsumexp(-1)  # (n, 2, 4 cells, cells)
    there = (partners >= 0).repeat_interleave(4, 1)
    if not bool(there.any()):
        return x.new_zeros(())
    aim = partners.clamp_min(0).repeat_interleave(4, 1)[:, None, :, None].expand(-1, 2, -1, 1)
    return -seen.gather(-1, aim)[..., 0].transpose(1, 2)[there].mean()


# Layers of the language model two of whose heads are shown where to look: from an option to its letter, from where the
# answer is given to what is asked for, to the visual tokens that tell it, and to the option that says it.
GUIDED = {"letter": 0, "word": 1, "visual": 3, "option": 5}


def _layer(x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, layer: Any) -> Tensor:
    b, s, width = x.shape
    a = layer.self_attn
    z = norm(x, layer.input_layernorm.weight)
    q = rotate(a.q_proj(z).view(b, s, -1, a.head_dim), cos, sin).transpose(1, 2)
    k = rotate(a.k_proj(z).view(b, s, -1, a.head_dim), cos, sin).transpose(1, 2)
    v = a.v_proj(z).view(b, s, -1, a.head_dim).transpose(1, 2)
    k, v = (y.repeat_interleave(a.num_key_value_groups, 1) for y in (k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    x = x + a.o_proj(out.transpose(1, 2).reshape(b, s, width))
    z = norm(x, layer.post_attention_layernorm.weight)
    return x + layer.mlp.down_proj(F.silu(layer.mlp.gate_proj(z)) * layer.mlp.up_proj(z))


def _answers(x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, layer: Any, aim: Tensor) -> Tensor:
    b, s, _ = x.shape
    a = layer.self_attn
    row, at = aim.any(-1).nonzero(as_tuple=True)
    if not len(row):
        return x.new_zeros(())
    z = norm(x, layer.input_layernorm.weight)
    k = rotate(a.k_proj(z).view(b, s, -1, a.head_dim), cos, sin)  # (b, s, 2, d)
    q = F.linear(z[row, at], a.q_proj.weight, a.q_proj.bias).view(len(row), -1, a.head_dim)
    q = rotate(q, cos[row, at], sin[row, at])[:, :: a.num_key_value_groups]  # the first head of each key head
    scores = torch.einsum("nhd,nshd->nhs", q, k[row]) * a.scaling
    seen = scores.masked_fill(~mask[row, 0, at][:, None], -torch.inf).log_softmax(-1)
    return -seen.masked_fill(~aim[row, at][:, None], -torch.inf).logsumexp(-1).mean()


class Network:
    """The batched forward over the weights of a stock model, and what else differs between families.

    Attributes:
        family: its name in `TinySpec`.
        clips: it is trained on clips and tall images, too; else on square images alone.
        parts: parameters of the stages vision and language, as beginnings of names.
        guided: layers of the language model as in `GUIDED`.
        before, after: the prompt around the visual tokens; `after` has a place for the question.
    """

    family = "qwen2_5_vl"
    clips = True
    parts: ClassVar[dict[str, tuple[str, ...]]] = {"vision": ("model.visual",), "language": ("model.language_model",)}
    guided: ClassVar[dict[str, int]] = GUIDED
    before = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<|vision_start|>"
    after = "<|vision_end|>{}<|im_end|>\n<|im_start|>assistant\n"

    def __init__(self, model: Any) -> None:
        self.model = model

    @staticmethod
    def tokenizer() -> PreTrainedTokenizerFast:
        """The checkpoint's tokenizer with its chat template."""
        return tokenizer()

    @staticmethod
    def create(seed: int) -> Any:
        """A stock model to train."""
        return create(seed)

    @staticmethod
    def write_processors(folder: Path) -> None:
        """The configuration of what makes pixels of images and clips."""
        (folder / "preprocessor_config.json").write_text(json.dumps(IMAGE_PROCESSOR, indent=2) + "\n", encoding="utf-8")
        video = {**IMAGE_PROCESSOR, "video_processor_type": "Qwen2VLVideoProcessor"}
        del video["image_processor_type"]
        (folder / "video_preprocessor_config.json").write_text(json.dumps(video, indent=2) + "\n", encoding="utf-8")

    def positions(self, grid: Sequence[int], keep: Tensor, offsets: Tensor, prefix: int) -> Tensor:
        """(axes, B, S) positions of `prefix` tokens, the kept visual tokens, and text that follows them.

        Args:
            grid: (t, h, w).
            keep: (B, K) visual tokens that are shown.
            offsets: (B, T) place of each token in its question.
        """
        b = len(keep)
        places = visual_positions(grid, prefix, 2)
        text = offsets + int(places[1:].max()) + 1
        return torch.cat([torch.arange(prefix).expand(3, b, prefix), places[:, keep], text.expand(3, -1, -1)], 2)

    def vision(self, pixels: Tensor, cells: Tensor | None = None, partners: Tensor | None = None) -> Any:
        """Visual tokens of images or clips of one size.

        Args:
            pixels: (B, F, H, W, 3) uint8; F = 1 for an image, else even.

        Returns:
            (B, t * h * w, WIDTH) in raster order; with `cells` and `partners` (B, n), also how far two heads of the
            last block are from looking from each cell to its partner (-1: none), a mean negative log-likelihood.
        """
        visual = self.model.model.visual
        b, frames, height, width, _ = pixels.shape
        h, w, t = height // 28, width // 28, max(1, frames // 2)
        order, back, cos, sin, mask = _layout(h, w, 32)
        mean = pixels.new_tensor(IMAGE_PROCESSOR["image_mean"], dtype=torch.float32) * 255
        std = pixels.new_tensor(IMAGE_PROCESSOR["image_std"], dtype=torch.float32) * 255
        x = (pixels.float() - mean) / std
        # (B, t, two frames, h, 2, 14, w, 2, 14, C) -> cells, patches of a cell, (C, frame, y, x)
        x = x.view(b, t, -1, h, 2, 14, w, 2, 14, 3).permute(0, 1, 3, 6, 4, 7, 9, 2, 5, 8)
        x = x.reshape(b * t, h * w, 4, -1)[:, order].reshape(b * t, h * w * 4, -1)
        weight = visual.patch_embed.proj.weight
        if frames == 1:  # the processor shows an image as two equal frames
            weight = weight.sum(2)
        x = x @ weight.reshape(weight.shape[0], -1).T
        guide = x.new_zeros(())
        for i, block in enumerate(visual.blocks):
            if cells is not None and partners is not None and i == len(visual.blocks) - 1 and t == 1:
                guide = _looks(x, cos, sin, block, back[cells], torch.where(partners >= 0, back[partners], -1))
            full = i in visual.fullatt_block_indexes
            windows = 1 if full or mask is not None else h * w // 16
            x = _block(x, cos, sin, None if full else mask, windows, block)
        merger = visual.merger
        x = norm(x, merger.ln_q.weight).reshape(b * t, h * w, -1)
        features = merger.mlp(x)[:, back].reshape(b, t * h * w, -1)
        return features if cells is None else (features, guide)

    def shown(self, batch: dict[str, Any], codes: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """Visual tokens of a batch, and losses by name: what the encoder is told beside what its tokens should say.

        `codes` is the `codebook`, for families that use it.
        """
        features, guide = self.vision(batch["pixels"], batch["cells"], batch["partners"])
        return features, {"partner": guide}

    def language(
        self, embeds: Tensor, positions: Tensor, segments: Tensor, aims: dict[str, Tensor] | None = None
    ) -> Any:
        """Final hidden states of packed prompts.

        Args:
            embeds: (B, S, WIDTH).
            positions: (axes, B, S).
            segments: (B, S) int64; 0 is seen by all that follows, other numbers only by their own, negative ones are
                padding.
            aims: (B, S, S) bool for names of `guided`, from which token two heads of that layer should look where; then
                the mean negative log-likelihoods of doing so are returned, too.
        """
        core = self.model.model.language_model
        angle = self._angle(positions)
        angle = torch.cat([angle, angle], -1)[:, :, None]
        same = segments[:, :, None] == segments[:, None]
        mask = (same | (segments == 0)[:, None]) & torch.ones(same.shape[1:], dtype=torch.bool).tril()
        mask, cos, sin = mask[:, None], angle.cos(), angle.sin()
        x = embeds
        guides = {}
        for i, layer in enumerate(core.layers):
            for name, aim in (aims or {}).items():
                if i == self.guided[name]:
                    guides[name] = _answers(x, cos, sin, mask, layer, aim)
            x = _layer(x, cos, sin, mask, layer)
        hidden = norm(x, core.norm.weight)
        return hidden if aims is None else (hidden, guides)

    def _angle(self, positions: Tensor) -> Tensor:
        """(B, S, half a head) rotary angles."""
        core = self.model.model.language_model
        sections = core.config.rope_parameters["mrope_section"]
        axis = torch.tensor([i for i, n in enumerate(sections) for _ in range(n)])
        return positions.permute(1, 2, 0).float()[..., axis] * core.rotary_emb.inv_freq

    def embed(self, ids: Tensor) -> Tensor:
        """Text embeddings."""
        return F.embedding(ids, self.model.model.language_model.embed_tokens.weight)

    def logits(self, hidden: Tensor) -> Tensor:
        """Next-token logits by the tied embeddings."""
        return hidden @ self.model.model.language_model.embed_tokens.weight.T


def visual_positions(grid: Sequence[int], start: int, interval: int) -> Tensor:
    """(3, t * h * w) positions of visual tokens; `interval` is the step in time between frames."""
    t, h, w = grid
    axes = torch.meshgrid(torch.arange(t) * interval, torch.arange(h), torch.arange(w), indexing="ij")
    return torch.stack([a.reshape(-1) for a in axes]) + start
