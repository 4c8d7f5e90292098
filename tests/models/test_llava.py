"""LLaVA-1.5: what its tower tells, its prompts and positions, and everything that can be wrong with a checkpoint."""

from __future__ import annotations

import ast
import json
import shutil
from importlib.util import find_spec
from pathlib import Path

import llava_checkpoint
import pytest
import torch
from battery import PROMPTS, clip, draw_image, user
from llava_checkpoint import save_llava
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, LlamaConfig

from visionselector_eval.baselines import EncoderTrace, InputError, Share, Tokens, VisualTokens, build
from visionselector_eval.models import load_backbone
from visionselector_eval.models.answering import Answerer, CompressorAtBudget, Request
from visionselector_eval.models.backbones.llava import VICUNA_TEMPLATE
from visionselector_eval.models.inputs import MediaSettings, build_inputs


def inputs_for(backbone, conversations, **settings):
    return build_inputs(backbone.processor, conversations, MediaSettings(**settings))


@pytest.fixture(scope="module")
def two(llava):
    return inputs_for(llava, PROMPTS["two images"]())


# What the tower tells ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def states(llava, two):
    """Hidden states of the tower for both images, by transformers."""
    with torch.no_grad():
        return llava.model.model.vision_tower(two["pixel_values"], output_hidden_states=True).hidden_states


def projections(block, states):
    """(M, n, H, d) queries and keys of a block's attention for its input states."""
    attention, normed = block.self_attn, block.layer_norm1(states)
    return [p(normed).unflatten(-1, (attention.num_heads, -1)) for p in (attention.q_proj, attention.k_proj)]


