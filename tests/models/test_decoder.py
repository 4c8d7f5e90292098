"""Dropping tokens inside the LLM: the hooked run against one written out layer by layer, without cache and hooks."""

from __future__ import annotations

import dataclasses
import json
import shutil
from dataclasses import dataclass, field

import pytest
import torch
from battery import PROMPTS, clip, draw_image, same_tensor, user
from safetensors.torch import load_file, save_file

from visionselector_eval.baselines import InputError, Tokens, build, parse_budget
from visionselector_eval.baselines.contract.base import Host, Selection
from visionselector_eval.baselines.contract.budget import Share
from visionselector_eval.baselines.contract.decoder import DecoderCompressor, ScoreDecoder
from visionselector_eval.baselines.contract.registry import resolve_options
from visionselector_eval.models import load_backbone
from visionselector_eval.models.answering import Answerer, CompressorAtBudget, Request
from visionselector_eval.models.dynamic_qwen import DynamicQwen, Predictor, load_predictor
from visionselector_eval.models.generation import kv_cache
from visionselector_eval.models.inputs import MediaSettings, build_inputs
from visionselector_eval.models.tiny import checkpoint

GREEDY = {"max_new_tokens": 5, "do_sample": False, "repetition_penalty": 1.0}
DEPTH, WIDTH = 6, 192  # of the embedded checkpoint


def inputs_for(backbone, conversations):
    return build_inputs(backbone.processor, conversations, MediaSettings())


@dataclass(frozen=True, kw_only=True)
class EveryOther(DecoderCompressor):
    """Keeps spread tokens at given layers; looks at nothing."""

    name = "every_other"
    at: tuple[int, ...] = (1,)

    def layers(self, depth):
        return self.at

    def keep(self, view, members, count):
        spread = torch.linspace(0, len(members) - 1, count).round().long()
        return Selection(kept=spread.to(members.device))


@dataclass(frozen=True, kw_only=True)
class Marked(EveryOther):
    """Changes what it keeps, too."""

    name = "marked"

    def keep(self, view, members, count):
        kept = super().keep(view, members, count).kept
        return Selection(kept=kept, features=-view.hidden[view.visual[members[kept]]])


class ByHand:
    """One prompt through the eager layers, every attention map written out; (1, S, D) states and no cache."""

    def __init__(self, backbone, inputs, row):
        prompt = backbone.compress(inputs, build("full"))
        real = prompt.attention_mask[row].bool()
        self.core = backbone.model.model.language_model
        self.head = backbone.model.lm_head
        self.embed = backbone.model.get_input_embeddings()
        self.embeds = prompt.embeds[row, real][None]
        self.positions = prompt.position_ids[:, row, real][:, None]
        self.visual = prompt.visual[row, real].nonzero().squeeze(1)
        self.items = [n for n, _ in prompt.items[row]]
        self.size = self.embeds.shape[1]

    def choose(self, method, budget, layer, hidden, tables, places, previous):
        """Places (of the prompt) that stay at the input of `layer`."""
        visual = torch.isin(places, self.visual).nonzero().squeeze(1)
        original = torch.searchsorted(self.visual, places[visual])
        block = self.core.layers[layer]
        if method.name == "pyramiddrop":
            weights = self.attention(block, block.input_layernorm(hidden), tables)
        else:
            weights = previous
        rows = weights[-1:] if getattr(method, "rows", "last") == "last" else weights
        scores = rows.mean(0)[visual]
        owner = torch.bucketize(original, torch.tensor(self.items).cumsum(0), right=True)
        stage = method.layers(DEPTH).index(layer)
        gone = torch.zeros(len(places), dtype=torch.bool)
        for item, n in enumerate(self.items):
            mine = (owner == item).nonzero().squeeze(1)
            count = method.counts(n, budget, DEPTH, self.size)[stage]
            order = scores[mine].sort(descending=True, stable=True).indices
            gone[visual[mine[order[count:]]]] = True
        return places[~gone]

    def attention(self, block, normed, tables):
        mask = torch.full((normed.shape[1],) * 2, torch.finfo(torch.float32).min).triu(1)
        return block.self_attn(normed, attention_mask=mask[None, None], position_embeddings=tables)[1][0].mean(0)

    @torch.no_grad()
    def run(self, method=None, budget=None, answer=(), sets=None, changed=None):
        """States after the final norm, and the places in each layer; `sets` says the places, else `method` does.

        `changed`: for a layer the places of tokens that get other states at its input, and those states.
        """
        new = self.embed(torch.tensor(list(answer), dtype=torch.long))[None]
        hidden = torch.cat([self.embeds, new], 1)
        later = self.positions[..., -1:] + torch.arange(1, len(answer) + 1)
        positions = torch.cat([self.positions, later], -1)
        places, previous, seen = torch.arange(self.size), None, []
        for layer, block in enumerate(self.core.layers):
            tables = self.tables(hidden, positions, places, len(answer))
            if sets is not None:
                left = sets[layer]
            elif method is not None and layer in method.layers(DEPTH):
                left = self.choose(method, budget, layer, hidden, tables, places, previous)
            else:
                left = places
            stays = torch.cat([torch.isin(places, left), torch.ones(len(answer), dtype=torch.bool)])
            hidden, places = hidden[:, stays], left
            for at, states in (changed or {}).get(layer, ()):
                hidden[0, torch.searchsorted(places, at)] = states
            tables = self.tables(hidden, positions, places, len(answer))
            seen.append(places)
            previous = self.attention(block, block.input_layernorm(hidden), tables)
            mask = torch.full((hidden.shape[1],) * 2, torch.finfo(torch.float32).min).triu(1)
            hidden = block(hidden, attention_mask=mask[None, None], position_embeddings=tables)
        return self.core.norm(hidden), seen

    def tables(self, hidden, positions, places, new):
        at = torch.cat([places, torch.arange(self.size, self.size + new)])
        return self.core.rotary_emb(hidden, positions[..., at])


