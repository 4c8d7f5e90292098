"""LLaVA-1.5 behind the backbone interface."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch.nn import functional as F
from transformers import CLIPImageProcessor, LlavaConfig, LlavaForConditionalGeneration, LlavaProcessor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from visionselector_eval.baselines.contract.base import Compressor, EncoderTrace, PixelCompressor, weights_digest
from visionselector_eval.baselines.contract.budget import Budget
from visionselector_eval.baselines.contract.errors import InputError
from visionselector_eval.models.backbones.base import ALL_TRACES, AT_LAYERS, Backbone, Foreign, block_of
from visionselector_eval.models.backbones.llava_original import OriginalLlava, is_original
from visionselector_eval.models.backbones.token_fusion import FusedLlava, FusionConfig, TokenFusion, fuse
from visionselector_eval.models.backbones.tower import received_attention
from visionselector_eval.models.splice import Encoded, Prompt, VisualItem, repad

if TYPE_CHECKING:
    from torch import Tensor

# lmms-eval's llava_hf writes this prompt where a checkpoint has no chat template of its own.
VICUNA_TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}A chat between a curious user and an artificial intelligence "
    "assistant. The assistant gives helpful, detailed, and polite answers to the user's questions. {% endif %}"
    "{% if message['role'] == 'user' %}USER: {% elif message['role'] == 'assistant' %}ASSISTANT: {% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] if part['type'] == 'image' %}"
    "<image>{{ '\\n' if loop.last else ' ' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] }}{% endfor %}{% endif %}"
    "{{ eos_token if message['role'] == 'assistant' else ' ' }}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


_OF_LAST = frozenset({"cls_whole", "keys_whole"})


def _at_block(need: str) -> bool:
    """Whether a need is one of the attention of a single block."""
    return need.partition("@")[0] in AT_LAYERS


def _ranking(name: str, q: Tensor, k: Tensor, scale: float) -> Tensor:
    """What (P, H, d) queries and keys of a block tell of an image, without the CLS token, which stands first."""
    if name == "cls":
        rows = torch.einsum("hd,nhd->hn", q[0].float() * scale, k.float())
        return rows.softmax(-1).mean(0)[1:]
    if name == "received":
        return received_attention(q, k, [len(k)], scale)[1:]
    return k[1:].float().mean(1) if name == "keys" else k[1:].float().flatten(1)


class Llava(Backbone):
    """LLaVA-1.5, any size: a CLIP tower of one image size, plain positions; images only.

    Down-sampled images go through the tower with its position embeddings interpolated. A checkpoint with
    `token_fusion` in its configuration has trained fusion for a projector (`token_fusion`).
    """

    model_class = LlavaForConditionalGeneration
    rotate = staticmethod(apply_rotary_pos_emb)

    def __init__(self, model: Any, processor: Any, **about: Any) -> None:
        config = model.config
        if config.vision_config.model_type != "clip_vision_model":
            raise InputError(
                f"'{about['id']}' has a vision tower of type '{config.vision_config.model_type}': the adapter for "
                "family 'llava' knows LLaVA-1.5's, which is 'clip_vision_model'"
            )
        if config.vision_feature_select_strategy != "default":
            raise InputError(
                f"'{about['id']}' shows the CLS token to its LLM (vision_feature_select_strategy "
                f"'{config.vision_feature_select_strategy}'): LLaVA-1.5 does not, it has 'default'"
            )
        if processor.chat_template is None:
            processor.chat_template = VICUNA_TEMPLATE
        super().__init__(model, processor, **about)
        processor.patch_size = self._patch  # the processor makes one placeholder for each square of this size

    @classmethod
    def model_class_for(cls, config: Any) -> Any:
        return FusedLlava if getattr(config, "token_fusion", None) is not None else cls.model_class

    @classmethod
    def foreign(
        cls, source: str, located: str, revision: str | None, raw: Mapping[str, Any], learned: Callable[[str], bool]
    ) -> Foreign | None:
        return OriginalLlava(source, located, revision, raw, learned) if is_original(raw) else None

    @property
    def remark(self) -> str:
        return "trained fusion, LLM retrained" if isinstance(self.model, FusedLlava) else ""

    def fused(self, fusion: TokenFusion) -> Llava:
        """This backbone with trained fusion for a projector; this one is used up.

        Raises:
            InputError: a fusion that does not fit.
        """
        model, about = fuse(self.model, fusion), f"{self.revision}+{weights_digest(fusion)[:16]}"
        return Llava(model, self.processor, id=self.id, revision=about, extra_weights=self.host.extra_weights)

    @property
    def traces(self) -> frozenset[str]:  # type: ignore[override]
        one_patch_one_token = isinstance(self.model.config.vision_feature_layer, int) and self._window == 1
        return ALL_TRACES if one_patch_one_token else ALL_TRACES - {"patches"}

    @property
    def _window(self) -> int:
        """Patches along one side of a visual token."""
        return getattr(self.model.model.multi_modal_projector, "window", 1)

    @property
    def _patch(self) -> int:
        """Side in pixels of one visual token."""
        return self.model.config.vision_config.patch_size * self._window

    def _visual(self, input_ids: Tensor) -> Tensor:
        """Placeholders of images; bool, shape of `input_ids`."""
        return input_ids == self.model.config.image_token_id

    def _grid(self, inputs: Mapping[str, Any]) -> tuple[int, int]:
        """Tokens (h, w) of each image of the batch."""
        height, width = inputs["pixel_values"].shape[-2:]
        return height // self._patch, width // self._patch

    def _images(self, inputs: Mapping[str, Any]) -> list[int]:
        """Images of each prompt."""
        totals = self.visual_totals(inputs)
        if inputs.get("pixel_values") is None:
            if any(totals):
                raise InputError("the prompts have placeholders for images but none are given")
            return [0] * len(totals)
        h, w = self._grid(inputs)
        if odd := [n for n in totals if n % (h * w)]:
            raise InputError(
                f"a prompt has {odd[0]} placeholders, no multiple of the {h * w} tokens of an image: "
                "was the prompt cut after the processor made it?"
            )
        counts = [n // (h * w) for n in totals]
        given = inputs["pixel_values"].shape[0]
        if sum(counts) != given:
            raise InputError(f"{given} images were given but the prompts have placeholders for {sum(counts)}")
        return counts

    def visual_totals(self, inputs: Mapping[str, Any]) -> list[int]:
        return self._visual(inputs["input_ids"]).sum(1).tolist()

    @torch.no_grad()
    def encode(self, inputs: Mapping[str, Any], needs: frozenset[str] = ALL_TRACES) -> Encoded:
        inputs, needs = self.to_device(inputs), self.offered(needs)
        counts = self._images(inputs)
        if not sum(counts):
            return Encoded(rows=[[] for _ in counts])
        pixels, grid = inputs["pixel_values"], (1, *self._grid(inputs))
        with self._capture(needs) as captured:
            features = self.features(pixels)
        items = iter(
            VisualItem(
                kind="image",
                grid=grid,
                features=item,
                make_trace=partial(self._trace, captured, number, grid, needs) if needs else None,
                project=self.model.model.multi_modal_projector if "patches" in needs else None,
            )
            for number, item in enumerate(features)
        )
        return Encoded(rows=[[next(items) for _ in range(count)] for count in counts])

    def features(self, pixels: Tensor) -> Sequence[Tensor]:
        """(N, D) for each of the (M, C, H, W) images, by the stock modules."""
        own = self.model.config.vision_config.image_size
        other = {} if pixels.shape[-2:] == (own, own) else {"interpolate_pos_encoding": True}
        with self._windows_of(pixels):
            return self.model.model.get_image_features(pixels, return_dict=True, **other).pooler_output

    @contextmanager
    def _windows_of(self, pixels: Tensor) -> Iterator[None]:
        """Tells a fusion the grid of patches, which need not be square where images were down-sampled."""
        if self._window == 1:
            yield
            return
        patch = self.model.config.vision_config.patch_size
        grid = pixels.shape[-2] // patch, pixels.shape[-1] // patch

        def tell(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            return args, {**kwargs, "grid": grid}

        handle = self.model.model.multi_modal_projector.register_forward_pre_hook(tell, with_kwargs=True)
        try:
            yield
        finally:
            handle.remove()

    @property
    def encoder_blocks(self) -> Sequence[Any]:
        return self.model.model.vision_tower.encoder.layers

    @property
    def ranking_block(self) -> int:  # type: ignore[override]
        """The block whose output is shown to the LLM (the first of several)."""
        layer = self.model.config.vision_feature_layer
        layer = layer if isinstance(layer, int) else layer[0]
        return (layer - 1 if layer > 0 else layer) % self.encoder_depth  # hidden state 0 is the embeddings'

    @contextmanager
    def _capture(self, needs: frozenset[str]) -> Iterator[dict[Any, Any]]:
        """Records what `_trace` needs while the tower runs: each block's input of attention, and the block output."""
        captured: dict[Any, Any] = {}
        last = self.encoder_depth - 1
        blocks = {block_of(need, self.ranking_block, self.encoder_depth) for need in needs if _at_block(need)}
        blocks |= {last} if needs & _OF_LAST else set()

        def attention_input(block: int) -> Any:
            def keep(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                captured[block] = module, (args[0] if args else kwargs["hidden_states"])

            return keep

        def output(module: Any, args: tuple[Any, ...], result: Any) -> None:
            captured["patches"] = result[0] if isinstance(result, tuple) else result

        handles = []
        try:
            for block in sorted(blocks):
                attention = self.encoder_blocks[block].self_attn
                handles.append(attention.register_forward_pre_hook(attention_input(block), with_kwargs=True))
            if "patches" in needs:
                handles.append(self.encoder_blocks[self.ranking_block].register_forward_hook(output))
            yield captured
        finally:
            for handle in handles:
                handle.remove()

    @torch.no_grad()
    def _trace(
        self, captured: Mapping[Any, Any], number: int, grid: tuple[int, int, int], needs: frozenset[str]
    ) -> EncoderTrace:
        """What the tower tells of image `number`; the CLS token stands first in its states, and takes part."""
        told: dict[str, Tensor] = {}
        by_block: dict[int, list[str]] = {}
        for need in filter(_at_block, needs):
            by_block.setdefault(block_of(need, self.ranking_block, self.encoder_depth), []).append(need)
        for block, asked in by_block.items():
            module, states = captured[block]
            q, k = (p(states[number]).unflatten(-1, (module.num_heads, -1)) for p in (module.q_proj, module.k_proj))
            told |= {need: _ranking(need.partition("@")[0], q, k, module.scale) for need in asked}
        if needs & _OF_LAST:
            module, states = captured[self.encoder_depth - 1]
            keys = module.k_proj(states[number]).float()
            if "cls_whole" in needs:
                row = keys @ module.q_proj(states[number, :1])[0].float() * keys.shape[1] ** -0.5
                told["cls_whole"] = row.softmax(-1)[1:]
            if "keys_whole" in needs:
                told["keys_whole"] = keys[1:]
        if "patches" in needs:
            told["patches"] = captured["patches"][number, 1:]
        at_layers = {name: told.pop(name) for name in list(told) if "@" in name}
        trace = EncoderTrace(**told, at_layers=at_layers or None)
        return trace.map(lambda values: self._per_token(values, grid)) if self._window > 1 else trace

    def _per_token(self, values: Tensor, grid: tuple[int, int, int]) -> Tensor:
        """(N, ...) the mean over each token's window, from (patches, ...) in raster order."""
        _, h, w = grid
        side = self._window
        return values.view(h, side, w, side, -1).mean((1, 3)).view(h * w, *values.shape[1:])

    def prompt(self, inputs: Mapping[str, Any], keys: Sequence[str]) -> Prompt:  # training learns these embeddings
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        visual = self._visual(ids)
        return Prompt(
            input_ids=ids,
            # The rows of placeholders are overwritten, and their id may lie outside the vocabulary.
            embeds=self.model.get_input_embeddings()(ids.masked_fill(visual, 0)),
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp_min(0)[None],
            visual=visual & mask.bool(),
            question=self.question(ids, mask, visual),
            keys=keys,
        )

    def resize(self, inputs: Mapping[str, Any], compressor: Compressor, budget: Budget) -> dict[str, Any]:
        if not isinstance(compressor, PixelCompressor):
            raise InputError(f"method '{compressor.name}' has stage 'pixels' but must be a PixelCompressor")
        if inputs.get("pixel_values") is None:
            return dict(inputs)
        self._images(inputs)
        pixels, (h, w) = inputs["pixel_values"].float(), self._grid(inputs)
        new_h, new_w = compressor.size(h, w, compressor.count(h * w, budget))
        low, high = pixels.amin((2, 3), keepdim=True), pixels.amax((2, 3), keepdim=True)
        size = (new_h * self._patch, new_w * self._patch)
        smaller = F.interpolate(pixels, size=size, mode="bicubic", antialias=True, align_corners=False)
        smaller = smaller.clamp(low, high)  # bicubic overshoots at edges; 8-bit resizing clips there too
        visual, mask = self._visual(inputs["input_ids"]), inputs["attention_mask"].bool()
        # Of each image's run of h * w placeholders the first new_h * new_w stay.
        stays = mask & ~(visual & ((visual.cumsum(1) - 1) % (h * w) >= new_h * new_w))
        source, real = repad(stays)
        pad = self.processor.tokenizer.pad_token_id
        return {
            "input_ids": inputs["input_ids"].gather(1, source).masked_fill(~real, 0 if pad is None else pad),
            "attention_mask": real.to(inputs["attention_mask"].dtype),
            "pixel_values": smaller.to(inputs["pixel_values"].dtype),
        }

    def vision_flops(self, inputs: Mapping[str, Any]) -> int | None:
        """Of the tower and of the projector; None without images."""
        if inputs.get("pixel_values") is None:
            return None
        config = self.model.config
        images = len(inputs["pixel_values"])
        patches = images * (config.vision_config.image_size // config.vision_config.patch_size) ** 2
        return clip_flops(config.vision_config, images) + projector_flops(config, patches)

    @classmethod
    def config_of(
        cls,
        text: Mapping[str, Any],
        vision: Mapping[str, Any],
        tokenizer: Any,
        *,
        tied: bool,
        fused: bool = False,
        **more: Any,
    ) -> LlavaConfig:
        """As `Backbone.config_of`; `fused`: with trained token fusion of the published sizes."""
        common: dict[str, Any] = {
            "bos_token_id": None,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
        }
        fusion = FusionConfig.published(vision["hidden_size"])
        own: dict[str, Any] = {}
        if fused:
            own = {"token_fusion": fusion.as_dict(), "vision_feature_layer": list(fusion.layers)}
        return LlavaConfig(
            text_config={"model_type": "llama", **text, "tie_word_embeddings": tied, **common},
            vision_config={"model_type": "clip_vision_model", **vision},
            image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
            tie_word_embeddings=tied,
            **own,
            **common,
        )

    @classmethod
    def processor_of(
        cls, vision: Mapping[str, Any], processor: Any, *, fused: bool = False, **more: Any
    ) -> LlavaProcessor:
        """Images of the tower's size, LLaVA's prompt, the tokenizer of `processor`."""
        processor.tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
        side = vision["image_size"]
        return LlavaProcessor(
            CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side}),
            processor.tokenizer,
            patch_size=vision["patch_size"] * (FusionConfig.published(1).window if fused else 1),
            vision_feature_select_strategy="default",
            chat_template=VICUNA_TEMPLATE,
            num_additional_image_tokens=1,
        )


