"""Every compressor on every kind of prompt, on a small checkpoint of each family."""

from __future__ import annotations

import functools

import pytest
import torch
from battery import CANONICAL, COMPRESSORS, PROMPTS, Row, clip, draw_image, same_tensor, user
from families import FAMILIES, Subject

from visionselector_eval.baselines import Tokens, build, parse_budget
from visionselector_eval.baselines.contract.budget import Share
from visionselector_eval.baselines.contract.registry import BUILTIN
from visionselector_eval.models.inputs import MediaSettings, build_inputs

GREEDY = {"max_new_tokens": 10, "do_sample": False}

every_compressor = pytest.mark.parametrize("row", COMPRESSORS, ids=str)
every_canonical = pytest.mark.parametrize("row", CANONICAL, ids=str)
every_family = pytest.mark.parametrize("subject", FAMILIES, indirect=True)
every_prompt = pytest.mark.parametrize(
    ("subject", "prompt"), [(name, p) for name, make in FAMILIES.items() for p in make.prompts], indirect=["subject"]
)


def inputs_for(backbone, conversations):
    return build_inputs(backbone.processor, conversations, MediaSettings())


def is_decoder(row: Row) -> bool:
    return row.build().stage == "decoder"


def kept_by(backbone, inputs, row: Row, budget):
    """What a method left of a batch: known before the LLM runs, or only after it dropped tokens inside."""
    return (backbone.prefill if is_decoder(row) else backbone.compress)(inputs, row.build(), budget)


@pytest.fixture(scope="module")
def subjects(tmp_path_factory):
    """A small checkpoint of each family, made when it is first asked for."""
    return functools.cache(lambda name: FAMILIES[name].load(tmp_path_factory))


@pytest.fixture
def subject(request, subjects):
    """A small checkpoint of a family, its prompts as inputs and what the stock model answers to them."""
    made = subjects(request.param)
    if not made.inputs:
        names = FAMILIES[request.param].prompts
        made.inputs = {name: inputs_for(made.backbone, PROMPTS[name]()) for name in names}
    return made


def stock(subject: Subject, eager: bool, prompt: str):
    """Greedy tokens of the stock model."""
    key = (eager, prompt)
    if key not in subject.stock:
        inputs, backbone = subject.inputs[prompt], subject.eager if eager else subject.backbone
        subject.stock[key] = backbone.model.generate(**inputs, **GREEDY)[:, inputs["input_ids"].shape[1] :]
    return subject.stock[key]


def test_the_battery_has_every_built_in_compressor():
    assert {row.name for row in CANONICAL} == set(BUILTIN)


@pytest.mark.parametrize("eager", [False, True], ids=["sdpa", "eager"])
@every_prompt
@every_compressor
def test_budget_one_is_the_stock_model(row: Row, subject, prompt, eager):
    backbone = subject.eager if eager else subject.backbone
    answer = backbone.generate(subject.inputs[prompt], row.build(), budget=1.0, **GREEDY)
    assert torch.equal(answer, stock(subject, eager, prompt))


@every_prompt
@every_canonical
def test_kept_tokens_are_exactly_the_budgets(row: Row, subject, prompt):
    inputs = subject.inputs[prompt]
    items = [[item.features.shape[0] for item in r] for r in subject.backbone.encode(inputs, frozenset()).rows]
    for budget in (0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 0.99, 1.0, Tokens(1), Tokens(7), "64tok"):
        compressed = kept_by(subject.backbone, inputs, row, budget)
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
        text = (~subject.visual(inputs["input_ids"])).sum() - (inputs["attention_mask"] == 0).sum()
        assert int(compressed.attention_mask.sum()) == int(text) + sum(counts), "text is never dropped"