RANKED = [
    build("fastv"),
    build("fastv", rows="all", layer=1),
    build("fastv", layer=3),
    build("pyramiddrop"),
]
CASES = ["one image", "two images", "video", "image and video", "batch of three", "batch with video"]


@pytest.mark.versions
@pytest.mark.parametrize("attention", ["tiny", "tiny_eager"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("method", RANKED, ids=lambda m: f"{m.name}-{getattr(m, 'rows', '')}-{getattr(m, 'layer', '')}")
def test_hooked_run_equals_one_by_hand(method, case, attention, request, tiny_eager):
    backbone = request.getfixturevalue(attention)
    inputs = inputs_for(backbone, PROMPTS[case]())
    compressed = backbone.compress(inputs, method, 0.2)
    out = backbone.run_llm(compressed)
    tokens, seen = backbone.run_generate(compressed, **GREEDY)
    lengths = torch.zeros(DEPTH, dtype=torch.long)
    for row in range(len(tokens)):
        hand = ByHand(tiny_eager, inputs, row)
        hidden, places = hand.run(method, Share(0.2))
        kept = torch.searchsorted(hand.visual, places[-1][torch.isin(places[-1], hand.visual)])
        assert torch.equal(out.kept[row], kept)
        assert torch.equal(seen.kept[row], kept)
        size = hidden.shape[1]
        assert int(out.attention_mask[row].sum()) == size
        assert same_tensor(out.hidden[row, -size:], hidden[0], 2e-4)
        assert torch.equal(out.position_ids[:, row, -size:], hand.positions[:, 0, places[-1]])
        counts = [int(torch.isin(hand.visual, there).sum()) for there in places]
        assert out.layer_tokens[row] == pytest.approx(sum(counts) / DEPTH)
        lengths = torch.maximum(lengths, torch.tensor([len(there) for there in places]))
        answer = tokens[row].tolist()
        for step, token in enumerate(answer):
            logits = hand.head(hand.run(answer=answer[:step], sets=places)[0][0, -1])
            top = logits.topk(2).values
            if top[0] - top[1] > 1e-4:
                assert int(logits.argmax()) == token, step
            if token in backbone.end_tokens:
                break
    assert out.layer_lengths == seen.layer_lengths == lengths.tolist()


def tiny_predictor(seed=0, **options):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        predictor = Predictor(WIDTH, **{"hidden": 16, **options}).eval()
        for parameter in predictor.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=1.5 / parameter.shape[1] ** 0.5)
    return predictor.requires_grad_(False)


@dataclass(frozen=True, kw_only=True)
class Recorder(DecoderCompressor):
    """Another method, and a note of what it chose."""

    name = "recorder"
    part: DecoderCompressor
    notes: list = field(default_factory=list)

    def __post_init__(self):
        object.__setattr__(self, "needs", self.part.needs)

    @property
    def scope(self):
        return self.part.scope

    def layers(self, depth):
        return self.part.layers(depth)

    def counts(self, n, budget, depth, total):
        return self.part.counts(n, budget, depth, total)

    def keep(self, view, members, count):
        selection = self.part.keep(view, members, count)
        self.notes.append((view.layer, view.original[members], selection))
        return selection


LATER = [
    build("dart"),
    build("dart", upstream_exact=True),
    build("sparsevlm"),
    build("sparsevlm", upstream_exact=True),
    DynamicQwen(predictor=tiny_predictor()),
    DynamicQwen(predictor=tiny_predictor(), upstream_exact=True, layer=1),
    Marked(at=(1, 3)),
]


@pytest.mark.versions
@pytest.mark.parametrize("attention", ["tiny", "tiny_eager"])
@pytest.mark.parametrize("case", ["one image", "two images", "video", "image and video"])
@pytest.mark.parametrize("method", LATER, ids=lambda m: f"{m.name}-{m.scope}")
def test_what_a_method_chose_is_what_the_layers_got(method, case, attention, request, tiny_eager):
    """For any method: its choices, noted, then the layers by hand with these tokens, and a decode by hand on top."""
    backbone = request.getfixturevalue(attention)
    inputs = inputs_for(backbone, PROMPTS[case]())
    recorder = Recorder(part=method)
    out = backbone.prefill(inputs, recorder, 0.3)
    notes = list(recorder.notes)
    hand = ByHand(tiny_eager, inputs, 0)
    left, sets, changed = torch.arange(hand.size), [], {}
    for layer in range(DEPTH):
        for at, original, selection in notes:
            if at == layer:
                kept = original[selection.kept]
                left = left[~torch.isin(left, hand.visual[original]) | torch.isin(left, hand.visual[kept])]
                if selection.features is not None:
                    changed.setdefault(layer, []).append((hand.visual[kept], selection.features))
        sets.append(left)
    assert notes
    assert out.layer_lengths == [len(places) for places in sets]
    assert torch.equal(out.kept[0], torch.searchsorted(hand.visual, left[torch.isin(left, hand.visual)]))
    assert same_tensor(out.hidden, hand.run(sets=sets, changed=changed)[0], 2e-4)
    answer = backbone.generate(inputs, recorder, 0.3, **GREEDY)[0].tolist()
    for step, token in enumerate(answer):
        logits = hand.head(hand.run(answer=answer[:step], sets=sets, changed=changed)[0][0, -1])
        top = logits.topk(2).values
        if top[0] - top[1] > 1e-4:
            assert int(logits.argmax()) == token, step
        if token in backbone.end_tokens:
            break


@pytest.mark.versions
@pytest.mark.parametrize("attention", ["tiny", "tiny_eager"])
@pytest.mark.parametrize("case", ["one image", "batch of three"])
def test_cache_holds_each_layers_own_length(case, attention, request):
    backbone = request.getfixturevalue(attention)
    compressed = backbone.compress(inputs_for(backbone, PROMPTS[case]()), build("pyramiddrop"), 0.125)
    from visionselector_eval.models.decoder_pruning import DecoderPruning

    pruning = DecoderPruning(backbone.layer_access, compressed)
    with pruning.installed():
        output = backbone.model.generate(
            input_ids=compressed.input_ids,
            inputs_embeds=compressed.embeds,
            attention_mask=compressed.attention_mask,
            position_ids=torch.cat(
                [(compressed.attention_mask.cumsum(-1) - 1).clamp_min(0)[None], compressed.position_ids]
            ),
            max_new_tokens=4,
            min_new_tokens=4,
            do_sample=False,
            return_dict_in_generate=True,
        )
    lengths = pruning.outcome().layer_lengths
    assert [layer.get_seq_length() for layer in kv_cache(output).layers] == [n + 3 for n in lengths]
    assert lengths == sorted(lengths, reverse=True)
    assert len(set(lengths)) == 4  # its stages


@pytest.mark.parametrize("case", PROMPTS)
@pytest.mark.parametrize("attention", ["tiny", "tiny_eager"])
def test_keeping_everything_through_the_hooks_is_the_stock_model(attention, case, request):
    """Not by leaving the hooks out: every stage keeps all."""
    backbone = request.getfixturevalue(attention)
    inputs = inputs_for(backbone, PROMPTS[case]())
    stock = backbone.generate(inputs, build("full"), **GREEDY)
    assert torch.equal(backbone.generate(inputs, EveryOther(at=(1, 3)), Tokens(10_000), **GREEDY), stock)
    out = backbone.prefill(inputs, EveryOther(at=(1, 3)), Tokens(10_000))
    assert torch.equal(out.hidden, backbone.prefill(inputs, build("full")).hidden)


def test_text_only_passes_through(tiny):
    inputs = inputs_for(tiny, PROMPTS["text only"]())
    out = tiny.prefill(inputs, build("fastv"), 0.1)
    assert [len(kept) for kept in out.kept] == [0]
    assert out.layer_tokens == [0.0]
    assert torch.equal(out.hidden, tiny.prefill(inputs, build("full")).hidden)


def hooks_of(backbone):
    return [m for m in backbone.model.modules() if m._forward_hooks or m._forward_pre_hooks]


@dataclass(frozen=True, kw_only=True)
class Breaks(ScoreDecoder):
    """Fails."""

    name = "breaks"

    def layers(self, depth):
        return (2,)

    def score(self, view):
        raise RuntimeError("boom")


@dataclass(frozen=True, kw_only=True)
class Greedy(EveryOther):
    """Returns what it was not asked for."""

    name = "greedy"

    def keep(self, view, members, count):
        return Selection(kept=torch.arange(count + 1))


@dataclass(frozen=True, kw_only=True)
class Doubled(EveryOther):
    """Returns one token twice."""

    name = "doubled"

    def keep(self, view, members, count):
        return Selection(kept=torch.zeros(count, dtype=torch.long))


@pytest.mark.parametrize(
    ("method", "error", "says"),
    [
        (Breaks(), RuntimeError, "boom"),
        (Greedy(), InputError, "ascending int64 indices are needed"),
        (Doubled(), InputError, "not ascending, unique and in range"),
    ],
)
def test_hooks_are_gone_after_an_error(tiny, method, error, says):
    inputs = inputs_for(tiny, PROMPTS["one image"]())
    before = tiny.model.generate(**inputs, **GREEDY)
    for run in (tiny.prefill, tiny.generate):
        with pytest.raises(error, match=says):
            run(inputs, method, 0.3)
        assert hooks_of(tiny) == []
    assert torch.equal(tiny.model.generate(**inputs, **GREEDY), before)


@pytest.mark.parametrize("at", [(), (0,), (0, 2), (2, 1), (2, 2), (DEPTH,), (-1,)])
def test_layers_outside_the_llm_are_refused(tiny, at):
    with pytest.raises(InputError, match=f"give layers from 1 to {DEPTH - 1}"):
        tiny.bind(EveryOther(at=at))


@pytest.mark.parametrize("settings", [{"num_beams": 2}, {"use_cache": False}, {"num_return_sequences": 2}])
def test_generation_that_one_cache_cannot_serve_is_refused(tiny, settings):
    inputs = inputs_for(tiny, PROMPTS["one image"]())
    with pytest.raises(InputError, match=f"{next(iter(settings))}=.*drops tokens inside the LLM"):
        tiny.generate(inputs, build("fastv"), 0.3, max_new_tokens=2, **settings)


def test_changed_states_go_on_to_the_next_layers(tiny):
    inputs = inputs_for(tiny, PROMPTS["batch of three"]())
    plain, marked = (tiny.prefill(inputs, method, 0.3) for method in (EveryOther(at=(2,)), Marked(at=(2,))))
    assert all(torch.equal(a, b) for a, b in zip(plain.kept, marked.kept, strict=True))
    assert not torch.allclose(plain.logits[0], marked.logits[0])
    assert torch.equal(plain.logits[2], marked.logits[2]), "text only"


def test_a_visual_token_at_the_prompts_end_stays(tiny):
    """No chat template makes such a prompt, but a hand-made one may end in its image."""
    inputs = inputs_for(tiny, [user("What is it?", draw_image(140, 112))])
    end = int((inputs["input_ids"][0] == tiny.model.config.image_token_id).nonzero()[-1]) + 1
    inputs = {k: v[:, :end] if v.shape[:1] == (1,) and v.ndim == 2 and k != "image_grid_thw" else v
              for k, v in inputs.items() if k != "mm_token_type_ids"}  # fmt: skip
    for method in (build("fastv"), build("pyramiddrop"), Marked(at=(1, 2))):
        for budget in (Tokens(1), Tokens(3), 0.3):
            kept = tiny.prefill(inputs, method, budget).kept[0]
            assert kept[-1] == 19
            assert len(kept) == (6 if budget == 0.3 else budget.number)


def test_two_dimensional_masks_of_flash_attention(tiny):
    """The hooks' (B, keys) masks, by an attention function that takes what flash attention takes."""
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

    shapes = []

    def attention(module, query, key, value, attention_mask, scaling=None, **kwargs):
        q_len, k_len = query.shape[2], key.shape[2]
        assert attention_mask is None or attention_mask.shape == (len(query), k_len)
        shapes.append(None if attention_mask is None else tuple(attention_mask.shape))
        allowed = torch.ones(q_len, k_len, dtype=torch.bool).tril(k_len - q_len)[None, None]
        if attention_mask is not None:
            allowed = allowed & attention_mask.bool()[:, None, None] | torch.eye(q_len, k_len, dtype=torch.bool)
        groups = query.shape[1] // key.shape[1]
        key, value = (t.repeat_interleave(groups, 1) for t in (key, value))
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, allowed, scale=scaling)
        return out.transpose(1, 2), None

    AttentionInterface.register("flash_by_hand", attention)
    AttentionMaskInterface.register("flash_by_hand", ALL_MASK_ATTENTION_FUNCTIONS["flash_attention_2"])
    backbone = load_backbone("tiny")
    backbone.model.model.language_model.config._attn_implementation = "flash_by_hand"
    two = [user(draw_image(140, 112), "A?"), user(draw_image(140, 112, 1), "B?")]
    mixed = [user(draw_image(140, 112), "What is it, then?"), user(draw_image(168, 140), "?")]
    for conversations in (PROMPTS["one image"](), PROMPTS["batch of three"](), two, mixed):
        inputs = inputs_for(tiny, conversations)
        for method in (build("pyramiddrop"), build("fastv")):
            wanted = tiny.prefill(inputs, method, 0.3)
            out = backbone.prefill(inputs, method, 0.3)
            assert all(torch.equal(a, b) for a, b in zip(out.kept, wanted.kept, strict=True))
            assert same_tensor(out.logits, wanted.logits, 1e-3)
            answers = [b.generate(inputs, method, 0.3, **GREEDY) for b in (tiny, backbone)]
            assert torch.equal(*answers)
    assert None in shapes
    assert any(s is not None for s in shapes)


