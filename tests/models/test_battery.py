"""Every compressor on every kind of prompt, on the embedded checkpoint."""

from __future__ import annotations

import pytest
import torch
from battery import CANONICAL, COMPRESSORS, PROMPTS, Row, clip, picture, same_tensor, user

from visionselector_eval.baselines import Tokens, build, parse_budget
from visionselector_eval.baselines.base import Share
from visionselector_eval.baselines.registry import BUILTIN
from visionselector_eval.models import load_backbone
from visionselector_eval.models.inputs import MediaSettings, build_inputs

GREEDY = {"max_new_tokens": 10, "do_sample": False}

every_compressor = pytest.mark.parametrize("row", COMPRESSORS, ids=str)
every_canonical = pytest.mark.parametrize("row", CANONICAL, ids=str)
every_prompt = pytest.mark.parametrize("prompt", PROMPTS)


def inputs_for(backbone, conversations):
    return build_inputs(backbone.processor, conversations, MediaSettings())


def is_decoder(row: Row) -> bool:
    return row.build().stage == "decoder"


def kept_by(backbone, inputs, row: Row, budget):
    """What a method left of a batch: known before the LLM runs, or only after it dropped tokens inside."""
    return (backbone.prefill if is_decoder(row) else backbone.compress)(inputs, row.build(), budget)


@pytest.fixture(scope="module")
def prompts(tiny):
    return {name: inputs_for(tiny, make()) for name, make in PROMPTS.items()}


@pytest.fixture(scope="module")
def stock(tiny, tiny_eager, prompts):
    """Greedy tokens of the stock model, by attention back-end and prompt."""
    return {
        (id(backbone), name): backbone.model.generate(**inputs, **GREEDY)[:, inputs["input_ids"].shape[1] :]
        for backbone in (tiny, tiny_eager)
        for name, inputs in prompts.items()
    }


def test_the_battery_has_every_built_in_compressor():
    assert {row.name for row in CANONICAL} == set(BUILTIN)


@pytest.mark.parametrize("attention", ["tiny", "tiny_eager"])
@every_prompt
@every_compressor
def test_budget_one_is_the_stock_model(row: Row, prompt, attention, prompts, stock, request):
    backbone = request.getfixturevalue(attention)
    answer = backbone.generate(prompts[prompt], row.build(), budget=1.0, **GREEDY)
    assert torch.equal(answer, stock[id(backbone), prompt])


@every_prompt
@every_canonical
def test_kept_tokens_are_exactly_the_budgets(row: Row, prompt, tiny, prompts):
    inputs = prompts[prompt]
    items = [[item.features.shape[0] for item in r] for r in tiny.encode(inputs, frozenset()).rows]
    for budget in (0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 0.99, 1.0, Tokens(1), Tokens(7), "64tok"):
        compressed = kept_by(tiny, inputs, row, budget)
        wanted = [sum(parse_budget(budget).count(n) for n in sizes) for sizes in items]
        counts = [len(kept) for kept in compressed.kept]
        assert compressed.totals == [sum(sizes) for sizes in items]
        if row.name == "full":
            assert counts == compressed.totals
        elif row.exact_count:
            assert counts == wanted
        elif prompt not in ("video", "image and video", "batch with video"):
            assert all(0 < c <= w for c, w in zip(counts, wanted, strict=True) if w)
        for kept, total in zip(compressed.kept, compressed.totals, strict=True):
            assert kept.dtype == torch.int64
            assert bool((kept.diff() > 0).all())
            assert not len(kept) or (kept[0] >= 0 and kept[-1] < total)
        text = (~tiny_visual(tiny, inputs)).sum() - (inputs["attention_mask"] == 0).sum()
        assert int(compressed.attention_mask.sum()) == int(text) + sum(counts), "text is never dropped"


def tiny_visual(backbone, inputs):
    config = backbone.model.config
    ids = inputs["input_ids"]
    return (ids == config.image_token_id) | (ids == config.video_token_id)