@every_prompt
@every_compressor
def test_kept_tokens_keep_their_features_and_positions(row: Row, subject, prompt):
    """Feature row p belongs to position p, and positions are those of the full prompt, or counted again if asked."""
    if row.name == "downsample":
        pytest.skip("the control makes new tokens at new positions")
    backbone, method = subject.backbone, row.build()
    inputs = backbone.to_device(subject.inputs[prompt])
    encoded = backbone.encode(inputs)
    full = backbone.prompt(inputs, [""] * len(inputs["input_ids"]))
    compressed = (backbone.prefill if is_decoder(row) else backbone.compress)(inputs, method, 0.3, encoded=encoded)
    positions = compressed.position_ids if compressed.position_ids.ndim == 3 else compressed.position_ids[None]
    anew = subject.plain_positions and method.renumbers and method.upstream_exact
    for b, kept in enumerate(compressed.kept):
        places = full.visual[b].nonzero().squeeze(1)
        keep = full.attention_mask[b].bool() & ~full.visual[b]
        keep[places[kept]] = True
        real = compressed.attention_mask[b].bool()
        expected = torch.arange(int(keep.sum()))[None] if anew else full.position_ids[:, b, keep]
        assert torch.equal(positions[:, b, real], expected)
        if is_decoder(row):
            continue
        assert torch.equal(compressed.input_ids[b, real], full.input_ids[b, keep])
        if len(kept) and not row.merges:
            features = torch.cat([item.features for item in encoded.rows[b]])
            visual = subject.visual(compressed.input_ids[b])
            assert torch.equal(compressed.embeds[b, visual & real], features[kept])


@every_family
@every_compressor
def test_a_batch_row_equals_its_single_run(row: Row, subject):
    batches = [name for name in subject.inputs if name.startswith("batch")]
    conversations = [conversation for name in batches for conversation in PROMPTS[name]()]
    backbone = subject.backbone
    together = backbone.prefill(inputs_for(backbone, conversations), row.build(), 0.3)
    for b, conversation in enumerate(conversations):
        alone = backbone.prefill(inputs_for(backbone, [conversation]), row.build(), 0.3)
        size = alone.hidden.shape[1]
        assert torch.equal(together.kept[b], alone.kept[0])
        assert torch.equal(together.position_ids[..., b, -size:], alone.position_ids[..., 0, :])
        assert same_tensor(together.hidden[b, -size:], alone.hidden[0], 2e-4)
        assert same_tensor(together.logits[b], alone.logits[0], 1e-3)


@every_family
@every_compressor
def test_two_images(row: Row, subject):
    """Canonical: each image as if it were alone. Upstream: one scope, so that budgets can move between images."""
    first, second = draw_image(224, 280), draw_image(140, 112, 1)
    backbone, method = subject.backbone, subject.backbone.bind(row.build())
    pair = inputs_for(backbone, [user(first, "and", second, "What?")])
    sizes = [len(item.features) for item in backbone.encode(pair, frozenset()).rows[0]]
    if is_decoder(row):  # its choice depends on the whole prompt; how many of each image does not
        (kept,) = backbone.prefill(pair, row.build(), 0.25).kept
        if method.scope == "item":
            counts = [int((kept < sizes[0]).sum()), int((kept >= sizes[0]).sum())]
            assert counts == [method.count(n, Share(0.25)) for n in sizes]
        else:
            total = pair["input_ids"].shape[1]
            assert len(kept) == method.counts(sum(sizes), Share(0.25), backbone.depth, total)[-1]
        return
    both = backbone.compress(pair, row.build(), 0.25, keys=["k"])
    if row.name in ("random", "downsample"):
        assert len(both.kept[0]) > 0
        return
    alone = [
        backbone.compress(inputs_for(backbone, [user(p, "and What?")]), row.build(), 0.25).kept[0]
        for p in (first, second)
    ]
    if row.name == "cdpruner" and not subject.plain_positions:
        alone = [
            backbone.compress(inputs_for(backbone, [user(p, "What?")]), row.build(), 0.25).kept[0]
            for p in (first, second)
        ]
    if method.scope == "item":
        assert torch.equal(both.kept[0], torch.cat([alone[0], alone[1] + sizes[0]]))
    else:
        assert len(both.kept[0]) == method.count(sum(sizes), Share(0.25))


@every_family
@every_compressor
def test_one_vision_pass_serves_all(row: Row, subject):
    inputs, backbone = subject.inputs["batch of three"], subject.backbone
    encoded = backbone.encode(inputs)
    fresh = backbone.prefill(inputs, row.build(), 0.2)
    reused = backbone.prefill(inputs, row.build(), 0.2, encoded=encoded)
    assert all(torch.equal(a, b) for a, b in zip(fresh.kept, reused.kept, strict=True))
    assert torch.equal(fresh.logits, reused.logits)