def test_rows_of_equal_length_that_part_ways(tiny, tiny_eager):
    """No padding at first, so that transformers makes no mask: images of different sizes, texts that even it out."""
    conversations = [user(draw_image(140, 112), "?" * 11), user(draw_image(168, 140), "?")]  # 20 + 11 and 30 + 1
    for backbone in (tiny, tiny_eager):
        inputs = inputs_for(backbone, conversations)
        assert bool(inputs["attention_mask"].all())
        out = backbone.prefill(inputs, build("fastv"), 0.5)
        together = backbone.generate(inputs, build("fastv"), 0.5, **GREEDY)
        assert out.attention_mask.sum(1).tolist() == [out.layer_lengths[-1], out.layer_lengths[-1] - 5]
        for row, conversation in enumerate(conversations):
            single = inputs_for(backbone, [conversation])
            alone = backbone.prefill(single, build("fastv"), 0.5)
            assert torch.equal(alone.kept[0], out.kept[row])
            assert same_tensor(alone.logits[0], out.logits[row], 1e-3)
            answer = backbone.generate(single, build("fastv"), 0.5, **GREEDY)
            assert torch.equal(answer[0], together[row, : answer.shape[1]])


def test_the_view_agrees_with_the_maps_that_eager_attention_writes_out(tiny_eager):
    """Received attention of both layers in reach, for some queries and all, chunked or not."""
    from visionselector_eval.models import decoder_view

    seen = {}

    @dataclass(frozen=True, kw_only=True)
    class Looks(EveryOther):
        name = "looks"
        needs = frozenset({"previous"})

        def keep(self, view, members, count):
            some = torch.tensor([len(view.hidden) - 1, 5])
            for layer in (view.layer - 1, view.layer):
                seen[layer] = [view.received(layer, some), view.received(layer), view.keys(layer)]
            with pytest.raises(InputError, match="can't be read"):
                view.received(view.layer + 1)
            seen["final"] = view.final_norm(view.hidden)
            return super().keep(view, members, count)

    inputs = inputs_for(tiny_eager, [user(draw_image(140, 112), "What?"), user(clip(2), "A longer one?")][:1])
    hand = ByHand(tiny_eager, inputs, 0)
    tables = hand.core.rotary_emb(hand.embeds, hand.positions)
    hidden, maps = hand.embeds, []
    with torch.no_grad():
        for block in hand.core.layers[:3]:
            maps.append(hand.attention(block, block.input_layernorm(hidden), tables))
            before, hidden = (
                hidden,
                block(
                    hidden,
                    attention_mask=torch.full((hidden.shape[1],) * 2, torch.finfo(torch.float32).min).triu(1)[
                        None, None
                    ],
                    position_embeddings=tables,
                ),
            )
    for chunk in (1 << 24, 300):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(decoder_view, "_CHUNK_WEIGHTS", chunk)
            tiny_eager.prefill(inputs, Looks(at=(2,)), 0.3)
        for layer in (1, 2):
            some, everything, keys = seen[layer]
            assert same_tensor(some, maps[layer][[-1, 5]].mean(0), 1e-6)
            assert same_tensor(everything, maps[layer].mean(0), 1e-6)
            assert keys.shape == (hand.size, 64)
        assert same_tensor(seen["final"], hand.core.norm(before)[0], 1e-6)


