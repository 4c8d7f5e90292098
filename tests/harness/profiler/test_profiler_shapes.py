"""Random weights in real shapes, synthetic images, and FLOPs that are counted and computed alike."""

from __future__ import annotations

import re

import pytest
import torch

from visionselector_eval.baselines import available, build
from visionselector_eval.baselines.contract.budget import Share
from visionselector_eval.baselines.contract.errors import InputError
from visionselector_eval.harness.profiler.flops import (
    matmul_ceiling,
    theoretical_decode,
    theoretical_output,
    theoretical_prefill,
)
from visionselector_eval.harness.profiler.measure import BoundCell, Profiler, Prompt
from visionselector_eval.harness.profiler.metrics import Flops, Memory, Time
from visionselector_eval.harness.profiler.random_weights import SHAPES, build_random, processor, shape_config
from visionselector_eval.harness.profiler.spec import cell_of
from visionselector_eval.harness.profiler.workloads import check_length, grid_of, synthetic
from visionselector_eval.models.backbones.llava import Llava, clip_flops, projector_flops
from visionselector_eval.models.backbones.qwen2_5_vl import Qwen2_5_VL, tower_flops


@pytest.fixture(scope="module")
def shaped():
    return build_random("qwen2_5_vl_tiny")


# The parameter counts on the released checkpoints' pages; the third is ours.
@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("qwen2_5_vl_7b", 8_292_166_656),
        ("qwen2_5_vl_3b", 3_754_622_976),
        ("qwen2_5_vl_0_5b", 538_541_376),
        ("llava_1_5_7b", 7_063_427_072),
        ("llava_1_5_13b", 13_351_494_656),
        # Four linear layers instead of the projector's two.
        ("llava_stf_7b", 7_063_427_072 - 20_979_712 + 8193 * 4096 + 4097 * 1024 + 4097 * 16384 + 16385 * 4096),
    ],
)
def test_shapes_have_the_parameters_of_their_models(name, parameters) -> None:
    shape = SHAPES[name]
    config = shape_config(shape, processor(shape))
    with torch.device("meta"):
        model = {"qwen2_5_vl": Qwen2_5_VL, "llava": Llava}[shape.family].model_class_for(config)(config)
    model.tie_weights()
    assert model.num_parameters() == parameters


def test_random_weights_follow_the_seed_and_stay_finite(shaped) -> None:
    again, other = build_random("qwen2_5_vl_tiny"), build_random("qwen2_5_vl_tiny", seed=1)
    mine = shaped.model.state_dict()
    assert all(torch.equal(mine[name], tensor) for name, tensor in again.model.state_dict().items())
    assert not all(torch.equal(mine[name], tensor) for name, tensor in other.model.state_dict().items())
    half = build_random("qwen2_5_vl_tiny", dtype=torch.bfloat16)
    inputs = synthetic(half.processor, 64).items[0].make()
    out = half.prefill(inputs, build("full"))
    assert half.model.dtype == torch.bfloat16
    assert torch.isfinite(out.logits).all()
    assert out.logits.std() > 0


def test_computed_tables_are_those_that_transformers_makes(shaped) -> None:
    """Off the meta device, its own constructor fills the rotary tables."""
    for made in (shaped, build_random("llava_tiny"), build_random("llava_stf_tiny", dtype=torch.bfloat16)):
        stock = type(made.model)(made.model.config)
        mine, loaded = dict(made.model.named_buffers()), dict(stock.named_buffers())
        assert mine.keys() == loaded.keys()
        assert any("inv_freq" in name for name in mine)
        assert all(torch.equal(mine[name], loaded[name]) for name in mine)


@pytest.mark.parametrize("shape", ["qwen2_5_vl_tiny", "llava_tiny", "llava_stf_tiny"])
def test_every_method_runs_on_random_weights(shape) -> None:
    made = build_random(shape)
    assert made.id == f"random:{shape}"
    inputs = synthetic(made.processor, 64).items[0].make()
    for name in available():
        if (shape, name) == ("llava_stf_tiny", "downsample"):
            continue  # four images of 16 tokens: whole grids of at most 4
        out = made.prefill(inputs, build(name), budget=0.25)
        assert out.totals == [64], name
        assert len(out.kept[0]) == (64 if name == "full" else 16), name


@pytest.mark.parametrize(("tokens", "grid"), [(4, (2, 2)), (256, (16, 16)), (16384, (128, 128)), (512, (16, 32))])
def test_a_synthetic_image_has_exactly_its_tokens(tokens, grid) -> None:
    assert grid_of(tokens) == grid


@pytest.mark.parametrize("tokens", [16, 40, 256])
def test_a_synthetic_prompt_has_exactly_its_tokens(shaped, tokens) -> None:
    workload = synthetic(shaped.processor, tokens)
    assert shaped.visual_totals(workload.items[0].make()) == [tokens]


@pytest.mark.parametrize(("tokens", "near"), [(251, "252"), (1, "4"), (0, "4")])
def test_a_image_that_cannot_be_is_refused_with_a_near_one(tokens, near) -> None:
    with pytest.raises(InputError, match=rf"--synthetic {tokens} .* try {near}"):
        grid_of(tokens)


