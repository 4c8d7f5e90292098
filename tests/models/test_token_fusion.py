"""Trained token fusion on LLaVA: the layout of windows, sizes, and every compressor on its tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from battery import COMPRESSORS, Row, draw_image, user
from llava_checkpoint import FUSED, save_llava
from torch.nn import functional as F
from transformers import AutoConfig, CLIPVisionConfig, LlamaConfig, LlavaConfig

from visionselector_eval.baselines import InputError, build
from visionselector_eval.baselines.contract.budget import Share
from visionselector_eval.models import load_backbone
from visionselector_eval.models.backbones.token_fusion import (
    LAYERS,
    FusedLlava,
    FusionConfig,
    TokenFusion,
    square_grid,
    to_windows,
)
from visionselector_eval.models.inputs import MediaSettings, build_inputs

GREEDY = {"max_new_tokens": 6, "do_sample": False}
SQUARE = MediaSettings(pad_square=True)
PROMPTS = {
    "one image": lambda: [user(draw_image(224, 280), "What is it?")],
    "two images": lambda: [user(draw_image(224, 280), "and", draw_image(140, 112, 1), "What is it?")],
    "text only": lambda: [user("What is the capital of France?")],
    "batch of three": lambda: [
        user(draw_image(224, 280), "What is it?"),
        user(draw_image(140, 112, 1), "and", draw_image(112, 112, 2), "What are they, and which is larger?"),
        user("Just text."),
    ],
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with token fusion: 8x8 patches of three hidden states become 16 tokens."""
    return save_llava(tmp_path_factory.mktemp("fused"), **FUSED)


@pytest.fixture(scope="module", params=["sdpa", "eager"])
def fused(request: pytest.FixtureRequest, folder: Path) -> Any:
    return load_backbone(folder, attn_implementation=request.param)


def inputs_for(backbone: Any, conversations: Any) -> dict[str, Any]:
    return build_inputs(backbone.processor, conversations, SQUARE)


# --- the layout -------------------------------------------------------------------------------------------------------


def test_windows_hold_their_patches_channel_by_channel():
    features = torch.arange(16.0)[None, :, None] + 100 * torch.arange(2.0)
    windows = to_windows(features, (4, 4))[0].tolist()
    assert windows[0] == [0, 1, 4, 5, 100, 101, 104, 105]
    assert windows[1] == [2, 3, 6, 7, 102, 103, 106, 107]
    assert windows[2][:4] == [8, 9, 12, 13]
    wide = to_windows(torch.arange(8.0)[None, :, None], (2, 4))[0].tolist()
    assert wide == [[0, 1, 4, 5], [2, 3, 6, 7]]