# Dynamic-Qwen ---------------------------------------------------------------------------------------------------------

DYNAMIC = DynamicQwen(predictor=tiny_predictor())


@pytest.mark.parametrize("case", PROMPTS)
def test_dynamic_qwen_keeps_the_budget_and_is_the_stock_model_at_one(case, tiny):
    inputs = inputs_for(tiny, PROMPTS[case]())
    items = [[item.features.shape[0] for item in r] for r in tiny.encode(inputs, frozenset()).rows]
    for budget in (0.01, 0.3, 0.99, Tokens(7)):
        share = budget if isinstance(budget, Tokens) else Share(budget)
        out = tiny.prefill(inputs, DYNAMIC, budget)
        assert [len(kept) for kept in out.kept] == [sum(share.count(n) for n in sizes) for sizes in items]
    stock = tiny.generate(inputs, build("full"), **GREEDY)
    assert torch.equal(tiny.generate(inputs, DYNAMIC, 1.0, **GREEDY), stock)
    assert hooks_of(tiny) == []


def test_dynamic_qwen_upstream_counts_the_whole_prompt(tiny):
    inputs = inputs_for(tiny, PROMPTS["two images"]())
    total = inputs["input_ids"].shape[1]
    method = DynamicQwen(predictor=tiny_predictor(), upstream_exact=True)
    assert [len(tiny.prefill(inputs, method, r).kept[0]) for r in (0.2, 0.9)] == [int(0.2 * total), 100]
    assert len(tiny.prefill(inputs, method, Tokens(9)).kept[0]) == 9