def test_towers_of_one_image_size_get_several_images() -> None:
    front = processor(SHAPES["llava_1_5_7b"])
    inputs = synthetic(front, 1152).items[0].make()
    assert inputs["pixel_values"].shape == (2, 3, 336, 336)
    assert not torch.equal(*inputs["pixel_values"])
    assert synthetic(front, 1152).settings["pictures"] == 2
    assert len(synthetic(processor(SHAPES["llava_stf_7b"]), 144).items[0].make()["pixel_values"]) == 1
    for tokens, near in ((1000, 1152), (100, 576)):
        with pytest.raises(InputError, match=rf"--synthetic {tokens}: .* has 576 visual tokens, try {near}"):
            synthetic(front, tokens)


def test_prompts_longer_than_the_positions_are_refused(shaped) -> None:
    inputs = {"input_ids": torch.zeros(1, 32768, dtype=torch.int64)}
    with pytest.raises(InputError, match=re.escape("more than the model's 32768 positions")):
        check_length(shaped.model.config.get_text_config(), inputs, 1, "synthetic/32768")
    check_length(shaped.model.config.get_text_config(), inputs, 0, "synthetic/32768")


# FLOPs ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["full", "uniform", "fastv", "pyramiddrop"])
@pytest.mark.parametrize("tokens", [64, 96])
def test_counted_flops_are_those_of_the_shapes(shaped, method, tokens) -> None:
    """The LLM's exactly, layer by layer; a method's own ranking counts for the compressor."""
    inputs = synthetic(shaped.processor, tokens).items[0].make()
    bound = BoundCell(cell_of("method", method, method, {}, Share(0.25)), shaped.bind(build(method)))
    profiler = Profiler(shaped, 4)
    row, timed = (
        Flops().measure(profiler, bound, Prompt("d", inputs)),
        Time().measure(profiler, bound, Prompt("d", inputs)),
    )
    text = shaped.model.config.get_text_config()
    layers = theoretical_prefill(text, timed["layer_lengths"])
    assert row["layer_flops"] == layers
    assert row["prefill_flops"] == row["theory_prefill_flops"] == sum(layers) + theoretical_output(text)
    assert row["decode_flops"] == row["theory_decode_flops"] == theoretical_decode(text, timed["layer_lengths"], 4)
    assert (
        row["vision_flops"]
        == row["theory_vision_flops"]
        == tower_flops(shaped.model.config.vision_config, (1, *grid_of(tokens)))
    )
    assert (row["compressor_flops"] > 0) == (method in ("fastv", "pyramiddrop"))
    assert row["attention_kernels"] == ["aten._scaled_dot_product_flash_attention_for_cpu"]


@pytest.mark.parametrize(("shape", "tokens"), [("llava_tiny", 128), ("llava_stf_tiny", 32)])
@pytest.mark.parametrize("method", ["full", "uniform", "fastv"])
def test_counted_flops_of_a_clip_tower_are_those_of_the_shapes(shape, tokens, method) -> None:
    """Two images; the CLS token, the projector or the token fusion in its place are counted."""
    made = build_random(shape)
    inputs = synthetic(made.processor, tokens).items[0].make()
    bound = BoundCell(cell_of("method", method, method, {}, Share(0.25)), made.bind(build(method)))
    row = Flops().measure(Profiler(made, 4), bound, Prompt("d", inputs))
    config = made.model.config
    assert row["vision_flops"] == row["theory_vision_flops"]
    assert row["vision_flops"] == clip_flops(config.vision_config, 2) + projector_flops(config, 128)
    assert row["prefill_flops"] == row["theory_prefill_flops"]
    assert row["decode_flops"] == row["theory_decode_flops"]


@pytest.mark.parametrize("shape", ["qwen2_vl_tiny", "qwen3_vl_tiny"])
@pytest.mark.parametrize("tokens", [64, 96])
def test_counted_flops_of_a_tower_without_windows_are_those_of_its_shape(shape, tokens) -> None:
    made = build_random(shape)
    inputs = synthetic(made.processor, tokens).items[0].make()
    bound = BoundCell(cell_of("method", "uniform", "uniform", {}, Share(0.25)), made.bind(build("uniform")))
    row = Flops().measure(Profiler(made, 4), bound, Prompt("d", inputs))
    assert row["vision_flops"] == row["theory_vision_flops"] > 0
    assert row["prefill_flops"] == row["theory_prefill_flops"]


def test_the_cache_is_read_not_computed(shaped) -> None:
    inputs = synthetic(shaped.processor, 64).items[0].make()
    text = shaped.model.config.get_text_config()
    for method in ("full", "fastv"):
        bound = BoundCell(cell_of("method", method, method, {}, Share(0.25)), shaped.bind(build(method)))
        profiler = Profiler(shaped, 3)
        memory, timed = (
            Memory().measure(profiler, bound, Prompt("d", inputs)),
            Time().measure(profiler, bound, Prompt("d", inputs)),
        )
        assert memory["cache_lengths"] == timed["layer_lengths"]
        head = text.hidden_size // text.num_attention_heads
        assert memory["kv_bytes"] == 2 * 4 * head * text.num_key_value_heads * sum(timed["layer_lengths"])


def test_the_ceiling_is_a_rate() -> None:
    assert 1e8 < matmul_ceiling(torch.device("cpu"), torch.float32, seconds=0.01) < 1e15
