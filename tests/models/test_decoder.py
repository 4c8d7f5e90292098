"""Dropping tokens inside the LLM: the hooked run against one written out layer by layer, without cache and hooks."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from battery import PROMPTS, clip, picture, same_tensor, user

from visionselector_eval.baselines import InputError, Tokens, build
from visionselector_eval.baselines.base import DecoderCompressor, ScoreDecoder, Selection, Share
from visionselector_eval.models import load_backbone
from visionselector_eval.models.inputs import MediaSettings, build_inputs

GREEDY = {"max_new_tokens": 5, "do_sample": False, "repetition_penalty": 1.0}
DEPTH = 4


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
    def run(self, method=None, budget=None, answer=(), sets=None):
        """States after the final norm, and the places in each layer; `sets` says the places, else `method` does."""
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
    assert [layer.get_seq_length() for layer in output.past_key_values.layers] == [n + 3 for n in lengths]
    assert lengths == sorted(lengths, reverse=True)
    assert len(set(lengths)) == DEPTH


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


@pytest.mark.parametrize("at", [(), (0,), (0, 2), (2, 1), (2, 2), (4,), (-1,)])
def test_layers_outside_the_llm_are_refused(tiny, at):
    with pytest.raises(InputError, match="give layers from 1 to 3"):
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
    """No chat template makes such a prompt, but a hand-made one may end in its picture."""
    inputs = inputs_for(tiny, [user("What is it?", picture(140, 112))])
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
    two = [user(picture(140, 112), "A?"), user(picture(140, 112, 1), "B?")]
    mixed = [user(picture(140, 112), "What is it, then?"), user(picture(168, 140), "?")]
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
    """No padding at first, so that transformers makes no mask: pictures of different sizes, texts that even it out."""
    conversations = [user(picture(140, 112), "?" * 11), user(picture(168, 140), "?")]  # 20 + 11 and 30 + 1
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
    from visionselector_eval.models import decoder_pruning

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

    inputs = inputs_for(tiny_eager, [user(picture(140, 112), "What?"), user(clip(2), "A longer one?")][:1])
    hand = ByHand(tiny_eager, inputs, 0)
    tables = hand.core.rotary_emb(hand.embeds, hand.positions)
    hidden, maps = hand.embeds, []
    with torch.no_grad():
        for block in hand.core.layers[:3]:
            maps.append(hand.attention(block, block.input_layernorm(hidden), tables))
            before, hidden = hidden, block(
                hidden,
                attention_mask=torch.full((hidden.shape[1],) * 2, torch.finfo(torch.float32).min).triu(1)[None, None],
                position_embeddings=tables,
            )
    for chunk in (1 << 24, 300):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(decoder_pruning, "_CHUNK_WEIGHTS", chunk)
            tiny_eager.prefill(inputs, Looks(at=(2,)), 0.3)
        for layer in (1, 2):
            some, everything, keys = seen[layer]
            assert same_tensor(some, maps[layer][[-1, 5]].mean(0), 1e-6)
            assert same_tensor(everything, maps[layer].mean(0), 1e-6)
            assert keys.shape == (hand.size, 32)
        assert same_tensor(seen["final"], hand.core.norm(before)[0], 1e-6)