@pytest.mark.parametrize(("dtype", "grid"), [(torch.float64, (6, 6)), (torch.float32, (4, 6))])
def test_it_is_convolutions(dtype, grid):
    torch.manual_seed(0)
    width, out, layers = 8, 12, 3
    fusion = TokenFusion(FusionConfig.published(width, range(layers)), width, out).to(dtype)
    h, w = grid
    features = torch.randn(2, h * w, layers * width, dtype=dtype)
    with torch.no_grad():
        states = features.transpose(1, 2).reshape(2, layers * width, h, w)
        for number, name in ((0, "multi_block"), (2, "multi_block"), (0, "spatial"), (2, "spatial")):
            linear = getattr(fusion, name)[number]
            kernel = (2, 2) if (name, number) == ("spatial", 0) else (1, 1)
            weight = linear.weight.view(linear.out_features, -1, *kernel)
            states = F.conv2d(states, weight, linear.bias, stride=kernel)
            states = F.gelu(states) if number == 0 else states
        wanted = states.flatten(2).transpose(1, 2)
        assert fusion(features, grid).shape == (2, h * w // 4, out)
        torch.testing.assert_close(fusion(features, grid), wanted, atol=1e-6, rtol=0)


def test_sizes_of_the_published_model():
    fusion = FusionConfig.published(1024)
    assert (fusion.layers, fusion.fusion_hidden, fusion.spatial_hidden) == (LAYERS, 4096, 16384)
    with torch.device("meta"):
        made = TokenFusion(fusion, 1024, 4096)
    assert {name: tuple(p.shape) for name, p in made.named_parameters() if p.ndim == 2} == {
        "multi_block.0.weight": (4096, 8192),
        "multi_block.2.weight": (1024, 4096),
        "spatial.0.weight": (16384, 4096),
        "spatial.2.weight": (4096, 16384),
    }


@pytest.mark.parametrize(
    ("shape", "grid", "message"),
    [
        ((1, 15, 24), None, "15 patches, which are no square"),
        ((1, 25, 24), None, "image has 5x5: both sides must be multiples of 2"),
        ((1, 12, 24), (3, 4), "image has 3x4"),
        ((1, 12, 24), (4, 4), "12 patches for a grid of 4x4"),
    ],
)
def test_a_grid_that_windows_do_not_divide_is_one_clear_line(shape, grid, message):
    fusion = TokenFusion(FusionConfig.published(8, range(3)), 8, 12)
    with pytest.raises(InputError, match=message) as caught:
        fusion(torch.zeros(shape), grid)
    assert "\n" not in str(caught.value)
    assert square_grid(576) == (24, 24)


def config_with(**changes: Any) -> LlavaConfig:
    size = changes.pop("image_size", 112)
    tower = CLIPVisionConfig(hidden_size=8, num_attention_heads=2, num_hidden_layers=4, image_size=size, patch_size=14)
    return LlavaConfig(
        vision_config=tower,
        text_config=LlamaConfig(hidden_size=16, num_attention_heads=2, num_hidden_layers=1),
        **{**FUSED, **changes},
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"token_fusion": {}}, "hidden state 21 of the vision tower, which has 0 to 4"),
        ({"token_fusion": {"layer": [1]}}, "no field 'layer'"),
        ({"token_fusion": 3}, "must be a mapping"),
        ({"token_fusion": {"layers": [-2, 4, 2], "spatial_hidden": 0}}, "sizes of at least 1"),
        ({"vision_feature_layer": [4, -2, 2]}, r"reads layers \[-2, 4, 2\], but vision_feature_layer"),
        ({"vision_feature_layer": -2}, "vision_feature_layer of its configuration is -2"),
        ({"image_size": 126}, "this vision tower have 9x9"),
    ],
)
def test_a_configuration_that_cannot_be_is_one_clear_line(changes, message):
    with torch.device("meta"), pytest.raises(InputError, match=message) as caught:
        FusedLlava(config_with(**changes))
    assert "\n" not in str(caught.value)


# --- the backbone -----------------------------------------------------------------------------------------------------


def test_the_checkpoint_says_what_it_is(folder, fused, tmp_path):
    assert isinstance(fused.model, FusedLlava)
    assert fused.remark == "trained fusion, LLM retrained"
    assert load_backbone(save_llava(tmp_path / "plain")).remark == ""
    said = json.loads((folder / "config.json").read_text())["token_fusion"]
    assert said == FUSED["token_fusion"]
    assert AutoConfig.from_pretrained(folder).token_fusion == FUSED["token_fusion"]
    inputs = inputs_for(fused, PROMPTS["two images"]())
    assert fused.visual_totals(inputs) == [2 * 16]
    assert "patches" not in fused.traces


def test_features_are_the_fusion_of_the_towers_hidden_states(fused):
    inputs = inputs_for(fused, PROMPTS["two images"]())
    with torch.no_grad():
        states = fused.model.model.vision_tower(inputs["pixel_values"], output_hidden_states=True).hidden_states
        joined = torch.cat([states[layer][:, 1:] for layer in (-2, 4, 2)], -1)
        wanted = fused.model.model.multi_modal_projector(joined)
    items = fused.encode(inputs).rows[0]
    assert [item.grid for item in items] == [(1, 4, 4)] * 2
    for item, features in zip(items, wanted, strict=True):
        torch.testing.assert_close(item.features, features)


