"""Qwen2.5-VL behind the backbone interface."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch.nn import functional as F
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb, apply_rotary_pos_emb_vision
from transformers.vision_utils import get_vision_window_index

from visionselector_eval.baselines.contract.base import Compressor, EncoderTrace, PixelCompressor
from visionselector_eval.baselines.contract.budget import Budget
from visionselector_eval.baselines.contract.errors import InputError
from visionselector_eval.models.backbones.base import ALL_TRACES, Backbone, block_of
from visionselector_eval.models.backbones.tower import received_attention
from visionselector_eval.models.splice import CompressedPrompt, Encoded, Prompt, VisualItem

if TYPE_CHECKING:
    from torch import Tensor


@dataclass
class _Captured:
    """The input of a block's attention for one vision pass, patches in window order."""

    attention: Any
    hidden: Tensor  # (P, W)
    position_embeddings: tuple[Tensor, Tensor]

    def values(
        self, rows: slice, segments: Sequence[int], raster: Tensor, merged: int, names: Collection[str]
    ) -> dict[str, Tensor]:
        """Received attention and keys of one item, in raster order of merged tokens.

        Args:
            rows: the item's patches.
            segments: sizes in patches of what attention does not cross.
            raster: (N,) the merged tokens' places in window order.
            merged: patches of a token.
            names: which.
        """
        module = self.attention
        q, k, _ = module.qkv(self.hidden[rows]).unflatten(-1, (3, module.num_heads, -1)).unbind(1)
        cos, sin = (part[rows] for part in self.position_embeddings)
        q, k = apply_rotary_pos_emb_vision(q, k, cos, sin)
        told = {}
        if "received" in names:
            per_patch = received_attention(q, k, segments, module.scaling)
            told["received"] = per_patch.view(-1, merged).mean(1)[raster]
        by_token = k.float().unflatten(0, (-1, merged))
        if "keys" in names:
            told["keys"] = by_token.mean((1, 2))[raster]
        if "keys_concat" in names:
            told["keys_concat"] = by_token.flatten(2).mean(1)[raster]
        return told