def test_dynamic_qwen_in_a_batch_and_in_bfloat16(tiny):
    conversations = PROMPTS["batch of three"]() + PROMPTS["batch with video"]()
    together = tiny.prefill(inputs_for(tiny, conversations), DYNAMIC, 0.3)
    for b, conversation in enumerate(conversations):
        alone = tiny.prefill(inputs_for(tiny, [conversation]), DYNAMIC, 0.3)
        assert torch.equal(together.kept[b], alone.kept[0])
        assert same_tensor(together.logits[b], alone.logits[0], 1e-3)
    half = load_backbone("tiny", dtype="bfloat16").prefill(inputs_for(tiny, conversations), DYNAMIC, 0.3)
    assert bool(torch.isfinite(half.logits).all())


def written(folder, predictor, names=lambda name: name, prefix="model.image_score_predictor."):
    """The embedded checkpoint with this predictor beside the backbone instead of its own."""
    shutil.copytree(checkpoint(), folder)
    weights = folder / "model.safetensors"
    kept = {name: tensor for name, tensor in load_file(weights).items() if "image_score_predictor" not in name}
    extra = {prefix + names(name): tensor.contiguous() for name, tensor in predictor.state_dict().items()}
    save_file({**kept, **extra}, weights, metadata={"format": "pt"})
    return folder