@torch.no_grad()
def test_the_trace_is_what_the_towers_own_maps_say(llava, llava_folder, two, states):
    eager = load_backbone(llava_folder, attn_implementation="eager")
    maps = eager.model.model.vision_tower(two["pixel_values"], output_attentions=True).attentions
    blocks = llava.model.model.vision_tower.encoder.layers
    encoded = llava.encode(two)
    for number, item in enumerate(encoded.rows[0]):
        trace = item.trace
        # The features are the output of the last block but one: its attention ranks, and its output is projected.
        torch.testing.assert_close(trace.cls, maps[-2][number, :, 0, 1:].mean(0), atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(trace.received, maps[-2][number, :, :, 1:].mean(0).sum(0), atol=1e-5, rtol=1e-4)
        _, keys = projections(blocks[-2], states[-3])
        torch.testing.assert_close(trace.keys, keys[number, 1:].mean(1))
        torch.testing.assert_close(trace.keys_concat, keys[number, 1:].flatten(1))
        q, k = (p[number].flatten(1) for p in projections(blocks[-1], states[-2]))  # heads not split
        torch.testing.assert_close(trace.cls_whole, (q[:1] @ k.T * q.shape[1] ** -0.5).softmax(-1)[0, 1:])
        torch.testing.assert_close(trace.keys_whole, k[1:])
        torch.testing.assert_close(trace.patches, states[-2][number, 1:])
        torch.testing.assert_close(item.project(trace.patches), item.features)


def test_only_what_is_asked_for_is_computed(llava, two):
    item = llava.encode(two, frozenset({"cls|received", "keys", "text"})).rows[0][0]
    told = {name for name, value in vars(item.trace).items() if value is not None}
    assert told == {"cls", "keys"}
    assert item.project is None
    assert llava.encode(two, frozenset({"text"})).rows[0][0].trace == EncoderTrace()


def test_on_qwen_the_same_methods_get_received_attention(tiny):
    inputs = inputs_for(tiny, PROMPTS["one image"]())
    trace = tiny.encode(inputs, build("visionzip").needs).rows[0][0].trace
    assert {name for name, value in vars(trace).items() if isinstance(value, torch.Tensor)} == {"received", "keys"}


# Methods in the form published for LLaVA -----------------------------------------------------------------------------

I = torch.arange(16, dtype=torch.float64)[:, None]  # noqa: E741 - the row i of the formulas
J = torch.arange(6, dtype=torch.float64)[None]
X = torch.sin(0.37 * (I + 1) * (J + 1)) + 0.1 * torch.cos(1.7 * (I + 1))
Y = torch.cos(0.53 * (I + 1) * (J + 1) + 0.2)
A = torch.softmax(2 * torch.sin(1.1 * I[:, 0]), dim=0)
UNUSED = torch.arange(16, dtype=torch.float64)  # a ranking that no CLS method may look at


def project(rows: torch.Tensor) -> torch.Tensor:
    """A projector that a mean does not commute with."""
    return torch.cat([rows**2, rows], dim=1)


def clip_tokens(**trace: torch.Tensor) -> VisualTokens:
    told = EncoderTrace(received=UNUSED, patches=X, **trace)
    return VisualTokens(features=project(X), grid=(1, 4, 4), trace=told, project=project)


def printed(values: torch.Tensor) -> list[float]:
    return [round(v, 6) for v in values.flatten().tolist()]


def test_visionzip_ranks_by_cls_attention_and_merges_before_the_projector():
    selection = build("visionzip", contextual=0.125).compress(clip_tokens(cls=A, keys=Y), 6)
    assert selection.kept.tolist() == [0, 1, 2, 7, 9, 13]  # dominant 1, 2, 7, 13; targets 0, 9
    assert printed(selection.features[0, 6:9]) == [0.157447, 0.450693, 0.817956]
    assert printed(selection.features[4, 6:9]) == [-0.446358, 0.631554, -1.228915]
    torch.testing.assert_close(selection.features[[0, 4], :6], selection.features[[0, 4], 6:] ** 2)
    torch.testing.assert_close(selection.features[[1, 2, 3, 5]], project(X)[[1, 2, 7, 13]])
    assert torch.equal(selection.scores, A)


def test_prumerge_plus_merges_by_the_last_block_before_the_projector():
    told = clip_tokens(cls=UNUSED, keys=UNUSED[:, None], keys_concat=UNUSED[:, None], cls_whole=A, keys_whole=Y)
    selection = build("prumerge_plus", upstream_exact=True, neighbours=4).compress(told, 6)
    assert selection.kept.tolist() == [0, 2, 4, 6, 7, 8]
    rank = {0: 0.221408, 2: 0.935199, 4: 0.908904, 6: 0.600802, 7: 0.343363, 8: -0.257836}
    assert printed(selection.features[:, 6]) == list(rank.values())
    torch.testing.assert_close(selection.features[:, :6], selection.features[:, 6:] ** 2)


def test_a_cls_row_is_not_normalised_again():
    """The CLS token attends to itself, too: what is left of its row sums to less than 1, and counts as it is."""
    full = build("prumerge_plus", neighbours=4).compress(clip_tokens(cls_whole=A, keys_whole=Y), 6)
    half = build("prumerge_plus", neighbours=4).compress(clip_tokens(cls_whole=A / 2, keys_whole=Y), 6)
    own = X[full.kept]
    torch.testing.assert_close(half.features[:, 6:] - own, (full.features[:, 6:] - own) / 2)


def test_holov_and_vispruner_rank_by_cls_attention():
    kept = build("holov", crops=4).compress(clip_tokens(cls=A), 6).kept
    assert sorted(kept.tolist()) == [1, 2, 6, 7, 12, 13]
    for count, wanted in ((8, [1, 2, 7, 9, 10, 13, 14, 15]), (6, [1, 4, 6, 7, 11, 13])):
        # Compared before the projector: behind it the squares would choose others.
        assert build("vispruner").compress(clip_tokens(cls=A), count).kept.tolist() == wanted


def test_a_chain_works_on_what_the_first_method_made(llava, two):
    """After a merge the encoder's patches are no longer the tokens: the second method compares what the LLM sees."""
    merged = llava.compress(two, build("tome+visionzip"), 0.2)
    assert [len(kept) for kept in merged.kept] == [24]
    chosen = llava.compress(two, build("divprune+vispruner"), 0.2)
    assert bool(torch.isfinite(chosen.embeds).all())


# Positions -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["visionzip", "divprune", "holov", "prumerge_plus", "cdpruner", "vispruner"])
def test_positions_are_counted_anew_where_that_was_published(name, llava, tiny, two):
    prompt = llava.prompt(llava.to_device(two), ["k"])
    own = llava.compress(two, build(name), 0.2).position_ids[0, 0]
    anew = llava.compress(two, build(name, upstream_exact=True), 0.2).position_ids[0, 0]
    assert own[-1] == prompt.position_ids[0, 0, -1]
    assert anew.tolist() == list(range(len(anew)))
    # Three axes have no such count: there tokens keep their places.
    inputs = inputs_for(tiny, PROMPTS["one image"]())
    full = tiny.prompt(tiny.to_device(inputs), ["k"]).position_ids
    exact = tiny.compress(inputs, build(name, upstream_exact=True), 0.2).position_ids
    assert torch.equal(exact[..., -1], full[..., -1])


def test_no_other_method_counts_anew(llava, two):
    last = llava.prompt(llava.to_device(two), ["k"]).position_ids[0, 0, -1]
    for name in ("visionselector", "tome", "random", "uniform", "idpruner"):
        assert llava.compress(two, build(name, upstream_exact=True), 0.2).position_ids[0, 0, -1] == last


# Prompts -------------------------------------------------------------------------------------------------------------


def upstream_template() -> str:
    """The template in lmms-eval's llava_hf; read, not imported, since that file needs a video reader."""
    folder = Path(find_spec("lmms_eval").submodule_search_locations[0])
    tree = ast.parse((folder / "models" / "simple" / "llava_hf.py").read_text())
    assigned = {t.id: n.value for n in tree.body if isinstance(n, ast.Assign) for t in n.targets if hasattr(t, "id")}
    return ast.literal_eval(assigned["VICUNA_CHAT_TEMPLATE"])


@pytest.mark.parametrize("number", [0, 1, 2])
def test_without_a_template_prompts_are_those_of_llava_hf(number, llava):
    tokenizer = llava.processor.tokenizer
    marks = " ".join(["<image>"] * number)
    context = f"{marks}\nWhat is it?" if number else "What is it?"
    wanted = tokenizer.apply_chat_template(
        [{"role": "user", "content": context}],
        chat_template=upstream_template(),
        tokenize=False,
        add_generation_prompt=True,
    )
    images = [draw_image(56, 56)] * number
    conversation = user(*images, "What is it?")
    ours = llava.processor.apply_chat_template(
        conversation, chat_template=VICUNA_TEMPLATE, tokenize=False, add_generation_prompt=True
    )
    assert ours == wanted
    # Text alone as a plain string, as datasets for training have it.
    if not number:
        plain = [{"role": "user", "content": "What is it?"}]
        assert wanted == llava.processor.apply_chat_template(
            plain, chat_template=VICUNA_TEMPLATE, tokenize=False, add_generation_prompt=True
        )


def test_a_checkpoint_without_a_template_gets_it(llava_folder, tmp_path):
    folder = shutil.copytree(llava_folder, tmp_path / "bare")
    (folder / "chat_template.jinja").unlink()
    backbone = load_backbone(folder)
    text = backbone.processor.tokenizer.decode(inputs_for(backbone, PROMPTS["text only"]())["input_ids"][0])
    assert text.startswith("A chat between a curious user")
    assert text.endswith("USER: What is the capital of France? ASSISTANT:")


def test_the_question_ends_where_the_answer_begins(llava):
    inputs = llava.to_device(inputs_for(llava, PROMPTS["batch of three"]()))
    prompt = llava.prompt(inputs, ["a", "b", "c"])
    said = [
        llava.processor.tokenizer.decode(row[q]) for row, q in zip(inputs["input_ids"], prompt.question, strict=True)
    ]
    assert said[0].strip() == "What is it?"
    assert said[1].strip() == "and What are they, and which is larger?"
    assert "Just text." in said[2]


def test_images_can_be_padded_to_a_square(llava):
    wide = Image.new("RGB", (200, 100), (255, 255, 255))
    padded = inputs_for(llava, [user(wide, "What?")], pad_square=True)["pixel_values"][0]
    assert padded[:, :20].abs().max() < 0.02  # CLIP's mean colour
    assert padded[:, 56].min() > 1.5
    # Bounds of area mean nothing to a tower of one size.
    bounded = inputs_for(llava, [user(wide, "What?")], pad_square=True, min_pixels=784, max_pixels=1568)["pixel_values"]
    assert torch.equal(bounded[0], padded)


def test_down_sampled_images_have_fewer_tokens(llava, two):
    shorter = llava.compress(two, build("downsample"), 0.25)
    assert shorter.totals == [128]
    assert [len(kept) for kept in shorter.kept] == [32]
    text = two["input_ids"].shape[1] - 128
    assert shorter.input_ids.shape[1] == text + 32
    # The tower's own positions, interpolated: what transformers makes of the smaller image.
    smaller = llava.resize(llava.to_device(two), build("downsample"), build_budget(0.25))
    with torch.no_grad():
        tower = llava.model.model.vision_tower(
            smaller["pixel_values"], interpolate_pos_encoding=True, output_hidden_states=True
        )
        wanted = llava.model.model.multi_modal_projector(tower.hidden_states[-2][:, 1:])
    visual = shorter.visual[0]
    torch.testing.assert_close(shorter.embeds[0, visual], wanted.flatten(0, 1))


def build_budget(ratio):
    from visionselector_eval.baselines import parse_budget

    return parse_budget(ratio)


# What can be wrong ---------------------------------------------------------------------------------------------------


def changed(folder: Path, target: Path, **config) -> Path:
    shutil.copytree(folder, target)
    path = target / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **config}))
    return target