class Qwen2_5_VL(Backbone):
    """Qwen2.5-VL, any size; 3-D positions, window-ordered vision tower, no CLS token."""

    model_class: ClassVar[Any] = Qwen2_5_VLForConditionalGeneration
    rotate = staticmethod(apply_rotary_pos_emb)
    traces = frozenset({"received", "keys", "keys_concat"})

    @property
    def encoder_blocks(self) -> Sequence[Any]:
        return self.model.model.visual.blocks

    @property
    def ranking_block(self) -> int:  # type: ignore[override]
        """The last block with full attention."""
        return max(self.model.config.vision_config.fullatt_block_indexes)

    @property
    def _merge(self) -> int:
        return self.model.config.vision_config.spatial_merge_size

    def _kinds(self, input_ids: Tensor) -> Tensor:
        """0 for text, 1 for image and 2 for video placeholders; shape of `input_ids`."""
        config = self.model.config
        return (input_ids == config.image_token_id).long() + 2 * (input_ids == config.video_token_id).long()

    def _layout(self, inputs: Mapping[str, Any]) -> list[list[tuple[int, int, tuple[int, int, int]]]]:
        """For each prompt its items in order: (kind, number among all of that kind in the batch, merged grid)."""
        grids: dict[int, list[tuple[int, int, int]]] = {1: [], 2: []}
        for kind, name in ((1, "image_grid_thw"), (2, "video_grid_thw")):
            if inputs.get(name) is not None:
                grids[kind] = [(t, h // self._merge, w // self._merge) for t, h, w in inputs[name].tolist()]
        used = {1: 0, 2: 0}
        rows = []
        for kinds in self._kinds(inputs["input_ids"]).tolist():
            visual = [kind for kind in kinds if kind]
            items, at = [], 0
            while at < len(visual):
                kind = visual[at]
                name = _KIND_NAMES[kind]
                if used[kind] >= len(grids[kind]):
                    raise InputError(
                        f"the prompts have placeholders for more {name}s than the {len(grids[kind])} given"
                    )
                grid = grids[kind][used[kind]]
                size = grid[0] * grid[1] * grid[2]
                if visual[at : at + size] != [kind] * size:
                    raise InputError(
                        f"the placeholders of {name} {used[kind]} do not match its {size} tokens: "
                        "was the prompt cut after the processor made it?"
                    )
                items.append((kind, used[kind], grid))
                used[kind] += 1
                at += size
            rows.append(items)
        for kind, name in _KIND_NAMES.items():
            if used[kind] < len(grids[kind]):
                raise InputError(
                    f"{len(grids[kind])} {name}s were given but the prompts have placeholders for {used[kind]}"
                )
        return rows

    def visual_totals(self, inputs: Mapping[str, Any]) -> list[int]:
        return (self._kinds(inputs["input_ids"]) > 0).sum(1).tolist()

    @torch.no_grad()
    def encode(self, inputs: Mapping[str, Any], needs: frozenset[str] = ALL_TRACES) -> Encoded:
        inputs = self.to_device(inputs)
        layout = self._layout(inputs)
        needs = self.offered(needs)
        core = self.model.model
        encoded: dict[int, list[VisualItem]] = {}
        for kind, pixels, grid_name, features_of in (
            (1, "pixel_values", "image_grid_thw", core.get_image_features),
            (2, "pixel_values_videos", "video_grid_thw", core.get_video_features),
        ):
            if inputs.get(pixels) is None:
                continue
            with self._capture(needs) as captured:
                output = features_of(inputs[pixels], inputs[grid_name])
            encoded[kind] = list(self._items(_KIND_NAMES[kind], output, inputs[grid_name], captured, needs))
        return Encoded(rows=[[encoded[kind][number] for kind, number, _ in row] for row in layout])

    @contextmanager
    def _capture(self, needs: frozenset[str]) -> Iterator[dict[int, _Captured]]:
        """Records the input of the attention of the blocks that `needs` name, while the vision tower runs."""
        captured: dict[int, _Captured] = {}

        def keep(block: int) -> Callable[..., None]:
            def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                hidden = args[0] if args else kwargs["hidden_states"]
                captured[block] = _Captured(module, hidden, kwargs["position_embeddings"])

            return hook

        handles = []
        try:
            for block in sorted({block_of(need, self.ranking_block, self.encoder_depth) for need in needs}):
                attention = self.encoder_blocks[block].attn
                handles.append(attention.register_forward_pre_hook(keep(block), with_kwargs=True))
            yield captured
        finally:
            for handle in handles:
                handle.remove()

    def _items(
        self,
        kind: Literal["image", "video"],
        output: Any,
        grids: Tensor,
        captured: dict[int, _Captured],
        needs: frozenset[str],
    ) -> Iterator[VisualItem]:
        start = 0
        planes = list(zip(*(getattr(output, "deepstack_features", None) or ()), strict=True))
        for number, (t, h, w) in enumerate(grids.tolist()):
            yield VisualItem(
                kind=kind,
                grid=(t, h // self._merge, w // self._merge),
                features=output.pooler_output[number],
                make_trace=partial(self._trace, captured, start, (t, h, w), needs) if captured else None,
                planes=planes[number] if planes else (),
            )
            start += t * h * w

    @torch.no_grad()
    def _trace(
        self, captured: Mapping[int, _Captured], start: int, thw: tuple[int, int, int], needs: frozenset[str]
    ) -> EncoderTrace:
        """What the tower tells of the item whose patches begin at `start`; `thw`: its grid of patches."""
        rows, raster = slice(start, start + math.prod(thw)), self._raster(thw).to(self.device)
        fields: dict[str, Tensor] = {}
        at_layers: dict[str, Tensor] = {}
        for block, told in captured.items():
            asked = {need for need in needs if block_of(need, self.ranking_block, self.encoder_depth) == block}
            names = {need.partition("@")[0] for need in asked}
            values = told.values(rows, self._segments(block, thw), raster, self._merge**2, names)
            fields |= {need: values[need] for need in asked if "@" not in need}
            at_layers |= {need: values[need.partition("@")[0]] for need in asked if "@" in need}
        return EncoderTrace(**fields, at_layers=at_layers or None)

    def _windows(self, thw: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
        """The order of an item's merged tokens in the tower, and where its windows begin and end, in patches."""
        vision = self.model.config.vision_config
        return get_vision_window_index(torch.tensor([thw]), self._merge, vision.window_size, vision.patch_size)

    def _raster(self, thw: tuple[int, int, int]) -> Tensor:
        """(N,) for each merged token in raster order its place in the tower's."""
        return torch.argsort(self._windows(thw)[0])

    def _segments(self, block: int, thw: tuple[int, int, int]) -> list[int]:
        """Sizes in patches of what a block's attention does not cross: temporal steps, or windows."""
        if block in self.model.config.vision_config.fullatt_block_indexes:
            return [thw[1] * thw[2]] * thw[0]
        return self._windows(thw)[1].diff().tolist()

    @torch.no_grad()
    def prompt(self, inputs: Mapping[str, Any], keys: Sequence[str]) -> Prompt:
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        kinds = self._kinds(ids)
        positions, _ = self.model.model.get_rope_index(
            ids,
            mm_token_type_ids=kinds,
            image_grid_thw=inputs.get("image_grid_thw"),
            video_grid_thw=inputs.get("video_grid_thw"),
            second_per_grid_ts=inputs.get("second_per_grid_ts"),
            attention_mask=mask,
        )
        return Prompt(
            input_ids=ids,
            embeds=self.model.get_input_embeddings()(ids),
            attention_mask=mask,
            position_ids=positions,
            visual=(kinds > 0) & mask.bool(),
            question=self.question(ids, mask, kinds > 0, (self.model.config.vision_end_token_id,)),
            keys=keys,
        )

    def resize(self, inputs: Mapping[str, Any], compressor: Compressor, budget: Budget) -> dict[str, Any]:
        if not isinstance(compressor, PixelCompressor):
            raise InputError(f"method '{compressor.name}' has stage 'pixels' but must be a PixelCompressor")
        layout = self._layout(inputs)
        sizes: dict[int, list[tuple[int, int]]] = {1: [], 2: []}
        for row in layout:
            for kind, _, (t, h, w) in row:
                count = compressor.count(t * h * w, budget)
                sizes[kind].append(compressor.size(h, w, max(1, count // t)))
        shorter = dict(inputs)
        for kind, pixels, grid_name in (
            (1, "pixel_values", "image_grid_thw"),
            (2, "pixel_values_videos", "video_grid_thw"),
        ):
            if inputs.get(pixels) is not None:
                shorter[pixels], shorter[grid_name] = self._lower_pixels(inputs[pixels], inputs[grid_name], sizes[kind])

        id_rows = []
        for row_number, (ids, mask) in enumerate(zip(inputs["input_ids"], inputs["attention_mask"], strict=True)):
            ids = ids[mask.bool()]
            kinds = self._kinds(ids)
            keep = kinds == 0
            indices, at = kinds.nonzero().squeeze(1), 0
            for kind, number, (t, h, w) in layout[row_number]:
                new_h, new_w = sizes[kind][number]
                for _ in range(t):
                    keep[indices[at : at + new_h * new_w]] = True
                    at += h * w
            id_rows.append(ids[keep])
        size = max(map(len, id_rows))
        pad = self.processor.tokenizer.pad_token_id
        shorter["input_ids"] = torch.stack([F.pad(row, (size - len(row), 0), value=pad) for row in id_rows])
        shorter["attention_mask"] = torch.stack([F.pad(torch.ones_like(row), (size - len(row), 0)) for row in id_rows])
        shorter.pop("mm_token_type_ids", None)
        return shorter

    def _lower_pixels(self, pixels: Tensor, grids: Tensor, sizes: Sequence[tuple[int, int]]) -> tuple[Tensor, Tensor]:
        """Flattened patches of each item, made again from its frames at another size (bicubic, anti-aliased).

        Args:
            pixels: (P, C * T * p * p) as the processor returns them.
            grids: (items, 3) in patches.
            sizes: merged (h, w).
        """
        vision, m = self.model.config.vision_config, self._merge
        p, temporal, channels = vision.patch_size, vision.temporal_patch_size, vision.in_channels
        patches, new_grids, start = [], [], 0
        for (t, h, w), (new_h, new_w) in zip(grids.tolist(), sizes, strict=True):
            item = pixels[start : start + t * h * w].float()
            start += t * h * w
            # Patches stand as (t, h/m, w/m, m, m, C, T, p, p): merged windows first, then the patches inside one.
            frames = item.view(t, h // m, w // m, m, m, channels, temporal, p, p).permute(0, 6, 5, 1, 3, 7, 2, 4, 8)
            frames = frames.reshape(t * temporal, channels, h * p, w * p)
            low, high = frames.amin((0, 2, 3), keepdim=True), frames.amax((0, 2, 3), keepdim=True)
            size = (new_h * m * p, new_w * m * p)
            smaller = F.interpolate(frames, size=size, mode="bicubic", antialias=True, align_corners=False)
            smaller = smaller.clamp(low, high)  # bicubic overshoots at edges; 8-bit resizing clips there too
            smaller = smaller.view(t, temporal, channels, new_h, m, p, new_w, m, p).permute(0, 3, 6, 4, 7, 2, 1, 5, 8)
            patches.append(smaller.reshape(t * new_h * m * new_w * m, -1).to(pixels.dtype))
            new_grids.append((t, new_h * m, new_w * m))
        return torch.cat(patches), torch.tensor(new_grids, device=grids.device, dtype=grids.dtype)

    def vision_flops(self, inputs: Mapping[str, Any]) -> int | None:
        """Of images and videos together."""
        grids = [g for name in _GRIDS if inputs.get(name) is not None for g in inputs[name].tolist()]
        return sum(self._tower_flops((t, h // self._merge, w // self._merge)) for t, h, w in grids)

    def _tower_flops(self, grid: tuple[int, int, int]) -> int:
        return tower_flops(self.model.config.vision_config, grid)

    @classmethod
    def config_of(
        cls, text: Mapping[str, Any], vision: Mapping[str, Any], tokenizer: Any, *, tied: bool, **more: Any
    ) -> Any:
        """As `Backbone.config_of`; `text` has the family's `mrope_section`."""
        sizes = dict(text)
        section = sizes.pop("mrope_section")
        ids: dict[str, Any] = {
            f"{place}_token_id": tokenizer.convert_tokens_to_ids(f"<|{token}|>")
            for place, token in (("image", "image_pad"), ("video", "video_pad"))
        }
        for edge in ("start", "end"):
            ids[f"vision_{edge}_token_id"] = tokenizer.convert_tokens_to_ids(f"<|vision_{edge}|>")
        common = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
        language = {
            **sizes,
            "rms_norm_eps": 1e-6,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": section},
            "tie_word_embeddings": tied,
            **common,
        }
        patches = {**vision, "patch_size": 14, "temporal_patch_size": 2, "spatial_merge_size": 2}
        return cls._config(language, patches, tie_word_embeddings=tied, **ids, **common)

    @classmethod
    def _config(cls, text: Mapping[str, Any], vision: Mapping[str, Any], **common: Any) -> Any:
        tower = {**vision, "out_hidden_size": text["hidden_size"], "window_size": 112, "tokens_per_second": 2}
        return Qwen2_5_VLConfig(text_config=dict(text), vision_config=tower, **common)

    def llm_positions(self, compressed: CompressedPrompt) -> Tensor:
        """(4, B, S'): plain positions for the mask, then the 3-D positions, as transformers expects them."""
        plain = (compressed.attention_mask.cumsum(-1) - 1).clamp_min(0)
        return torch.cat([plain[None], compressed.position_ids])


_KIND_NAMES: dict[int, Literal["image", "video"]] = {1: "image", 2: "video"}
_GRIDS = ("image_grid_thw", "video_grid_thw")


def tower_flops(config: Any, grid: tuple[int, int, int]) -> int:
    """FLOPs of Qwen2.5-VL's vision encoder for one image or video.

    Args:
        config: the vision config.
        grid: merged (t, h, w), N = t*h*w.
    """
    t, h, w = grid
    merge = config.spatial_merge_size
    patches, width = t * h * w * merge**2, config.hidden_size
    voxels = config.in_channels * config.temporal_patch_size * config.patch_size**2
    linear = 4 * width * width + 3 * width * config.intermediate_size
    out = width * merge**2
    merger = t * h * w * (out * out + out * config.out_hidden_size)
    side = config.window_size // merge // config.patch_size
    windows = [t * min(side, h - y) * min(side, w - x) * merge**2 for y in range(0, h, side) for x in range(0, w, side)]
    whole = len(config.fullatt_block_indexes)
    windowed = sum((n // t) ** 2 * t for n in windows)
    attention = 4 * width * ((config.depth - whole) * windowed + whole * t * (h * w * merge**2) ** 2)
    return 2 * patches * (voxels * width + config.depth * linear) + 2 * merger + attention
