"""Backbones of real shapes with random weights: speed and memory need no trained ones.

The shape is built on the meta device, put on the target device empty, and filled there from a seed. The tokenizer is
the embedded checkpoint's; image sizes and prompt layout are the family's. Beside the backbone stand random weights of
the learned methods' scorer and predictor, in their published sizes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoProcessor, GenerationConfig, PreTrainedModel

from visionselector_eval.baselines.contract.errors import InputError, unknown
from visionselector_eval.models.backbones import FAMILIES
from visionselector_eval.models.dynamic_qwen.predictor import MARK, Predictor
from visionselector_eval.models.tiny import checkpoint

if TYPE_CHECKING:
    from torch import Tensor

    from visionselector_eval.models.backbones.base import Backbone

_VISION = {
    "depth": 32,
    "hidden_size": 1280,
    "intermediate_size": 3420,
    "num_heads": 16,
    "fullatt_block_indexes": [7, 15, 23, 31],
}


_CLIP = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}
_VICUNA_7B = {
    "hidden_size": 4096,
    "intermediate_size": 11008,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "vocab_size": 32064,
    "max_position_embeddings": 4096,
}
_TINY_LLM = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
    "max_position_embeddings": 4096,
}
_LLAVA_TINY: tuple[dict[str, Any], dict[str, Any]] = (
    _TINY_LLM,
    {
        "hidden_size": 24,
        "intermediate_size": 48,
        "num_hidden_layers": 24,  # as many as the published token fusion reads from
        "num_attention_heads": 4,
        "image_size": 112,
        "patch_size": 14,
    },
)


@dataclass(frozen=True)
class Shape:
    """A model's sizes: those of the LLM and of the vision encoder, and what else the family's adapter takes."""

    family: str
    about: str
    text: dict[str, Any]
    vision: dict[str, Any]
    tied: bool
    more: dict[str, Any] = field(default_factory=dict)


SHAPES: dict[str, Shape] = {
    "qwen2_5_vl_7b": Shape(
        "qwen2_5_vl",
        "Qwen2.5-VL-7B-Instruct",
        {
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
            "max_position_embeddings": 128000,
            "mrope_section": [16, 24, 24],
        },
        _VISION,
        tied=False,
    ),
    "qwen2_5_vl_3b": Shape(
        "qwen2_5_vl",
        "Qwen2.5-VL-3B-Instruct",
        {
            "hidden_size": 2048,
            "intermediate_size": 11008,
            "num_hidden_layers": 36,
            "num_attention_heads": 16,
            "num_key_value_heads": 2,
            "vocab_size": 151936,
            "max_position_embeddings": 128000,
            "mrope_section": [16, 24, 24],
        },
        _VISION,
        tied=True,
    ),
    "qwen2_5_vl_0_5b": Shape(
        "qwen2_5_vl",
        "Qwen2.5-0.5B's LLM with a vision encoder of 44 M parameters; no released checkpoint has it",
        {
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "vocab_size": 151936,
            "max_position_embeddings": 32768,
            "mrope_section": [8, 12, 12],
        },
        {
            "depth": 12,
            "hidden_size": 512,
            "intermediate_size": 1368,
            "num_heads": 8,
            "fullatt_block_indexes": [2, 5, 8, 11],
        },
        tied=True,
    ),
    "qwen2_5_vl_tiny": Shape(
        "qwen2_5_vl",
        "half a million parameters, to try a command",
        {**_TINY_LLM, "max_position_embeddings": 32768, "mrope_section": [2, 3, 3]},
        {
            "depth": 4,
            "hidden_size": 64,
            "intermediate_size": 96,
            "num_heads": 4,
            "fullatt_block_indexes": [1, 3],
        },
        tied=True,
    ),
    "qwen2_vl_7b": Shape(
        "qwen2_vl",
        "Qwen2-VL-7B-Instruct",
        {
            "hidden_size": 3584,
            "intermediate_size": 18944,
            "num_hidden_layers": 28,
            "num_attention_heads": 28,
            "num_key_value_heads": 4,
            "vocab_size": 152064,
            "max_position_embeddings": 32768,
            "mrope_section": [16, 24, 24],
        },
        {"depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4},
        tied=False,
    ),
    "qwen2_vl_tiny": Shape(
        "qwen2_vl",
        "a quarter of a million parameters, to try a command",
        {**_TINY_LLM, "mrope_section": [2, 3, 3]},
        {"depth": 4, "embed_dim": 32, "num_heads": 2, "mlp_ratio": 2},
        tied=True,
    ),
    "qwen3_vl_8b": Shape(
        "qwen3_vl",
        "Qwen3-VL-8B-Instruct",
        {
            "hidden_size": 4096,
            "intermediate_size": 12288,
            "num_hidden_layers": 36,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151936,
            "max_position_embeddings": 262144,
            "mrope_section": [24, 20, 20],
        },
        {
            "depth": 27,
            "hidden_size": 1152,
            "intermediate_size": 4304,
            "num_heads": 16,
            "num_position_embeddings": 2304,
            "deepstack_visual_indexes": [8, 16, 24],
        },
        tied=False,
    ),
    "qwen3_vl_tiny": Shape(
        "qwen3_vl",
        "a quarter of a million parameters, to try a command",
        {**_TINY_LLM, "head_dim": 16, "mrope_section": [4, 2, 2]},
        {
            "depth": 4,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_heads": 2,
            "num_position_embeddings": 64,
            "deepstack_visual_indexes": [0, 1, 2],
        },
        tied=True,
    ),
    "llava_1_5_7b": Shape("llava", "LLaVA-1.5-7B", _VICUNA_7B, _CLIP, tied=False),
    "llava_1_5_13b": Shape(
        "llava",
        "LLaVA-1.5-13B",
        {
            **_VICUNA_7B,
            "hidden_size": 5120,
            "intermediate_size": 13824,
            "num_hidden_layers": 40,
            "num_attention_heads": 40,
            "num_key_value_heads": 40,
        },
        _CLIP,
        tied=False,
    ),
    "llava_stf_7b": Shape(
        "llava",
        "LLaVA-STF-7B: trained token fusion, 144 tokens an image",
        _VICUNA_7B,
        _CLIP,
        tied=False,
        more={"fused": True},
    ),
    "llava_tiny": Shape("llava", "a quarter of a million parameters, to try a command", *_LLAVA_TINY, tied=False),
    "llava_stf_tiny": Shape(
        "llava", "the same with token fusion, 16 tokens an image", *_LLAVA_TINY, tied=False, more={"fused": True}
    ),
}
# Shapes that people ask for whose family has no adapter yet.
_WAITING = {"llava_onevision_7b": "llava_onevision"}


def shape_named(name: str) -> Shape:
    """The shape registered under `name`.

    Raises:
        InputError: unknown (names the near match), or of a family that has no adapter yet.
    """
    if name in _WAITING and name not in SHAPES:
        raise InputError(
            f"shape '{name}' can't be built yet: its family '{_WAITING[name]}' has no adapter here; "
            f"available: {', '.join(sorted(SHAPES))}"
        )
    if name not in SHAPES:
        raise unknown("shape of --random-weights", name, SHAPES)
    return SHAPES[name]


def processor(shape: Shape) -> Any:
    """A processor for a shape: the embedded checkpoint's tokenizer, the family's images and prompt."""
    own = AutoProcessor.from_pretrained(str(checkpoint()))
    return FAMILIES[shape.family].load_adapter().processor_of(shape.vision, own, **shape.more)


def shape_config(shape: Shape, processor: Any) -> Any:
    """The transformers config of a shape, with the token ids of `processor`."""
    adapter = FAMILIES[shape.family].load_adapter()
    return adapter.config_of(shape.text, shape.vision, processor.tokenizer, tied=shape.tied, **shape.more)


def fill(model: torch.nn.Module, seed: int) -> None:
    """Seeded weights in place, on whatever device they are: normal, 1 / sqrt(fan in); norms 1, biases 0.

    The numbers differ between kinds of devices; their size, which keeps activations finite in half precision, does not.
    """
    device = next(model.parameters()).device
    generator = torch.Generator(device=device).manual_seed(seed)
    with torch.no_grad():
        for name, parameter in sorted(model.named_parameters()):
            if parameter.ndim == 1:
                scale = name.endswith("weight") and ("norm" in name or "ln_q" in name)
                parameter.fill_(1.0 if scale else 0.0)
            elif "embed_tokens" in name:
                parameter.normal_(0.0, 0.25, generator=generator)
            else:
                parameter.normal_(0.0, 1 / math.sqrt(math.prod(parameter.shape[1:])), generator=generator)


def build_random(
    name: str, device: str = "cpu", dtype: torch.dtype = torch.float32, attention: str = "sdpa", seed: int = 0
) -> Backbone:
    """A backbone of the named shape with random weights on `device`.

    Raises:
        InputError: unknown shape, or one whose family has no adapter yet.
        torch.OutOfMemoryError: it does not fit.
    """
    shape = shape_named(name)
    adapter = FAMILIES[shape.family].load_adapter()
    front = processor(shape)
    config = shape_config(shape, front)
    config._attn_implementation = attention
    with torch.device("meta"):
        model = adapter.model_class_for(config)(config)
    model = model.to(dtype=dtype).to_empty(device=device)
    model.tie_weights()
    for owner in (m for m in model.modules() if isinstance(m, PreTrainedModel)):
        for part in owner.modules():
            # Tables that are computed, not loaded, came empty from the meta device; the model's own code fills them.
            if not part._non_persistent_buffers_set:
                continue
            for computed in part._non_persistent_buffers_set:
                table = getattr(part, computed)
                if table is not None and table.is_floating_point():
                    setattr(part, computed, table.float())
            owner._init_weights(part)
    fill(model, seed)
    tokens = front.tokenizer
    model.generation_config = GenerationConfig(
        do_sample=False, eos_token_id=tokens.eos_token_id, pad_token_id=tokens.pad_token_id
    )
    model.requires_grad_(False)
    return adapter(model, front, id=f"random:{name}", revision=f"seed-{seed}", extra_weights=_learned(config, seed + 1))


def _learned(config: Any, seed: int) -> dict[str, Tensor]:
    """Weights of VisionSelector's scorer and Dynamic-Qwen's predictor in their published sizes, on the CPU."""
    width = config.text_config.hidden_size
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator) / math.sqrt(shape[-1])

    learned = {
        f"visual.importance_scorer.{part}.{kind}": normal(*size)
        for part in ("q_proj", "k_proj")
        for kind, size in (("weight", (width // 2, width)), ("bias", (width // 2,)))
    }
    with torch.device("meta"):
        predictor = Predictor(width)
    for key, tensor in predictor.state_dict().items():
        value = normal(*tensor.shape) if tensor.ndim > 1 else torch.full(tensor.shape, float("norm.weight" in key))
        learned[f"model.{MARK}{key}"] = value
    return learned