def test_the_family_is_told_by_the_config(llava, tiny):
    assert (type(llava).__name__, type(tiny).__name__) == ("Llava", "Qwen2_5_VL")


@pytest.mark.parametrize("family", ["llama", "no_such_model"])
def test_an_unknown_family_names_what_exists_and_how_to_add_it(family, llava_folder, tmp_path):
    folder = changed(llava_folder, tmp_path / "other", model_type=family)
    with pytest.raises(InputError, match=rf"family '{family}'.*llava.*qwen2_5_vl.*docs/new-backbone\.md"):
        load_backbone(folder)


def test_the_cls_token_must_not_reach_the_llm(llava_folder, tmp_path):
    folder = changed(llava_folder, tmp_path / "full", vision_feature_select_strategy="full")
    with pytest.raises(InputError, match="shows the CLS token to its LLM"):
        load_backbone(folder)


def test_a_checkpoint_without_its_tower_is_refused(llava_folder, tmp_path):
    folder = changed(llava_folder, tmp_path / "blind")
    weights = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in weights.items() if "vision_tower" not in k}, folder / "model.safetensors")
    with pytest.raises(InputError, match=r"incomplete: .* tensors missing .*vision_tower") as caught:
        load_backbone(folder)
    assert "\n" not in str(caught.value)