def test_dynamic_qwen_takes_its_weights_from_the_checkpoint_a_file_or_a_folder(tiny, tmp_path, caplog):
    inputs = inputs_for(tiny, PROMPTS["one image"]())
    wanted = tiny.prefill(inputs, DYNAMIC, 0.3).kept[0]
    folder = written(tmp_path / "both", tiny_predictor())
    backbone = load_backbone(folder)
    assert "has no place for" not in caplog.text
    assert torch.equal(backbone.prefill(inputs, DynamicQwen(), 0.3).kept[0], wanted)
    own = tmp_path / "own"
    own.mkdir()
    save_file(tiny_predictor().state_dict(), own / "predictor.safetensors")
    for source in (folder, own, own / "predictor.safetensors"):
        method = DynamicQwen(predictor=source)
        assert torch.equal(tiny.prefill(inputs, method, 0.3).kept[0], wanted)
        assert method.fingerprint() == DYNAMIC.fingerprint()
    assert DynamicQwen().fingerprint() == ""


def test_dynamic_qwen_says_what_its_weights_lack(tiny, tmp_path):
    inputs = inputs_for(tiny, PROMPTS["one image"]())
    empty = tmp_path / "empty"
    empty.mkdir()
    torn = tmp_path / "torn.safetensors"
    torn.write_bytes(b"torn")
    for method, says in (
        (DynamicQwen(predictor=Predictor(24, 16)), f"has width 24 but backbone tiny has {WIDTH}"),
        (DynamicQwen(predictor=str(tmp_path / "nowhere")), "does not exist"),
        (DynamicQwen(predictor=str(empty)), "holds no .safetensors or .bin file"),
        (DynamicQwen(predictor="nobody/nothing"), "the hub gives none of that id"),
        (DynamicQwen(predictor=str(torn)), "cannot read torn.safetensors"),
        (DynamicQwen(predictor=tiny_predictor(), layer=DEPTH), f"give layers from 1 to {DEPTH - 1}"),
    ):
        with pytest.raises(InputError, match=says) as error:
            tiny.prefill(inputs, method, 0.3)
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="needs predictor weights: checkpoint org/stock has no image_score_predictor"):
        DynamicQwen().bind(Host(id="org/stock", width=WIDTH, depth=DEPTH, extra_weights={"visual.x": torch.zeros(1)}))
    for options in ({"predictor": ""}, {"predictor": 3}, {"layer": 0}):
        with pytest.raises(InputError, match=next(iter(options))):
            DynamicQwen(**options)


