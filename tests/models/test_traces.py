"""What towers and layers tell of their attention equals the maps that eager attention writes out, at every layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from battery import PROMPTS, same_tensor
from families import FAMILIES
from transformers import Qwen3Config, Qwen3Model
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl
from transformers.models.qwen3.modeling_qwen3 import apply_rotary_pos_emb

from visionselector_eval.baselines import InputError, Selection, build, top_k
from visionselector_eval.baselines.contract.base import Compressor, EncoderTrace, traced
from visionselector_eval.models.decoder_view import LayerAccess, PromptView
from visionselector_eval.models.inputs import MediaSettings, build_inputs


def inputs_for(backbone: Any, prompts: Any) -> dict[str, Any]:
    return backbone.to_device(build_inputs(backbone.processor, prompts, MediaSettings()))


def item_maps(backbone: Any, inputs: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """(H, P, P) maps of each block of a Qwen2.5-VL tower on one image, in window order."""
    maps: dict[int, list[torch.Tensor]] = {}
    eager = modeling_qwen2_5_vl.eager_attention_forward

    def recording(module: Any, *args: Any, **kwargs: Any) -> Any:
        output, weights = eager(module, *args, **kwargs)
        maps.setdefault(id(module), []).append(weights[0])
        return output, weights

    with monkeypatch.context() as patch:
        patch.setattr(modeling_qwen2_5_vl, "eager_attention_forward", recording)
        backbone.encode(inputs, frozenset())
    return [maps[id(block.attn)] for block in backbone.encoder_blocks]


def test_every_block_of_a_windowed_tower_can_be_asked(tiny_eager: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks with windows and with full attention; an image whose edge windows are narrower."""
    depth = tiny_eager.encoder_depth
    inputs = inputs_for(tiny_eager, PROMPTS["one image"]())
    needs = frozenset({"received", *(f"received@{b}" for b in range(depth)), "received@-1"})
    (item,) = tiny_eager.encode(inputs, needs).rows[0]
    t, h, w = inputs["image_grid_thw"][0].tolist()
    vision = tiny_eager.model.config.vision_config
    index, _ = modeling_qwen2_5_vl.get_vision_window_index(
        inputs["image_grid_thw"], vision.spatial_merge_size, vision.window_size, vision.patch_size
    )
    for block, chunks in enumerate(item_maps(tiny_eager, inputs, monkeypatch)):
        per_patch = torch.cat([chunk.mean(0).sum(0) for chunk in chunks])
        assert len(per_patch) == t * h * w
        expected = per_patch.view(-1, vision.spatial_merge_size**2).mean(1)[torch.argsort(index)]
        assert same_tensor(item.trace.at_layers[f"received@{block}"], expected, 1e-5), block
    assert torch.equal(item.trace.at_layers["received@-1"], item.trace.at_layers[f"received@{depth - 1}"])
    assert torch.equal(item.trace.received, item.trace.at_layers[f"received@{tiny_eager.ranking_block}"])


def test_every_block_of_a_clip_tower_can_be_asked(llava_folder: Any) -> None:
    from visionselector_eval.models import load_backbone

    eager = load_backbone(llava_folder, attn_implementation="eager")
    inputs = inputs_for(eager, PROMPTS["one image"]())
    names = [f"{name}@{b}" for name in ("received", "cls", "keys") for b in range(eager.encoder_depth)]
    (item,) = eager.encode(inputs, frozenset({"cls", *names})).rows[0]
    with torch.no_grad():
        tower = eager.model.model.vision_tower(inputs["pixel_values"], output_attentions=True)
    for block, weights in enumerate(tower.attentions):
        mean = weights[0].mean(0)
        assert same_tensor(item.trace.at_layers[f"received@{block}"], mean.sum(0)[1:], 1e-5)
        assert same_tensor(item.trace.at_layers[f"cls@{block}"], mean[0, 1:], 1e-6)
        assert item.trace.at_layers[f"keys@{block}"].shape[0] == len(item.features)
    assert torch.equal(item.trace.cls, item.trace.at_layers[f"cls@{eager.ranking_block}"])


@dataclass(frozen=True, kw_only=True)
class TwoBlocks(Compressor):
    """Ranks by two blocks of the encoder."""

    name = "two_blocks"
    needs = frozenset({"received@0", "received@-1"})

    def compress(self, tokens: Any, count: int) -> Selection:
        early, late = traced(tokens, self.name, "received@0", "received@-1")
        assert len(early) == len(tokens.features)
        return Selection(kept=top_k(early + late, count))