@pytest.mark.versions
@every_prompt
@every_compressor
def test_generate_equals_a_decode_by_hand(row: Row, subject, prompt):
    """After pruning, each next token is the argmax of a full forward, at the positions of the unpruned prompt."""
    if is_decoder(row):
        pytest.skip("test_decoder.py does this with the layers' own tokens")
    inputs, backbone = subject.inputs[prompt], subject.backbone
    compressed = backbone.compress(inputs, row.build(), 0.3)
    tokens = backbone.generate(inputs, row.build(), 0.3, max_new_tokens=4, do_sample=False, repetition_penalty=1.0)
    embed = backbone.model.get_input_embeddings()
    language_model = backbone.model.model.language_model
    ends = backbone.end_tokens
    for b in range(len(tokens)):
        real = compressed.attention_mask[b].bool()
        embeds, positions = compressed.embeds[b, real][None], compressed.position_ids[:, b, real]
        for step, token in enumerate(tokens[b].tolist()):
            with torch.no_grad():
                hidden = language_model(
                    inputs_embeds=embeds,
                    attention_mask=torch.ones(1, embeds.shape[1], dtype=torch.int64),
                    position_ids=subject.for_language_model(positions),
                    use_cache=False,
                    **subject.stock_planes(compressed, b, embeds.shape[1]),
                ).last_hidden_state
                logits = backbone.model.lm_head(hidden[0, -1])
            top = logits.topk(2).values
            if top[0] - top[1] > 1e-4:
                assert int(logits.argmax()) == token, step
            if token in ends:
                break
            embeds = torch.cat([embeds, embed(torch.tensor([[token]]))], 1)
            positions = torch.cat([positions, positions[:, -1:] + 1], 1)


@pytest.mark.versions
@every_family
@every_compressor
def test_nothing_is_left_behind(row: Row, subject):
    """No hook stays, and the next stock answer is what it was."""
    inputs, backbone = subject.inputs["two images"], subject.backbone
    before = backbone.model.generate(**inputs, **GREEDY)  # transformers leaves hooks of its own on some towers
    hooks = [(dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in backbone.model.modules()]
    backbone.generate(inputs, row.build(), 0.2, **GREEDY)
    assert [(dict(m._forward_hooks), dict(m._forward_pre_hooks)) for m in backbone.model.modules()] == hooks
    assert torch.equal(backbone.model.generate(**inputs, **GREEDY), before)


@pytest.mark.versions
@every_family
@every_compressor
def test_bfloat16_runs(row: Row, subject):
    out = subject.half.prefill(subject.inputs["batch of three"], row.build(), 0.2)
    assert out.hidden.dtype == torch.bfloat16
    assert out.logits.dtype == torch.float32
    assert bool(torch.isfinite(out.logits).all())


@every_family
def test_sampling_and_repetition_penalty_are_the_stock_models(subject):
    inputs, backbone = subject.inputs["one image"], subject.backbone
    for settings in (
        {"do_sample": True, "temperature": 0.8, "top_k": 20},
        {"do_sample": False, "repetition_penalty": 1.5},
    ):
        torch.manual_seed(3)
        expected = backbone.model.generate(**inputs, max_new_tokens=12, **settings)[:, inputs["input_ids"].shape[1] :]
        torch.manual_seed(3)
        assert torch.equal(backbone.generate(inputs, build("full"), 1.0, max_new_tokens=12, **settings), expected)


def test_random_follows_the_documents_name(tiny):
    inputs = inputs_for(tiny, PROMPTS["one image"]())
    kept = [tiny.compress(inputs, build("random"), 0.3, keys=[key]).kept[0] for key in ("a", "a", "b")]
    assert torch.equal(kept[0], kept[1])
    assert not torch.equal(kept[0], kept[2])


@every_family
def test_prefill_says_what_entered_each_layer(subject):
    out = subject.backbone.prefill(subject.inputs["one image"], build("uniform"), 0.2)
    assert out.layer_lengths == [out.hidden.shape[1]] * subject.backbone.depth
    assert out.position_ids.shape == (*([] if subject.plain_positions else [3]), 1, out.hidden.shape[1])
    assert out.totals == [int(subject.visual(subject.inputs["one image"]["input_ids"]).sum())]


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