RELEASED = {
    "in_norm": "down_mlp.0", "in_proj": "down_mlp.1", "attention_norm": "norm1", "mlp_norm": "norm2",
    "qkv": "attn.qkv", "out": "attn.proj", "up": "mlp.fc1", "down": "mlp.fc2",
    "head.0": "output_mlp.0", "head.1": "output_mlp.2", "head.2": "output_mlp.4",
}  # fmt: skip


def released(name):
    module, _, part = name.rpartition(".")
    if module.startswith("blocks."):
        _, number, inner = module.split(".")
        return f"transformer.{number}.{RELEASED[inner]}.{part}"
    return f"{RELEASED[module]}.{part}"


def test_a_predictor_whose_weights_change_is_copied_anew():
    predictor = tiny_predictor()
    method = DynamicQwen(predictor=predictor)
    elsewhere = torch.device("meta")
    first = method.module_on(elsewhere)
    assert method.module_on(elsewhere) is first
    next(predictor.parameters()).mul_(2)
    assert method.module_on(elsewhere) is not first
    assert method.module_on(torch.device("cpu")) is predictor


def released_state(predictor, prefix="model.image_score_predictor."):
    return {prefix + released(name): tensor for name, tensor in predictor.state_dict().items()}


@pytest.mark.parametrize(
    "sizes",
    [{}, {"blocks": 11}, {"bias": False}, {"inner": 24}, {"inner": 64}, {"hidden": 64}, {"hidden": 64, "inner": 80}],
    ids=str,
)
@pytest.mark.parametrize("prefix", ["model.image_score_predictor.", "image_score_predictor.", ""])
def test_a_published_predictor_is_read_by_its_names(prefix, sizes):
    """Whatever its sizes: an inner size equal to the LLM's width, and a hidden size equal to it, too."""
    predictor = tiny_predictor(1, **sizes)
    state = released_state(predictor, prefix)
    assert f"{prefix}transformer.0.attn.qkv.weight" in state
    assert f"{prefix}transformer.0.attn.qkv.bias" not in state
    read = Predictor.from_state(dict(reversed(state.items())))
    states = torch.randn(9, WIDTH)
    assert torch.equal(read(states), predictor(states))


@pytest.mark.parametrize("ending", ["safetensors", "bin", "shards"])
def test_a_published_predictor_is_found_in_a_checkpoints_files(tmp_path, ending):
    predictor = tiny_predictor(3)
    state = {**released_state(predictor), "model.norm.weight": torch.ones(4)}
    if ending == "bin":
        torch.save(state, tmp_path / "pytorch_model.bin")
    elif ending == "safetensors":
        save_file(state, tmp_path / "anything.safetensors")
    else:
        names = sorted(state)
        files = {name: f"model-{1 + (number % 2)}.safetensors" for number, name in enumerate(names)}
        for file in set(files.values()):
            save_file({name: state[name] for name in names if files[name] == file}, tmp_path / file)
        (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))
    states = torch.randn(9, WIDTH)
    assert torch.equal(load_predictor(str(tmp_path))(states), predictor(states))


def test_unknown_and_contradictory_predictors_are_one_line():
    state = released_state(tiny_predictor(3))
    for change, says in (
        ({"model.image_score_predictor.gate.weight": torch.ones(3)}, r"predictor\.gate\.weight is unknown"),
        ({"model.image_score_predictor.transformer.0.attn.q.weight": torch.ones(3)}, "attn.q.weight is unknown"),
        ({"module.image_score_predictor.output_mlp.4.bias": torch.ones(2)}, "several predictors that differ"),
    ):
        with pytest.raises(InputError, match=says) as error:
            Predictor.from_state({**state, **change}, "here")
        assert "\n" not in str(error.value)


@pytest.mark.parametrize("broken", ["in_proj.weight", "head.2.weight", "blocks.1.qkv.weight", "blocks.0.mlp_norm.bias"])
def test_a_broken_predictor_is_one_clear_line(broken):
    state = dict(tiny_predictor().state_dict())
    for published in (False, True):
        left = {released(n) if published else n: t for n, t in state.items() if n != broken}
        with pytest.raises(InputError, match="predictor tensor") as error:
            Predictor.from_state(left, "here")
        assert "\n" not in str(error.value)
    with pytest.raises(InputError, match="does not exist"):
        load_predictor("./nowhere")


