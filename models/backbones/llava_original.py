"""LLaVA-1.5 and LLaVA-STF checkpoints in the layout of the original LLaVA code, read into transformers' Llava.

Such a folder's config.json has the language model's fields at its top, `mm_vision_tower` and its like, and neither
`text_config` nor `vision_config`. Its tensors go by the names of a Llama with `model.mm_projector.*` among them; the
vision tower's are there or are loaded from what `mm_vision_tower` names. docs/llava.md has the table of names.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from tokenizers import Tokenizer, decoders, normalizers, processors
from tokenizers.models import BPE
from transformers import (
    AutoTokenizer,
    CLIPImageProcessor,
    CLIPVisionConfig,
    CLIPVisionModel,
    GenerationConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.utils import cached_file

from visionselector_eval.baselines.contract.errors import InputError
from visionselector_eval.models.backbones.token_fusion import LAYERS, WINDOW, FusionConfig

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

IMAGE = "<image>"
_NEEDED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
_TEXT_FIELDS = (
    *_NEEDED,
    *("num_key_value_heads", "head_dim", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps"),
    *("tie_word_embeddings", "rope_theta", "rope_scaling", "attention_bias", "mlp_bias", "attention_dropout"),
    *("bos_token_id", "eos_token_id", "pad_token_id"),
)
# Weights of the language model, by the start of their names.
_LANGUAGE = re.compile(r"(?:model\.)?(layers\.\d+\.|embed_tokens\.|norm\.)")
_TOWER = "vision_model."
# Tables that are computed, stored by old versions of the code.
_COMPUTED = ("rotary_emb.inv_freq", "position_ids")
_CLIP_HEAD = 64  # width of an attention head in every CLIP that OpenAI released


def is_original(config: Mapping[str, Any]) -> bool:
    """Whether the fields of a config.json are the original LLaVA code's."""
    return (
        config.get("model_type") in ("llava", "llava_llama")
        and "mm_vision_tower" in config
        and not {"vision_config", "text_config"} & set(config)
    )