@pytest.mark.parametrize("family", FAMILIES)
def test_a_method_may_rank_by_several_blocks(family: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Alone, for a whole prompt, and behind another method."""
    backbone = FAMILIES[family].load(tmp_path_factory).backbone
    inputs = inputs_for(backbone, PROMPTS["two images"]())
    assert backbone.host.encoder_depth == backbone.encoder_depth > 1
    for upstream_exact in (False, True):
        method = TwoBlocks(upstream_exact=upstream_exact)
        assert len(backbone.prefill(inputs, method, 0.5).kept[0]) > 1
    from visionselector_eval.baselines.contract.chain import chain

    assert len(backbone.prefill(inputs, chain(build("divprune"), TwoBlocks(), 0.5), 0.5).kept[0]) > 1


@pytest.mark.parametrize("need", ["received@99", "received@-99", "patches@1", "received@two"])
def test_a_block_that_there_is_not_is_one_line(llava: Any, need: str) -> None:
    with pytest.raises(InputError, match=rf"invalid need '{need}' of a method: expected one of cls, keys") as error:
        llava.encode(inputs_for(llava, PROMPTS["one image"]()), frozenset({need}))
    assert "\n" not in str(error.value)


def test_what_is_not_told_is_missing() -> None:
    assert EncoderTrace().get("received@3") is None
    assert EncoderTrace(at_layers={"received@3": torch.ones(2)}).map(lambda v: v[:1]).get("received@3").shape == (1,)


# inside the LLM -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("groups", [2, 4])
def test_ranking_inside_a_qwen3_llm_goes_through_its_norms_of_queries_and_keys(groups: int) -> None:
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=32,
        hidden_size=48,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=groups,
        head_dim=16,
        attn_implementation="eager",
    )
    model = Qwen3Model(config).eval()
    for layer in model.layers:  # norms that do something
        for norm in (layer.self_attn.q_norm, layer.self_attn.k_norm):
            torch.nn.init.uniform_(norm.weight, 0.2, 3.0)
    states = torch.randn(1, 9, 48)
    with torch.no_grad():
        out = model(inputs_embeds=states, output_attentions=True, output_hidden_states=True)
        tables = model.rotary_emb(states, torch.arange(9)[None])
        for layer in range(3):
            view = view_of(LayerAccess(model, apply_rotary_pos_emb), layer, out.hidden_states[layer][0], tables)
            maps = out.attentions[layer][0].mean(0)
            assert same_tensor(view.received(layer), maps.mean(0), 1e-6)
            assert same_tensor(view.received(layer, torch.tensor([8, 3])), maps[[8, 3]].mean(0), 1e-6)
            assert view.keys(layer).shape == (9, groups * 16)


def view_of(access: LayerAccess, layer: int, states: torch.Tensor, tables: Any) -> PromptView:
    nothing = torch.zeros(0, dtype=torch.int64)
    return PromptView(
        layer=layer,
        depth=3,
        hidden=states,
        visual=torch.arange(4),
        original=torch.arange(4),
        item=torch.zeros(4, dtype=torch.int64),
        text=torch.arange(4, 9),
        total=9,
        embeds=states,
        first_visual=torch.arange(4),
        first_text=nothing,
        memory={},
        access=access,
        tables=(tables[0][0], tables[1][0]),
        previous=None,
    )


@pytest.mark.parametrize("family", FAMILIES)
def test_ranking_inside_the_llm_equals_the_eager_map(family: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    """For every family: what fastv ranks by is the column mean of the attention map of the layer before its own."""
    subject = FAMILIES[family].load(tmp_path_factory)
    backbone = subject.eager
    inputs = inputs_for(backbone, PROMPTS["one image"]())
    full = backbone.compress(inputs, build("full"))
    with torch.no_grad():
        maps = backbone.model.model.language_model(
            inputs_embeds=full.embeds,
            attention_mask=full.attention_mask,
            position_ids=backbone.llm_positions(full),
            output_attentions=True,
            **subject.stock_planes(full, 0, full.embeds.shape[1]),
        ).attentions
    for rows, expected in (("last", maps[1][0].mean(0)[-1]), ("all", maps[1][0].mean(0).mean(0))):
        out = backbone.prefill(inputs, build("fastv", layer=2, rows=rows), 0.4)
        visual = full.visual[0].nonzero().squeeze(1)
        assert same_tensor(out.scores[0], expected[visual], 1e-5)