# Two in a row ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", PROMPTS)
@pytest.mark.parametrize(
    "name", ["divprune+fastv", "visionselector+pyramiddrop", "visionzip+sparsevlm", "uniform+dart", "holov+divprune"]
)
def test_two_methods_share_one_budget(name, case, tiny):
    inputs = inputs_for(tiny, PROMPTS[case]())
    items = [[item.features.shape[0] for item in r] for r in tiny.encode(inputs, frozenset()).rows]
    for budget in (0.01, 0.25, 0.9, Tokens(5)):
        share = budget if isinstance(budget, Tokens) else Share(budget)
        out = tiny.prefill(inputs, build(name), budget)
        assert [len(kept) for kept in out.kept] == [sum(share.count(n) for n in sizes) for sizes in items]
        for kept, total in zip(out.kept, out.totals, strict=True):
            assert bool((kept.diff() > 0).all())
            assert not len(kept) or 0 <= int(kept[0]) <= int(kept[-1]) < total
    stock = tiny.generate(inputs, build("full"), **GREEDY)
    assert torch.equal(tiny.generate(inputs, build(name), 1.0, **GREEDY), stock)
    assert hooks_of(tiny) == []


def test_the_split_says_what_the_first_method_leaves(tiny):
    inputs = inputs_for(tiny, PROMPTS["one image"]())  # 80 visual tokens
    text = inputs["input_ids"].shape[1] - 80
    for split, between in ((0.5, 40), (0.25, 56), (0.75, 28)):
        out = tiny.prefill(inputs, build("divprune+fastv", split=split), 0.25)
        assert [n - text for n in out.layer_lengths] == [between, between, *[20] * (DEPTH - 2)]
        assert out.layer_tokens == pytest.approx([(2 * between + 20 * (DEPTH - 2)) / DEPTH])
    first = tiny.prefill(inputs, build("divprune"), 0.5).kept[0]
    assert bool(torch.isin(tiny.prefill(inputs, build("divprune+fastv"), 0.25).kept[0], first).all())


def test_a_chain_is_built_from_its_parts():
    method = build("random+fastv", split=0.3, upstream_exact=True, **{"random.seed": 7, "fastv.rows": "all"})
    assert method.name == "random+fastv"
    assert (method.first.seed, method.second.rows, method.split) == (7, "all", 0.3)
    assert method.first.upstream_exact
    assert method.second.upstream_exact
    assert hash(method) == hash(dataclasses.replace(method))
    assert list(resolve_options("uniform+fastv", {})) == ["upstream_exact", "split", "fastv.layer", "fastv.rows"]
    assert build("divprune+fastv").fingerprint() == ""
    assert build("divprune+fastv").stage == "decoder"
    assert build("divprune+uniform").stage == "projector"


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("divprun+fastv", {}, "did you mean 'divprune'"),
        ("divprune+fast", {}, "did you mean 'fastv'"),
        ("divprune+fastv", {"fastv.layr": 3}, "did you mean 'fastv.layer'"),
        ("divprune+fastv", {"fastv.layer": "3"}, "wrong type"),
        ("divprune+fastv", {"layer": 3}, "unknown option of method divprune\\+fastv 'layer'"),
        ("divprune+fastv", {"split": 1.0}, "give 0 < split < 1"),
        ("fastv+divprune", {}, "did you mean 'divprune\\+fastv'"),
        ("fastv+pyramiddrop", {}, "must act before the LLM"),
        ("downsample+fastv", {}, "must act before the LLM"),
        ("divprune+downsample", {}, "can't follow another"),
        ("divprune+", {}, "expected one name, or two different ones"),
        ("divprune+divprune", {}, "expected one name, or two different ones"),
        ("a+b+c", {}, "expected one name, or two different ones"),
    ],
)
def test_a_chain_that_cannot_be_is_one_clear_line(name, options, says):
    with pytest.raises(InputError, match=says) as error:
        build(name, **options)
    assert "\n" not in str(error.value)


def test_answers_report_what_entered_the_layers(tiny):
    conversations = PROMPTS["batch of three"]()
    requests = [Request(f"{i}", lambda c=c: c, {"max_new_tokens": 3}) for i, c in enumerate(conversations)]
    settings = [
        CompressorAtBudget(tiny.bind(build(name)), parse_budget(0.25))
        for name in ("fastv", "divprune", "divprune+fastv")
    ]
    answerer = Answerer(tiny)
    batch = answerer.prepare(requests, settings)
    fastv, divprune, both = (answerer.answer(batch, setting) for setting in settings)
    counts = [20, 5 + 4, 0]

    def mean(first, later):  # two layers see `first` tokens, the others `later`
        return pytest.approx((2 * first + (DEPTH - 2) * later) / DEPTH)

    for answers in (fastv, divprune, both):
        assert [a.kept_tokens for a in answers] == counts
        assert [a.total_tokens for a in answers] == [80, 36, 0]
    assert [a.layer_tokens for a in fastv] == [mean(80, 20), mean(36, 9), 0]
    assert [a.layer_tokens for a in divprune] == counts
    assert [a.layer_tokens for a in both] == [mean(40, 20), mean(10 + 8, 9), 0]
    assert [a.prompt_tokens - a.total_tokens for a in fastv] == [a.prompt_tokens - a.kept_tokens for a in divprune]