def test_traces_are_means_over_the_windows(fused):
    """Against attention and keys computed here, patch by patch."""
    inputs = inputs_for(fused, PROMPTS["one image"]())
    trace = fused.encode(inputs).rows[0][0].trace
    tower = fused.model.model.vision_tower
    block = tower.encoder.layers[-2]
    with torch.no_grad():
        states = tower(inputs["pixel_values"], output_hidden_states=True).hidden_states
        normed = block.layer_norm1(states[-3])[0]
        heads = block.self_attn.num_heads
        q, k = (
            p(normed).view(len(normed), heads, -1).transpose(0, 1)
            for p in (block.self_attn.q_proj, block.self_attn.k_proj)
        )
        weights = (q @ k.transpose(1, 2) * q.shape[-1] ** -0.5).softmax(-1).mean(0)
    for told, whole in (
        (trace.cls, weights[0, 1:]),
        (trace.received, weights.sum(0)[1:]),
        (trace.keys, k.mean(0)[1:]),
        (trace.keys_concat, k.transpose(0, 1).flatten(1)[1:]),
    ):
        for token in range(16):
            row, column = 2 * (token // 4), 2 * (token % 4)
            window = [8 * (row + i) + column + j for i in (0, 1) for j in (0, 1)]
            torch.testing.assert_close(told[token], whole[window].mean(0), atol=1e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def stock(fused: Any) -> dict[str, Any]:
    """Prompts, and greedy tokens of the stock class."""
    made = {name: inputs_for(fused, make()) for name, make in PROMPTS.items()}
    answers = {
        name: fused.model.generate(**inputs, **GREEDY)[:, inputs["input_ids"].shape[1] :]
        for name, inputs in made.items()
    }
    return {"inputs": made, "answers": answers, "hooks": hooks_of(fused)}


def hooks_of(backbone: Any) -> list[tuple[str, int]]:
    """Modules with hooks, and how many; transformers leaves its own on blocks whose hidden states it gave."""
    counts = [(name, len(m._forward_hooks) + len(m._forward_pre_hooks)) for name, m in backbone.model.named_modules()]
    return [(name, count) for name, count in counts if count]


@pytest.mark.versions
@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("row", COMPRESSORS, ids=str)
def test_every_compressor_acts_on_fused_tokens(row: Row, prompt, fused, stock):
    inputs = stock["inputs"][prompt]
    assert torch.equal(fused.generate(inputs, row.build(), 1.0, **GREEDY), stock["answers"][prompt])
    out = fused.prefill(inputs, row.build(), 0.2)
    totals = fused.visual_totals(inputs)
    assert out.totals == totals
    assert bool(torch.isfinite(out.logits).all())
    if row.exact_count and row.name != "full" and not row.options:
        # 0.2 of 16 tokens are 3, for each image.
        expected = [3 * (total // 16) for total in totals]
        assert [len(kept) for kept in out.kept] == expected
    answer = fused.generate(inputs, row.build(), 0.2, **GREEDY)
    assert answer.shape[0] == len(totals)
    assert hooks_of(fused) == stock["hooks"]


def test_images_of_another_size_go_by_their_own_grid(fused):
    inputs = inputs_for(fused, PROMPTS["one image"]())
    small = fused.resize(fused.to_device(inputs), build("downsample"), Share(0.4))
    assert fused.encode(small).rows[0][0].grid == (1, 3, 2)
    flat = inputs["pixel_values"][:, :, :56]  # 4 x 8 patches, no square number
    with torch.no_grad():
        (tokens,) = fused.features(flat)
        states = fused.model.model.vision_tower(flat, output_hidden_states=True, interpolate_pos_encoding=True)
        joined = torch.cat([states.hidden_states[layer][:, 1:] for layer in (-2, 4, 2)], -1)
        (wanted,) = fused.model.model.multi_modal_projector(joined, grid=(4, 8))
    assert tokens.shape == (8, 64)
    torch.testing.assert_close(tokens, wanted)
    assert not fused.model.model.multi_modal_projector._forward_pre_hooks
    with pytest.raises(InputError, match="image has 3x8: both sides must be multiples of 2"):
        fused.features(flat[:, :, :42])
    assert not fused.model.model.multi_modal_projector._forward_pre_hooks