def test_another_tower_is_refused(tmp_path):
    from transformers import SiglipVisionConfig

    tower = SiglipVisionConfig(
        hidden_size=48, intermediate_size=96, num_hidden_layers=4, num_attention_heads=4, image_size=112, patch_size=14
    )
    folder = save_llava(tmp_path / "siglip", vision_config=tower, learned=False)
    with pytest.raises(InputError, match="vision tower of type 'siglip_vision_model'"):
        load_backbone(folder)


def test_videos_are_refused(llava):
    with pytest.raises(InputError, match="takes images, no videos"):
        inputs_for(llava, [user(clip(), "What moves?")])


def test_prompts_and_images_must_match(llava, two):
    first = int((two["input_ids"][0] == llava.model.config.image_token_id).nonzero()[0])
    with pytest.raises(InputError, match="2 images were given but the prompts have placeholders for 1"):
        llava.encode({**two, "input_ids": two["input_ids"][:, first + 64 :]})
    with pytest.raises(InputError, match="no multiple of the 64 tokens"):
        llava.encode({**two, "input_ids": two["input_ids"][:, 40:]})
    with pytest.raises(InputError, match="placeholders for images but none are given"):
        llava.encode({"input_ids": two["input_ids"]})
    with pytest.raises(InputError, match="2 images were given but the prompts have placeholders for 0"):
        llava.encode({**inputs_for(llava, PROMPTS["text only"]()), "pixel_values": two["pixel_values"]})


# Published schedules -------------------------------------------------------------------------------------------------


REQUEST = Request(key="k", messages=lambda: user(draw_image(168, 168), "What is it?"), generation={"max_new_tokens": 2})


@pytest.fixture(scope="module")
def deep(llava, tmp_path_factory):
    """As LLaVA-1.5-7B: 576 tokens an image, 32 layers."""
    text = LlamaConfig(
        hidden_size=llava_checkpoint.WIDTH,
        intermediate_size=64,
        num_hidden_layers=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=llava.model.config.text_config.vocab_size,
        max_position_embeddings=4096,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=llava.model.config.text_config.eos_token_id,
        pad_token_id=llava.model.config.text_config.pad_token_id,
    )
    tower = CLIPVisionConfig(
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=168,
        patch_size=7,
        initializer_range=0.2,
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llava_checkpoint, "SIZE", 168)
        patch.setattr(llava_checkpoint, "PATCH", 7)
        folder = tmp_path_factory.mktemp("deep")
        return load_backbone(
            save_llava(folder, learned=False, vision_config=tower, text_config=text, image_seq_length=576)
        )