def clip_flops(config: Any, images: int) -> int:
    """FLOPs of a CLIP vision tower for `images` images of its size, projector not counted.

    Args:
        config: the vision config. All its blocks run, the last one included.
    """
    patches, width = (config.image_size // config.patch_size) ** 2, config.hidden_size
    n = patches + 1  # the CLS token
    linear = 4 * width * width + 2 * width * config.intermediate_size
    pixels = config.num_channels * config.patch_size**2
    block = 2 * n * linear + 4 * n * n * width
    return images * (2 * patches * pixels * width + config.num_hidden_layers * block)


def projector_flops(config: Any, patches: int) -> int:
    """FLOPs of LLaVA-1.5's projector, or of trained token fusion in its place, for `patches` patches.

    Args:
        config: the whole model's.
    """
    width, out = config.vision_config.hidden_size, config.text_config.hidden_size
    layers = config.vision_feature_layer
    seen = width * (len(layers) if isinstance(layers, list) else 1)
    fusion = getattr(config, "token_fusion", None)
    if fusion is None:
        return 2 * patches * (seen * out + out * out)
    inner, spatial, window = fusion["fusion_hidden"], fusion["spatial_hidden"], fusion["window"] ** 2
    blocks = patches * (seen * inner + inner * width)
    return 2 * (blocks + patches // window * (window * width * spatial + spatial * out))
