"""Features that enter behind deeper layers (DeepStack): the same tokens, the same weights, nothing once they are gone.

On the embedded checkpoint with planes that a fixed matrix makes of its features, against layers run by hand.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from battery import CANONICAL, PROMPTS, Row, draw_image, same_tensor, user

from visionselector_eval.baselines import InputError, Selection, build
from visionselector_eval.baselines.contract.base import Compressor
from visionselector_eval.baselines.contract.decoder import DecoderCompressor
from visionselector_eval.models import load_backbone
from visionselector_eval.models.backbones.qwen2_5_vl import Qwen2_5_VL
from visionselector_eval.models.inputs import MediaSettings, build_inputs
from visionselector_eval.models.splice import Encoded
from visionselector_eval.models.training.data import IGNORED
from visionselector_eval.models.training.learners import PredictorLearner, SelectorLearner
from visionselector_eval.models.training.spec import PredictorSpec, SelectorSpec
from visionselector_eval.models.visionselector.training import gate

PLANES = 3
INSIDE = [row for row in CANONICAL if build(row.name).stage == "decoder"]
BEFORE = [row for row in CANONICAL if build(row.name).stage == "projector" and row.name not in ("full",)]
BEFORE += [Row("fusion2x2", {"weights": "sim"}, merges=True), Row("visionzip", {"upstream_exact": True}, merges=True)]


class Deep(Qwen2_5_VL):
    """Qwen2.5-VL with planes: what Qwen3-VL's tower gives, here a fixed function of each token's features."""

    def encode(self, inputs: Any, needs: Any = frozenset()) -> Encoded:
        encoded = super().encode(inputs, needs)
        for items in encoded.rows:
            for item in items:
                item.planes = tuple(plane_of(item.features, p) for p in range(PLANES))
        return encoded


def plane_of(features: torch.Tensor, p: int) -> torch.Tensor:
    draw = torch.Generator().manual_seed(p)
    matrix = torch.randn(features.shape[1], features.shape[1], generator=draw, dtype=torch.float64)
    return (torch.sin(features.double() @ matrix) * 0.3).to(features.dtype)


@pytest.fixture(scope="module")
def deep() -> Deep:
    plain = load_backbone("tiny", attn_implementation="eager")
    return Deep(plain.model, plain.processor, id="deep", revision="0", extra_weights=plain.host.extra_weights)


def inputs_for(backbone: Any, prompts: Any) -> dict[str, Any]:
    return backbone.to_device(build_inputs(backbone.processor, prompts, MediaSettings()))


@torch.no_grad()
def by_hand(backbone: Any, embeds: torch.Tensor, positions: torch.Tensor, tokens: Any) -> torch.Tensor:
    """(D,) state of the last token behind the final norm. `tokens`: for each layer the places that stay at its input,
    those of visual tokens in it, and the rows that are added behind it."""
    core = backbone.model.model.language_model
    hidden, places = embeds[None], torch.arange(len(embeds))
    for layer, block in enumerate(core.layers):
        stay, visual, rows = tokens(layer)
        hidden, places = hidden[:, torch.isin(places, stay)], stay
        tables = core.rotary_emb(hidden, positions[:, None, places])
        mask = torch.full((hidden.shape[1],) * 2, torch.finfo(torch.float32).min).triu(1)[None, None]
        hidden = block(hidden, attention_mask=mask, position_embeddings=tables)
        if rows is not None:
            hidden[0, torch.searchsorted(places, visual)] += rows
    return core.norm(hidden)[0, -1]


def unpadded(prompt: Any, row: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    real = prompt.attention_mask[row].bool()
    visual = prompt.visual[row, real].nonzero().squeeze(1)
    return prompt.embeds[row, real], prompt.position_ids[:, row, real], visual


@pytest.mark.parametrize("row", [Row("full"), *BEFORE], ids=str)
def test_kept_and_merged_tokens_bring_their_planes(deep: Deep, row: Row) -> None:
    """The planes of a merged token are merged by the weights of its features; two images and a row of plain text."""
    prompts = [user(draw_image(224, 280), "and", draw_image(140, 112, 1), "What is it?"), user("Just text.")]
    inputs, method, budget = inputs_for(deep, prompts), row.build(), 1.0 if row.name == "full" else 0.3
    compressed = deep.compress(inputs, method, budget)
    out = deep.run_llm(compressed)
    embeds, positions, visual = unpadded(compressed, 0)

    encoded = deep.encode(inputs, deep.bind(method).needs)
    kept = compressed.kept[0]
    whole = [torch.cat([item.planes[p] for item in encoded.rows[0]]) for p in range(PLANES)]
    if not row.merges:
        rows = [plane[kept] for plane in whole]
    else:
        from visionselector_eval.models.splice import _scopes, select

        text = deep.prompt(inputs, ["a", "b"])
        bound = deep.bind(method)
        words = text.embeds[0][text.question[0]] if "text" in bound.needs else None
        weights = []
        for scope in _scopes(encoded.rows[0], bound, words, "a"):
            chosen = select(scope, bound, compressed_budget(budget))
            n = len(scope.features)
            matrix = chosen.follow(torch.eye(n, dtype=torch.float64), row.name)
            assert same_tensor(matrix @ scope.features.double(), chosen.features.double(), 1e-4)
            weights.append(matrix)
        rows = [(torch.block_diag(*weights) @ plane.double()).to(plane.dtype) for plane in whole]
    for p in range(PLANES):
        assert same_tensor(compressed.planes[p][0], rows[p], 1e-5)
        assert compressed.planes[p][1].shape == (0, deep.width)
    everything = torch.arange(len(embeds))
    expected = by_hand(
        deep, embeds, positions, lambda layer: (everything, visual, rows[layer] if layer < PLANES else None)
    )
    assert same_tensor(out.hidden[0, -1], expected, 2e-4)


def compressed_budget(value: float) -> Any:
    from visionselector_eval.baselines import parse_budget

    return parse_budget(value)


@pytest.mark.parametrize("row", INSIDE, ids=str)
def test_a_drop_inside_the_llm_takes_the_planes_that_are_still_to_come(deep: Deep, row: Row) -> None:
    inputs = inputs_for(deep, PROMPTS["one image"]())
    method = build(row.name, **({"layer": 1} if row.name == "fastv" else {}))
    compressed = deep.compress(inputs, method, 0.3)
    out = deep.run_llm(compressed)
    full = deep.compress(inputs, build("full"))
    plain = load_backbone("tiny", attn_implementation="eager").prefill(inputs, method, 0.3)
    assert out.layer_lengths == plain.layer_lengths
    if row.merges:
        return  # its states are the method's own: the next test has the arithmetic
    embeds, positions, visual = unpadded(full, 0)
    text = torch.arange(len(embeds))[~torch.isin(torch.arange(len(embeds)), visual)]

    alive = {}
    pruning_layers = method.layers(deep.depth)
    order = out.kept[0]
    if len(pruning_layers) == 1:
        for layer in range(deep.depth):
            alive[layer] = order if layer >= pruning_layers[0] else torch.arange(len(visual))

        def tokens(layer: int) -> Any:
            left = alive[layer]
            places = torch.cat([text, visual[left]]).sort().values
            rows = full.planes[layer][0][left] if layer < PLANES else None
            return places, visual[left], rows

        expected = by_hand(deep, embeds, positions, tokens)
        assert same_tensor(out.hidden[0, -1], expected, 2e-4)


@dataclass(frozen=True, kw_only=True)
class Pairs(DecoderCompressor):
    """Merges neighbours into their mean at the input of layer 1."""

    name = "pairs"
    says_how: bool = True

    def layers(self, depth: int) -> tuple[int, ...]:
        return (1,)

    def counts(self, n: int, budget: Any, depth: int, total: int) -> tuple[int, ...]:
        return (n // 2,)

    def keep(self, view: Any, members: torch.Tensor, count: int) -> Selection:
        def merge(rows: torch.Tensor) -> torch.Tensor:
            return rows.view(count, 2, -1).mean(1)

        states = view.hidden[view.visual[members]]
        kept = torch.arange(0, 2 * count, 2)
        return Selection(kept=kept, features=merge(states), merge=merge if self.says_how else None)


def test_what_a_method_merges_inside_the_llm_is_merged_in_the_planes_still_to_come(deep: Deep) -> None:
    inputs = inputs_for(deep, PROMPTS["one image"]())
    full = deep.compress(inputs, build("full"))
    embeds, positions, visual = unpadded(full, 0)
    n = len(visual)
    out = deep.prefill(inputs, Pairs(), 0.5)
    assert out.kept[0].tolist() == list(range(0, n, 2))

    core = deep.model.model.language_model
    with torch.no_grad():
        hidden, places = embeds[None], torch.arange(len(embeds))
        for layer, block in enumerate(core.layers):
            if layer == 1:
                means = hidden[0, visual].view(n // 2, 2, -1).mean(1)
                stay = torch.ones(len(embeds), dtype=torch.bool)
                stay[visual[1::2]] = False
                hidden[0, visual[::2]] = means
                hidden, places = hidden[:, stay], places[stay]
            tables = core.rotary_emb(hidden, positions[:, None, places])
            mask = torch.full((hidden.shape[1],) * 2, torch.finfo(torch.float32).min).triu(1)[None, None]
            hidden = block(hidden, attention_mask=mask, position_embeddings=tables)
            if layer < PLANES:
                rows = full.planes[layer][0]
                at = visual if layer == 0 else visual[::2]
                hidden[0, torch.searchsorted(places, at.contiguous())] += (
                    rows if layer == 0 else rows.view(n // 2, 2, -1).mean(1)
                )
        assert same_tensor(out.hidden[0, -1], core.norm(hidden)[0, -1], 2e-4)


@dataclass(frozen=True, kw_only=True)
class Secretive(Compressor):
    """Changes what it keeps and does not say how."""

    name = "secretive"

    def compress(self, tokens: Any, count: int) -> Selection:
        return Selection(kept=torch.arange(count), features=-tokens.features[:count])


SILENT = [Secretive(), Pairs(says_how=False), build("fusion2x2", restore_norm=True)]


@pytest.mark.parametrize("method", SILENT, ids=lambda m: m.name)
def test_merging_that_can_not_be_followed_is_refused_in_one_line(deep: Deep, tiny: Any, method: Any) -> None:
    inputs = inputs_for(deep, PROMPTS["one image"]())
    assert tiny.prefill(inputs, method, 0.5).kept  # without planes nothing is missing
    with pytest.raises(InputError, match=f"method '{method.name}' merges tokens without saying how") as error:
        deep.prefill(inputs, method, 0.5)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["full", "divprune", "visionzip", "fastv", "sparsevlm", "divprune+fastv"])
def test_a_batch_equals_single_runs_and_generate_follows_prefill(deep: Deep, name: str) -> None:
    prompts, method, budget = PROMPTS["batch of three"](), build(name), 1.0 if name == "full" else 0.4
    together = deep.prefill(inputs_for(deep, prompts), method, budget, keys=["a", "b", "c"])
    answers = deep.generate(inputs_for(deep, prompts), method, budget, keys=["a", "b", "c"], max_new_tokens=2)
    for row, prompt in enumerate(prompts):
        alone = deep.prefill(inputs_for(deep, [prompt]), method, budget, keys=["abc"[row]])
        assert torch.equal(alone.kept[0], together.kept[row])
        assert same_tensor(alone.logits[0], together.logits[row], 1e-3)
        assert answers[row, 0] == together.logits[row].argmax()
    hooks = [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in deep.model.modules()]
    assert not any(hooks)


def test_beams_see_the_planes_of_their_prompt(deep: Deep) -> None:
    inputs = inputs_for(deep, PROMPTS["batch of three"]())
    beams = deep.generate(inputs, build("full"), max_new_tokens=1, num_beams=2, do_sample=False)
    greedy = deep.generate(inputs, build("full"), max_new_tokens=1, do_sample=False)
    assert torch.equal(beams[:, 0], greedy[:, 0])


def test_planes_matter(deep: Deep) -> None:
    """Without them the answer would be another: the tests above compare something."""
    inputs = inputs_for(deep, PROMPTS["one image"]())
    compressed = deep.compress(inputs, build("divprune"), 0.3)
    without = deep.run_llm(replace(compressed, planes=()))
    assert not same_tensor(deep.run_llm(compressed).logits, without.logits, 1e-2)


def test_down_sampled_images_bring_their_own_planes(deep: Deep) -> None:
    inputs = inputs_for(deep, PROMPTS["one image"]())
    compressed = deep.compress(inputs, build("downsample"), 0.3)
    (plane,) = compressed.planes[0]
    features = compressed.embeds[0, compressed.visual[0]]
    assert len(plane) == len(compressed.kept[0]) < compressed.totals[0]
    assert same_tensor(plane, plane_of(features, 0), 1e-6)


# generation -----------------------------------------------------------------------------------------------------------


def test_without_a_cache_the_prompt_is_read_again_with_its_planes(deep: Deep) -> None:
    inputs = inputs_for(deep, PROMPTS["batch of three"]())
    for method in (build("full"), build("visionzip")):
        budget = 1.0 if method.name == "full" else 0.4
        cached = deep.generate(inputs, method, budget, max_new_tokens=4, do_sample=False)
        assert torch.equal(
            deep.generate(inputs, method, budget, max_new_tokens=4, do_sample=False, use_cache=False), cached
        )


def test_a_prompt_in_pieces_is_refused_in_one_line(deep: Deep) -> None:
    compressed = deep.compress(inputs_for(deep, PROMPTS["one image"]()), build("full"))
    with deep.hooked(compressed), pytest.raises(InputError, match="layer 0 got 8 of a prompt's") as error:
        deep.model.model.language_model(inputs_embeds=compressed.embeds[:, :8], use_cache=False)
    assert "\n" not in str(error.value)


# training -------------------------------------------------------------------------------------------------------------


def scorer_spec(**fields: Any) -> SelectorSpec:
    common = {"data": ["unused"], "output": "unused", "device": "cpu", "report_to": "none", "batch_size": 3}
    return SelectorSpec.make({**common, "budget": 0.5, "lambda_start": 0.0, "init_std": 0.3, **fields})


def conversation(deep: Deep, labelled: int = 4) -> dict[str, Any]:
    """A batch of three whose last tokens are answers."""
    inputs = inputs_for(deep, PROMPTS["batch of three"]())
    labels = torch.full_like(inputs["input_ids"], IGNORED)
    labels[:, -labelled:] = inputs["input_ids"][:, -labelled:]
    return {**inputs, "labels": labels, "places": ["a", "b", "c"]}


@torch.no_grad()
def expected_loss(deep: Deep, batch: dict[str, Any], masks: list[torch.Tensor]) -> torch.Tensor:
    """The loss of an LLM that sees features and planes of each prompt times (N,) `masks`, by its own arguments."""
    full = deep.compress({k: v for k, v in batch.items() if k not in ("labels", "places")}, build("full"))
    embeds = full.embeds.clone()
    embeds[full.visual] *= torch.cat(masks)[:, None]
    total, number = torch.zeros(()), 0
    for row in range(len(masks)):
        scaled = [plane[row] * masks[row][:, None] for plane in full.planes]
        states, positions, visual = unpadded(replace(full, embeds=embeds), row)
        everything = torch.arange(len(states))

        def tokens(layer: int, scaled: Any = scaled, visual: Any = visual, everything: Any = everything) -> Any:
            return everything, visual, scaled[layer] if layer < PLANES else None

        for back in range(4, 0, -1):  # the state before each answer token predicts it
            cut = len(states) - back
            last = by_hand(
                deep, states[:cut], positions[:, :cut], lambda layer, t=tokens, c=cut: everything_to(t, layer, c)
            )
            target = batch["labels"][row, -back]
            total = total + torch.nn.functional.cross_entropy(deep.model.lm_head(last)[None], target[None])
            number += 1
    return total / number


def everything_to(tokens: Any, layer: int, cut: int) -> Any:
    stay, visual, rows = tokens(layer)
    return stay[:cut], visual, rows


@pytest.mark.parametrize("exact", [False, True])
def test_a_scorer_learns_beside_an_llm_that_sees_the_planes(exact: bool) -> None:
    """Gates scale a token wherever it enters, and gradients reach the scorer through every layer."""
    plain = load_backbone("tiny", attn_implementation="eager")
    backbone = Deep(plain.model, plain.processor, id="deep", revision="0", extra_weights=plain.host.extra_weights)
    batch = conversation(backbone)
    learner = SelectorLearner.build(backbone, scorer_spec(upstream_exact=exact))
    features = [[item.features for item in row] for row in backbone.encode(batch).rows]
    scopes = [item for row in features for item in row]
    scopes = [torch.cat(scopes)] if exact else scopes
    mask = gate(scopes, [len(scope) // 2 for scope in scopes], learner.learned).mask.detach()
    assert mask.min() < 0.45 < 0.55 < mask.max()
    masks = list(mask.split([sum(len(item) for item in row) for row in features]))
    outcome = learner(batch, 0, 10)
    assert same_tensor(outcome.parts["loss_language"], expected_loss(backbone, batch, masks), 2e-4)

    outcome.loss.backward()
    weight = learner.learned.q_proj.weight
    at = divmod(int(weight.grad.abs().argmax()), weight.shape[1])
    losses = []
    with torch.no_grad():
        for step in (1e-2, -2e-2):
            weight[at] += step
            losses.append(float(learner(batch, 0, 10).loss))
    assert (losses[0] - losses[1]) / 2e-2 == pytest.approx(float(weight.grad[at]), rel=0.1, abs=1e-5)


def test_a_predictor_learns_beside_an_llm_that_sees_the_planes() -> None:
    plain = load_backbone("tiny", attn_implementation="eager")
    backbone = Deep(plain.model, plain.processor, id="deep", revision="0", extra_weights=plain.host.extra_weights)
    batch = conversation(backbone)
    fields = scorer_spec().model_dump(include={"data", "output", "device", "report_to", "batch_size", "budget"})
    learner = PredictorLearner.build(backbone, PredictorSpec.make({**fields, "hidden": 16, "blocks": 1}))
    with torch.no_grad():
        learner.learned.head[-1].weight.zero_()
        learner.learned.head[-1].bias.copy_(torch.tensor([60.0, -60.0]))  # all are kept
    everything = [torch.ones(n) for n in backbone.visual_totals(batch)]
    outcome = learner(batch, 0, 10)
    assert outcome.parts["kept_share"] == 1
    assert same_tensor(outcome.parts["loss_language"], expected_loss(backbone, batch, everything), 1e-3)