@dataclass(frozen=True)
class _Stored:
    """A tensor in a file, read when it is asked for."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]


class OriginalLlava:
    """A checkpoint in the original layout.

    Args:
        source: as the user wrote it.
        located: folder or hub id.
        revision: on the hub.
        raw: fields of its config.json.
        learned: whether a tensor of this name is a learned method's, which goes beside the backbone.

    Raises:
        InputError: what can't be read into transformers' Llava; one line says why.
    """

    def __init__(
        self,
        source: str,
        located: str,
        revision: str | None,
        raw: Mapping[str, Any],
        learned: Callable[[str], bool] = lambda name: False,
    ) -> None:
        self.source, self.located, self.revision, self.raw = source, located, revision, dict(raw)
        self.learned = learned
        if missing := [name for name in _NEEDED if not isinstance(raw.get(name), int)]:
            raise InputError(f"config.json of '{source}' lacks '{missing[0]}': is it a LLaVA checkpoint?")
        if raw.get("mm_use_im_start_end"):
            raise InputError(
                f"'{source}' puts markers around images (mm_use_im_start_end): LLaVA-1.5 does not, and they are not "
                "supported"
            )

    # what it holds ----------------------------------------------------------------------------------------------------

    @cached_property
    def _tensors(self) -> dict[str, _Stored]:
        """All tensors of its files by name, safetensors or torch's own."""
        found: dict[str, _Stored] = {}
        for file in self._files():
            if file.suffix == ".safetensors":
                with safe_open(file, framework="pt") as tensors:
                    for name in tensors.keys():  # noqa: SIM118
                        shape = tuple(tensors.get_slice(name).get_shape())
                        found[name] = _Stored(shape, partial(_from_safetensors, file, name))
            else:
                held = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
                for name, tensor in held.items():
                    found[name] = _Stored(tuple(tensor.shape), tensor.clone)
        if not found:
            raise InputError(f"'{self.source}' holds no weights: model.safetensors or pytorch_model.bin is missing")
        return {name: tensor for name, tensor in found.items() if not name.endswith(_COMPUTED)}

    def _files(self) -> Iterator[Path]:
        for single, index in (
            ("model.safetensors", "model.safetensors.index.json"),
            ("pytorch_model.bin", "pytorch_model.bin.index.json"),
        ):
            if path := self._file(index):
                shards = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
                for shard in shards:
                    if (part := self._file(shard)) is None:
                        raise InputError(f"'{self.source}' lacks {shard}, which {index} names: download it again")
                    yield part
                return
            if path := self._file(single):
                yield path
                return

    def _file(self, name: str) -> Path | None:
        found = cached_file(self.located, name, revision=self.revision, _raise_exceptions_for_missing_entries=False)
        return Path(found) if found is not None else None

    @cached_property
    def _parts(self) -> tuple[dict[str, _Stored], dict[str, _Stored], dict[str, _Stored]]:
        """Tensors of the language model and of the vision tower by their new names, and the rest by their own."""
        language, tower, rest = {}, {}, {}
        for name, tensor in self._tensors.items():
            if name == "lm_head.weight":
                language[name] = tensor
            elif _TOWER in name:
                tower[f"model.vision_tower.{name.partition(_TOWER)[2]}"] = tensor
            elif match := _LANGUAGE.match(name):
                language[f"model.language_model.{name[match.start(1) :]}"] = tensor
            else:
                rest[name] = tensor
        return language, tower, rest

    # the vision tower -------------------------------------------------------------------------------------------------

    @cached_property
    def _tower_source(self) -> str:
        """What `mm_vision_tower` names, a folder beside or in the checkpoint included."""
        named = str(self.raw["mm_vision_tower"])
        inside = Path(self.located) / named
        return str(inside) if inside.is_dir() else named

    @cached_property
    def tower_config(self) -> Any:
        """`CLIPVisionConfig` of the tower that `mm_vision_tower` names; else what the checkpoint's weights say."""
        try:
            said, _ = CLIPVisionConfig.get_config_dict(self._tower_source)
        except Exception as error:  # whatever the hub's client raises: it is not at hand
            if not self._parts[1]:
                raise self._no_tower() from error
        else:
            if (kind := said.get("model_type")) not in ("clip", "clip_vision_model"):
                raise InputError(
                    f"vision tower '{self.raw['mm_vision_tower']}' of '{self.source}' is '{kind}', no CLIP"
                )
            return CLIPVisionConfig.from_pretrained(self._tower_source)
        return tower_config({name: tensor.shape for name, tensor in self._parts[1].items()}, self.source)

    def _no_tower(self) -> InputError:
        return InputError(
            f"LLaVA checkpoint without vision tower weights: '{self.source}' names '{self.raw['mm_vision_tower']}', "
            "which is neither a folder with them nor a checkpoint that the hub gave: download it and write its folder "
            "as mm_vision_tower into config.json"
        )

    def _tower_state(self) -> dict[str, Tensor]:
        if stored := self._parts[1]:
            return {name: tensor.read() for name, tensor in stored.items()}
        try:
            tower = CLIPVisionModel.from_pretrained(self._tower_source)
        except Exception as error:
            raise self._no_tower() from error
        return {f"model.vision_tower.{n.removeprefix(_TOWER)}": t for n, t in tower.state_dict().items()}

    # as transformers has it -------------------------------------------------------------------------------------------

    @cached_property
    def tokenizer(self) -> Any:
        """The checkpoint's own, with a token for images."""
        pieces = self._file("tokenizer.model") if self._file("tokenizer.json") is None else None
        if pieces is not None:
            tokenizer: Any = llama_tokenizer(pieces)
        else:
            text = LlamaConfig(**self._text_fields())
            tokenizer = AutoTokenizer.from_pretrained(self.located, revision=self.revision, config=text)
        if tokenizer.convert_tokens_to_ids(IMAGE) in (None, tokenizer.unk_token_id):
            tokenizer.add_tokens([IMAGE], special_tokens=True)
        if tokenizer.pad_token is None:  # LLaVA pads with the unknown token
            tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
        return tokenizer

    def _text_fields(self) -> dict[str, Any]:
        return {name: self.raw[name] for name in _TEXT_FIELDS if self.raw.get(name) is not None}

    @cached_property
    def _rows(self) -> int:
        """Rows of the embeddings, those of added tokens included."""
        return max(self.raw["vocab_size"], len(self.tokenizer))

    @cached_property
    def _fusion(self) -> FusionConfig | None:
        """Sizes of a trained token fusion; None for LLaVA-1.5's projector."""
        width, out = self.tower_config.hidden_size, self.raw["hidden_size"]
        shapes = {name: tensor.shape for name, tensor in self._parts[2].items() if not self.learned(name)}
        plain = {f"model.mm_projector.{number}.weight": size for number, size in ((0, (out, width)), (2, (out, out)))}
        if all(shapes.get(name) == size for name, size in plain.items()):
            return None
        check_fusion(shapes, width, out, self.source)
        first, last = (shapes[f"{STF_NAMES[layer]}.weight"] for layer in ("multi_block.0", "spatial.2"))
        layers = fusion_layers(self.raw, first[1] // width, self.source)
        return FusionConfig(layers, first[0], last[1])

    @cached_property
    def config(self) -> LlavaConfig:
        """As transformers has it."""
        tower = self.tower_config
        side = tower.image_size // tower.patch_size
        layer = self.raw.get("mm_vision_select_layer", -2)
        fields: dict[str, Any] = {"vision_feature_layer": layer, "image_seq_length": side * side}
        if self._fusion is not None:
            fusion = self._fusion
            fields |= {
                "vision_feature_layer": list(fusion.layers),
                "token_fusion": fusion.as_dict(),
                "image_seq_length": (side // fusion.window) ** 2,
            }
        config = LlavaConfig(
            vision_config=tower,
            text_config=LlamaConfig(**{**self._text_fields(), "vocab_size": self._rows}),
            image_token_index=self.tokenizer.convert_tokens_to_ids(IMAGE),
            projector_hidden_act="gelu",
            vision_feature_select_strategy=(
                "full" if self.raw.get("mm_vision_select_feature") == "cls_patch" else "default"
            ),
            tie_word_embeddings=bool(self.raw.get("tie_word_embeddings", False)),
            **fields,
        )
        return config

    def processor(self) -> LlavaProcessor:
        """The tokenizer, and the image processor of the checkpoint or of its tower; else CLIP's for this size."""
        images = None
        for place in (self.located, self._tower_source):
            try:
                images = CLIPImageProcessor.from_pretrained(place)
                break
            except Exception:  # not there: the next
                continue
        if images is None:
            size = self.tower_config.image_size
            images = CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
        window = self._fusion.window if self._fusion is not None else 1
        return LlavaProcessor(
            images,
            self.tokenizer,
            patch_size=self.tower_config.patch_size * window,
            vision_feature_select_strategy="default",
            image_token=IMAGE,
            num_additional_image_tokens=1,
        )

    def generation_config(self) -> GenerationConfig:
        """The checkpoint's; else greedy answers with its end token."""
        if self._file("generation_config.json") is not None:
            return GenerationConfig.from_pretrained(self.located, revision=self.revision or "main")
        ends = {name: self.raw.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        return GenerationConfig(**{name: value for name, value in ends.items() if value is not None})

    def state(self) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """All tensors by the names of transformers' model, and those of learned methods by their own.

        Raises:
            InputError: a tensor that has no place.
        """
        language, _, rest = self._parts
        state = {name: tensor.read() for name, tensor in language.items()} | self._tower_state()
        for name in ("model.language_model.embed_tokens.weight", "lm_head.weight"):
            if name in state:
                state[name] = self._grown(state[name])
        if self._fusion is not None:
            renamed = {f"{old}.{part}": f"{new}.{part}" for new, old in STF_NAMES.items() for part in _PARTS}
        else:
            renamed = {
                f"model.mm_projector.{n}.{part}": f"linear_{1 + n // 2}.{part}" for n in (0, 2) for part in _PARTS
            }
        extra = {}
        for name, tensor in rest.items():
            if name in renamed:
                state[f"model.multi_modal_projector.{renamed[name]}"] = tensor.read()
            elif self.learned(name):
                extra[name] = tensor.read()
            else:
                raise InputError(
                    f"'{self.source}' has a tensor that no place is known for: '{name}' {_shape(tensor.shape)} (names "
                    "that are: docs/llava.md)"
                )
        return state, extra

    def _grown(self, rows: Tensor) -> Tensor:
        """(V', D): with a row for each added token.

        A new row is that of the unknown token again. As an output it then ties with that token, and of equals the first
        is chosen: the model never says the new one. As an input it is replaced by an image's features.
        """
        added = self._rows - len(rows)
        unknown = self.tokenizer.unk_token_id
        return torch.cat([rows, rows[unknown or 0].expand(added, -1)]) if added > 0 else rows


_PARTS = ("weight", "bias")


def _from_safetensors(file: Path, name: str) -> Tensor:
    with safe_open(file, framework="pt") as tensors:
        return tensors.get_tensor(name)


def llama_tokenizer(file: Path) -> PreTrainedTokenizerFast:
    """Llama's tokenizer from a SentencePiece model, read by SentencePiece itself.

    transformers reads such a file by way of protobuf, whose versions often disagree. As in the original code a space is
    put before each piece of text between images.
    """
    from sentencepiece import SentencePieceProcessor

    model = SentencePieceProcessor(model_file=str(file))
    vocabulary = {model.id_to_piece(number): number for number in range(model.get_piece_size())}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in vocabulary  # pieces stand in the order in which they were merged
        for cut in range(1, len(piece))
        if piece[:cut] in vocabulary and piece[cut:] in vocabulary
    ]
    unknown, begin, end = (model.id_to_piece(number) for number in (model.unk_id(), model.bos_id(), model.eos_id()))
    inner = Tokenizer(BPE(vocabulary, merges, unk_token=unknown, fuse_unk=True, byte_fallback=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    inner.post_processor = processors.TemplateProcessing(
        single=f"{begin} $A", special_tokens=[(begin, vocabulary[begin])]
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token=unknown, bos_token=begin, eos_token=end)


def _shape(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape)) or "()"


def tower_config(shapes: Mapping[str, tuple[int, ...]], source: str) -> CLIPVisionConfig:
    """Configuration of a CLIP tower from the shapes of its tensors, with heads and activation of OpenAI's CLIP.

    Args:
        shapes: by names below `model.vision_tower.`.
        source: for messages.

    Raises:
        InputError: no CLIP tower that OpenAI released.
    """
    try:
        patches = shapes["model.vision_tower.embeddings.patch_embedding.weight"]
        positions = shapes["model.vision_tower.embeddings.position_embedding.weight"]
        inner = shapes["model.vision_tower.encoder.layers.0.mlp.fc1.weight"]
    except KeyError as error:
        raise InputError(f"vision tower of '{source}' lacks {error}: it is no CLIP") from error
    width, side = patches[0], math.isqrt(positions[0] - 1)
    layers = {name.split(".")[4] for name in shapes if name.startswith("model.vision_tower.encoder.layers.")}
    if width % _CLIP_HEAD or side * side + 1 != positions[0]:
        raise InputError(
            f"vision tower of '{source}' has width {width} and {positions[0]} positions, which is no CLIP of OpenAI's: "
            "write a folder with its config.json as mm_vision_tower into the checkpoint's"
        )
    return CLIPVisionConfig(
        hidden_size=width,
        intermediate_size=inner[0],
        num_hidden_layers=len(layers),
        num_attention_heads=width // _CLIP_HEAD,
        image_size=side * patches[-1],
        patch_size=patches[-1],
        projection_dim=768 if width == 1024 else 512,
    )


def fusion_layers(raw: Mapping[str, Any], count: int, source: str) -> tuple[int, ...]:
    """The hidden states that a fusion of `count` reads: a list in config.json, else the published eight.

    Raises:
        InputError: another number, and no list.
    """
    listed = raw.get("mm_vision_select_layer")
    if isinstance(listed, list) and len(listed) == count:
        return tuple(listed)
    if count == len(LAYERS) and not isinstance(listed, list):
        return LAYERS
    raise InputError(
        f"STF weights of '{source}' are of another layer list: they read {count} hidden states, the published ones "
        f"{len(LAYERS)}: write the list as mm_vision_select_layer into config.json"
    )


STF_NAMES = {
    "multi_block.0": "model.mm_projector_crosslayer.0",
    "multi_block.2": "model.mm_projector_crosslayer.2",
    "spatial.0": "model.mm_projector.0",
    "spatial.2": "model.mm_projector.2",
}
"""The layers of `TokenFusion` by their names in LLaVA-STF's releases, whole checkpoints and `mm_projector.bin`."""


def check_fusion(shapes: Mapping[str, tuple[int, ...]], width: int, out: int, source: str) -> None:
    """Check LLaVA-STF's four layers: L w -> h1 -> w over hidden states, 4 w -> h2 -> d over a window.

    Args:
        shapes: of the tensors outside of the language model and the tower.
        width, out: w and d.

    Raises:
        InputError: no four layers that fit, or a layer without its bias.
    """
    layers = [shapes.get(f"{name}.weight", ()) for name in STF_NAMES.values()]
    windows = WINDOW * WINDOW * width
    fits = all(len(layer) == 2 for layer in layers)
    if fits:
        (h1, joined), (narrow, h1_in), (h2, four), (wide, h2_in) = layers
        fits = (joined % width, h1_in, narrow) == (0, h1, width) and (four, h2_in, wide) == (windows, h2, out)
    if not fits:
        seen = (
            ", ".join(f"{n} {_shape(shape)}" for n, shape in sorted(shapes.items()) if n.endswith(".weight")) or "none"
        )
        raise InputError(
            f"projector of '{source}' is neither LLaVA-1.5's nor STF's for a tower of width {width} and an LLM of "
            f"{out}: STF weights of another width or layer list? L*{width} -> h1 -> {width} in "
            f"model.mm_projector_crosslayer and {windows} -> h2 -> {out} in model.mm_projector are needed, "
            f"found: {seen}"
        )
    for name, layer in zip(STF_NAMES.values(), layers, strict=True):
        if shapes.get(f"{name}.bias") != layer[:1]:
            raise InputError(f"STF weights of '{source}' lack '{name}.bias' of {layer[0]}")