@every_prompt
@every_compressor
def test_kept_tokens_keep_their_features_and_positions(row: Row, prompt, tiny, prompts):
    """Feature row p belongs to position p, and positions are those of the full prompt."""
    if row.name == "downsample":
        pytest.skip("the control makes new tokens at new positions")
    inputs = tiny.to_device(prompts[prompt])
    encoded = tiny.encode(inputs)
    full = tiny.prompt(inputs, [""] * len(inputs["input_ids"]))
    run = tiny.prefill if is_decoder(row) else tiny.compress
    compressed = run(inputs, row.build(), 0.3, encoded=encoded)
    for b, kept in enumerate(compressed.kept):
        places = full.visual[b].nonzero().squeeze(1)
        keep = full.attention_mask[b].bool() & ~full.visual[b]
        keep[places[kept]] = True
        real = compressed.attention_mask[b].bool()
        assert torch.equal(compressed.position_ids[:, b, real], full.position_ids[:, b, keep])
        if is_decoder(row):
            continue
        assert torch.equal(compressed.input_ids[b, real], full.input_ids[b, keep])
        if len(kept) and not row.merges:
            features = torch.cat([item.features for item in encoded.rows[b]])
            visual = (compressed.input_ids[b] == tiny.model.config.image_token_id) | (
                compressed.input_ids[b] == tiny.model.config.video_token_id
            )
            assert torch.equal(compressed.embeds[b, visual & real], features[kept])


@every_compressor
def test_a_batch_row_equals_its_single_run(row: Row, tiny):
    conversations = PROMPTS["batch of three"]() + PROMPTS["batch with video"]()
    together = tiny.prefill(inputs_for(tiny, conversations), row.build(), 0.3)
    for b, conversation in enumerate(conversations):
        alone = tiny.prefill(inputs_for(tiny, [conversation]), row.build(), 0.3)
        size = alone.hidden.shape[1]
        assert torch.equal(together.kept[b], alone.kept[0])
        assert torch.equal(together.position_ids[:, b, -size:], alone.position_ids[:, 0])
        assert same_tensor(together.hidden[b, -size:], alone.hidden[0], 2e-4)
        assert same_tensor(together.logits[b], alone.logits[0], 1e-3)


@every_compressor
def test_two_images(row: Row, tiny):
    """Canonical: each image as if it were alone. Upstream: one scope, so that budgets can move between images."""
    first, second = picture(224, 280), picture(140, 112, 1)
    if is_decoder(row):  # its choice depends on the whole prompt; how many of each image does not
        inputs = inputs_for(tiny, [user(first, "and", second, "What?")])
        (kept,) = tiny.prefill(inputs, row.build(), 0.25).kept
        if row.build().scope == "item":
            assert [int((kept < 80).sum()), int((kept >= 80).sum())] == [20, 5]
        else:
            total = inputs["input_ids"].shape[1]
            assert len(kept) == row.build().counts(100, Share(0.25), 4, total)[-1]
        return
    both = tiny.compress(inputs_for(tiny, [user(first, "and", second, "What?")]), row.build(), 0.25, keys=["k"])
    if row.name in ("random", "downsample"):
        assert len(both.kept[0]) > 0
        return
    alone = [tiny.compress(inputs_for(tiny, [user(p, "What?")]), row.build(), 0.25).kept[0] for p in (first, second)]
    joined = torch.cat([alone[0], alone[1] + 80])
    if row.build().scope == "item":
        assert torch.equal(both.kept[0], joined)
    else:
        compressor = tiny.bind(row.build())
        assert len(both.kept[0]) == compressor.count(100, Share(0.25))


@every_compressor
def test_one_vision_pass_serves_all(row: Row, tiny, prompts):
    inputs = prompts["batch of three"]
    encoded = tiny.encode(inputs)
    fresh = tiny.prefill(inputs, row.build(), 0.2)
    reused = tiny.prefill(inputs, row.build(), 0.2, encoded=encoded)
    assert all(torch.equal(a, b) for a, b in zip(fresh.kept, reused.kept, strict=True))
    assert torch.equal(fresh.logits, reused.logits)