@pytest.mark.parametrize("upstream_exact", [False, True])
@pytest.mark.parametrize(
    ("called", "left"), [(192, (309, 204, 113)), (128, (312, 117, 39)), (96, (249, 55, 27)), (64, (82, 32, 18))]
)
def test_published_sparsevlm_leaves_the_published_tokens_in_every_layer(deep, called, left, upstream_exact):
    inputs = inputs_for(deep, [user(draw_image(168, 168), "What is it?")])
    method = build("sparsevlm", schedule="published", upstream_exact=upstream_exact)
    out = deep.prefill(inputs, method, f"{called}tok")
    text = inputs["input_ids"].shape[1] - 576
    visual = [length - text for length in out.layer_lengths]
    assert visual == [576] * 3 + [left[0]] * 4 + [left[1]] * 9 + [left[2]] * 16
    assert len(out.kept[0]) == left[2]
    assert out.layer_tokens == [pytest.approx(sum(visual) / 32)]
    answer = Answerer(deep).answer(
        Answerer(deep).prepare([REQUEST], [CompressorAtBudget(method, Tokens(called))]),
        CompressorAtBudget(method, Tokens(called)),
    )[0]
    assert (answer.kept_tokens, answer.total_tokens) == (left[2], 576)
    assert answer.layer_tokens == pytest.approx(sum(visual) / 32)


def test_published_sparsevlm_counts_each_image_alone_and_refuses_upstreams_scope_of_two(deep):
    inputs = inputs_for(deep, [user(draw_image(168, 168), draw_image(168, 168, 1), "What are they?")])
    out = deep.prefill(inputs, build("sparsevlm", schedule="published"), "64tok")
    assert [int((out.kept[0] < 576).sum()), int((out.kept[0] >= 576).sum())] == [18, 18]
    with pytest.raises(InputError, match="all images of a prompt together has 1152"):
        deep.prefill(inputs, build("sparsevlm", schedule="published", upstream_exact=True), "64tok")


def test_published_schedules_keep_the_stock_model_at_budget_1(deep):
    inputs = inputs_for(deep, [user(draw_image(168, 168), "What is it?")])
    stock = deep.prefill(inputs, build("full"), 1.0)
    for name in ("sparsevlm", "pyramiddrop"):
        out = deep.prefill(inputs, build(name, schedule="published"), 1.0)
        assert torch.equal(out.logits, stock.logits)


def test_published_pyramiddrop_on_32_layers_is_the_default_at_its_budget(deep):
    inputs = inputs_for(deep, [user(draw_image(168, 168), "What is it?")])
    ours, published = (
        deep.prefill(inputs, build("pyramiddrop", **options), 0.125) for options in ({}, {"schedule": "published"})
    )
    assert ours.layer_lengths == published.layer_lengths
    assert torch.equal(ours.logits, published.logits)
    assert published.layer_tokens == [270.0]


def test_a_budget_that_contradicts_a_schedule_is_refused_before_anything_is_run(deep, llava):
    method = build("sparsevlm", schedule="published")
    inputs = inputs_for(deep, [user(draw_image(168, 168), "What is it?")])
    for run in (lambda: CompressorAtBudget(method, Share(0.2)), lambda: deep.prefill(inputs, method, 0.2)):
        with pytest.raises(InputError, match=r"budget 0.2 contradicts schedule=published"):
            run()
    with pytest.raises(InputError, match="is for an LLM of 32 layers"):
        llava.bind(method)


@pytest.mark.parametrize("upstream_exact", [False, True])
def test_visionzip_on_a_clip_tower_merges_10_of_64_tokens(deep, upstream_exact):
    inputs = inputs_for(deep, [user(draw_image(168, 168), "What is it?")])
    item = deep.encode(inputs).rows[0][0]
    method = build("visionzip", upstream_exact=upstream_exact)
    for count, contextual in ((64, 10), (128, 20), (192, 30)):
        (kept,) = deep.compress(inputs, method, f"{count}tok").kept
        ranked = torch.sort(item.trace.cls, descending=True, stable=True).indices.tolist()
        dominant, rest = ranked[: count - contextual], sorted(ranked[count - contextual :])
        targets = rest[:: len(rest) // contextual][:contextual]
        assert kept.tolist() == sorted([*dominant, *targets])
    # A share is rounded as everywhere: upstream's budgets are counts where there is a CLS token.
    assert len(deep.compress(inputs, method, 0.2).kept[0]) == 115