@every_prompt
@every_compressor
def test_generate_equals_a_decode_by_hand(row: Row, prompt, tiny, prompts):
    """After pruning, each next token is the argmax of a full forward, at the positions of the unpruned prompt."""
    if is_decoder(row):
        pytest.skip("test_decoder.py does this with the layers' own tokens")
    inputs = prompts[prompt]
    compressed = tiny.compress(inputs, row.build(), 0.3)
    tokens = tiny.generate(inputs, row.build(), 0.3, max_new_tokens=4, do_sample=False, repetition_penalty=1.0)
    embed = tiny.model.get_input_embeddings()
    language_model = tiny.model.model.language_model
    ends = tiny.end_tokens
    for b in range(len(tokens)):
        real = compressed.attention_mask[b].bool()
        embeds, positions = compressed.embeds[b, real][None], compressed.position_ids[:, b, real]
        for step, token in enumerate(tokens[b].tolist()):
            with torch.no_grad():
                hidden = language_model(
                    inputs_embeds=embeds,
                    position_ids=torch.cat([torch.arange(embeds.shape[1])[None, None], positions[:, None]]),
                    use_cache=False,
                ).last_hidden_state
                logits = tiny.model.lm_head(hidden[0, -1])
            top = logits.topk(2).values
            if top[0] - top[1] > 1e-4:
                assert int(logits.argmax()) == token, step
            if token in ends:
                break
            embeds = torch.cat([embeds, embed(torch.tensor([[token]]))], 1)
            positions = torch.cat([positions, positions[:, -1:] + 1], 1)


@every_compressor
def test_nothing_is_left_behind(row: Row, tiny, prompts):
    """No hook stays, and the next stock answer is what it was."""
    inputs = prompts["image and video"]
    before = tiny.model.generate(**inputs, **GREEDY)
    tiny.generate(inputs, row.build(), 0.2, **GREEDY)
    hooks = [m for m in tiny.model.modules() if m._forward_hooks or m._forward_pre_hooks]
    assert hooks == []
    assert torch.equal(tiny.model.generate(**inputs, **GREEDY), before)


@every_compressor
def test_bfloat16_runs(row: Row, prompts):
    backbone = load_backbone("tiny", dtype="bfloat16")
    out = backbone.prefill(prompts["batch of three"], row.build(), 0.2)
    assert out.hidden.dtype == torch.bfloat16
    assert out.logits.dtype == torch.float32
    assert bool(torch.isfinite(out.logits).all())


def test_sampling_and_repetition_penalty_are_the_stock_models(tiny, prompts):
    inputs = prompts["one image"]
    for settings in (
        {"do_sample": True, "temperature": 0.8, "top_k": 20},
        {"do_sample": False, "repetition_penalty": 1.5},
    ):
        torch.manual_seed(3)
        stock = tiny.model.generate(**inputs, max_new_tokens=12, **settings)[:, inputs["input_ids"].shape[1] :]
        torch.manual_seed(3)
        assert torch.equal(tiny.generate(inputs, build("full"), 1.0, max_new_tokens=12, **settings), stock)


def test_random_follows_the_documents_name(tiny, prompts):
    inputs = prompts["one image"]
    kept = [tiny.compress(inputs, build("random"), 0.3, keys=[key]).kept[0] for key in ("a", "a", "b")]
    assert torch.equal(kept[0], kept[1])
    assert not torch.equal(kept[0], kept[2])


def test_prefill_says_what_entered_each_layer(tiny, prompts):
    out = tiny.prefill(prompts["one image"], build("uniform"), 0.2)
    layers = tiny.model.config.text_config.num_hidden_layers
    assert out.layer_lengths == [out.hidden.shape[1]] * layers
    assert out.position_ids.shape == (3, 1, out.hidden.shape[1])
    assert out.totals == [80]


def test_video_positions_follow_the_clock(tiny):
    """Frames twice as far apart stand twice as far apart in time (2 position units a second in this checkpoint)."""
    frames, about = clip(4)
    spans = []
    for fps in (2.0, 1.0):
        inputs = tiny.to_device(inputs_for(tiny, [user((frames, {**about, "fps": fps}), "What?")]))
        prompt = tiny.prompt(inputs, [""])
        time = prompt.position_ids[0][prompt.visual]
        spans.append(int(time.max() - time.min()))
    assert spans == [2, 4]
