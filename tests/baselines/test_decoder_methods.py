"""Decoder-stage methods by themselves: golden vectors (float64), counts, layers and invariants."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from visionselector_eval.baselines import InputError, Tokens, build, sparsevlm
from visionselector_eval.baselines.contract.base import Host
from visionselector_eval.baselines.contract.budget import Share
from visionselector_eval.baselines.contract.decoder import DecoderView, shrinking
from visionselector_eval.baselines.contract.numerics import unit_rows
from visionselector_eval.baselines.dart import pick
from visionselector_eval.baselines.sparsevlm import cluster_means, density_peaks, merged_into, raters

i, j = torch.arange(16, dtype=torch.float64)[:, None], torch.arange(6, dtype=torch.float64)
X = torch.sin(0.37 * (i + 1) * (j + 1)) + 0.1 * torch.cos(1.7 * (i + 1))
Y = torch.cos(0.53 * (i + 1) * (j + 1) + 0.2)


def test_dart_golden():
    kept = pick(Y.abs().sum(1), unit_rows(X), torch.arange(12), torch.arange(12, 16), 6, 2, 2)
    assert kept.tolist() == [1, 3, 4, 5, 10, 11]


def test_sparsevlm_raters_golden():
    p, q = torch.arange(5, dtype=torch.float64)[:, None], torch.arange(6, dtype=torch.float64)
    assert raters(X, torch.sin(0.3 * (p + 1) * (q + 1))).tolist() == [0, 2, 4]


def test_density_peaks_golden():
    centres, nearest = density_peaks(X, 3)
    merged = cluster_means(X, nearest, 3)
    assert centres.tolist() == [7, 8, 2]
    assert torch.allclose(merged[:, 0], torch.tensor([0.015784, -0.356371, 0.408207], dtype=torch.float64), atol=1e-6)


# Counts and layers ----------------------------------------------------------------------------------------------------


def test_pyramiddrop_has_the_published_schedule():
    method = build("pyramiddrop")
    assert method.layers(32) == (8, 16, 24)
    assert method.counts(576, Share(0.125), 32, 640) == (288, 144, 72)
    average = (8 * 576 + 8 * 288 + 8 * 144 + 8 * 72) / 32
    assert average / 576 == pytest.approx(0.469, abs=5e-4)


def test_sparsevlm_ranks_after_layers_2_6_and_15_of_32():
    assert build("sparsevlm").layers(32) == (3, 7, 16)
    assert build("sparsevlm").layers(28) == (3, 6, 14)
    assert build("sparsevlm").layers(36) == (3, 8, 18)
    assert build("sparsevlm").layers(4) == (1, 2, 3)


def test_published_counts():
    assert build("fastv", upstream_exact=True).count(100, Share(0.29)) == 28  # int(0.29 * 100)
    assert build("fastv").count(100, Share(0.29)) == 29
    assert build("dart", upstream_exact=True).count(576, Share(0.222)) == 4 + 8 * 15
    assert build("dart", upstream_exact=True).count(576, Share(0.001)) == 12
    assert build("dart").count(576, Share(0.222)) == 127
    first = 288 + merged_into(576 - 288)  # int(0.3 * 288) + 1 = 87 are looked at, merged into int(8.7) + 1
    second = 144 + merged_into(first - 144)
    assert first == 288 + 9
    assert build("sparsevlm", upstream_exact=True).counts(576, Share(0.125), 32, 640) == (
        first,
        second,
        72 + merged_into(second - 72),
    )


# For each published list: survivors of each stage, and what they are left with by its rule, written out by hand below.
LISTS = {
    192: ((300, 200, 110), (309, 204, 113)),
    128: ((303, 110, 36), (312, 117, 39)),
    96: ((238, 48, 26), (249, 55, 27)),
    64: ((66, 30, 17), (82, 32, 18)),
}


def merged_by_the_published_rule(pruned: int) -> int:
    """int(0.3 P) + 1 of P pruned tokens are looked at, and merged into int(M / 10) + 1."""
    return (3 * pruned // 10 + 1) // 10 + 1


@pytest.mark.parametrize("upstream_exact", [False, True])
@pytest.mark.parametrize("called", LISTS)
def test_sparsevlm_has_the_published_schedules(called, upstream_exact):
    method = build("sparsevlm", schedule="published", upstream_exact=upstream_exact)
    survivors, left = LISTS[called]
    present, expected = 576, []
    for kept in survivors:
        present = kept + merged_by_the_published_rule(present - kept)
        expected.append(present)
    assert tuple(expected) == left
    assert method.counts(576, Tokens(called), 32, 640) == left
    assert method.count(576, Tokens(called)) == left[-1]
    assert method.layers(32) == (3, 7, 16)
    assert method.bind(Host("llava", 4096, depth=32)) is method


@pytest.mark.parametrize(("called", "mean"), [(192, 206.5), (128, 145.4), (96, 114.1), (64, 82.25)])
def test_layer_means_of_the_published_schedules(called, mean):
    first, second, third = build("sparsevlm", schedule="published").counts(576, Tokens(called), 32, 640)
    assert (3 * 576 + 4 * first + 9 * second + 16 * third) / 32 == pytest.approx(mean, abs=0.05)


@pytest.fixture
def clusterings(monkeypatch):
    """(tokens looked at, clusters) of each merge."""
    seen = []

    def watched(states, clusters):
        seen.append((len(states), clusters))
        return density_peaks(states, clusters)

    monkeypatch.setattr(sparsevlm, "density_peaks", watched)
    return seen


@pytest.mark.parametrize("upstream_exact", [False, True])
@pytest.mark.parametrize("called", LISTS)
def test_sparsevlm_splits_published_counts_into_the_published_survivors(called, upstream_exact, clusterings):
    method = build("sparsevlm", schedule="published", upstream_exact=upstream_exact)
    survivors, left = LISTS[called]
    for layer, before, kept, count in zip((3, 7, 16), (576, *left), survivors, left, strict=False):
        view = Line(before, layer=layer)
        selection = method.keep(view, torch.arange(before), count)
        best = view.relation.sort(descending=True, stable=True).indices[:kept].tolist()
        assert set(best) <= set(selection.kept.tolist())
        at = torch.searchsorted(selection.kept, torch.tensor(best))
        assert torch.equal(selection.features[at], view.hidden[view.visual[best]])
        assert clusterings.pop() == (3 * (before - kept) // 10 + 1, count - kept)


def test_published_schedules_refuse_what_contradicts_them():
    published = build("sparsevlm", schedule="published")
    for budget in (Share(0.2), Tokens(100), Tokens(113)):
        for refuse in (published.check_budget, lambda b: published.counts(576, b, 32, 640)):
            with pytest.raises(
                InputError, match=r"contradicts schedule=published .*192tok, 128tok, 96tok and 64tok"
            ) as e:
                refuse(budget)
            assert "\n" not in str(e.value)
    with pytest.raises(InputError, match=r"is for 576 visual tokens, but an image or video has 1000"):
        published.counts(1000, Tokens(192), 32, 1100)
    with pytest.raises(InputError, match="all images of a prompt together has 1152"):
        build("sparsevlm", schedule="published", upstream_exact=True).counts(1152, Tokens(192), 32, 1200)
    with pytest.raises(InputError, match=r"is for an LLM of 32 layers, but this one has 28"):
        published.bind(Host("qwen", 3584, depth=28))
    with pytest.raises(InputError, match=r"budget 0.2 contradicts schedule=published .* give budget 0.125"):
        build("pyramiddrop", schedule="published").check_budget(Share(0.2))
    with pytest.raises(InputError, match=r"drops tokens at layers \(8, 16, 24\), but the LLM has 24 layers"):
        build("pyramiddrop", schedule="published").bind(Host("small", 8, depth=24))
    for method in (published, build("pyramiddrop", schedule="published"), build("sparsevlm")):
        method.check_budget(Share(1.0))
    for method in (build("sparsevlm"), build("pyramiddrop")):
        for budget in (Share(0.3), Tokens(192)):
            method.check_budget(budget)


def test_a_chain_asks_its_second_method_about_the_budget():
    chained = build("divprune+pyramiddrop", **{"pyramiddrop.schedule": "published"})
    with pytest.raises(InputError, match="contradicts schedule=published"):
        chained.check_budget(Share(0.2))
    chained.check_budget(Share(0.125))


@pytest.mark.parametrize("upstream_exact", [False, True])
def test_pyramiddrop_has_the_released_schedule_at_every_depth(upstream_exact):
    method = build("pyramiddrop", schedule="published", upstream_exact=upstream_exact)
    assert method.layers(32) == method.layers(40) == (8, 16, 24)
    assert build("pyramiddrop").layers(40) == (10, 20, 30)
    assert method.counts(576, Share(0.125), 32, 640) == (288, 144, 72)
    assert method.counts(577, Share(0.125), 40, 640) == (288, 144, 72)
    assert method.counts(5, Share(0.125), 40, 640) == (2, 1, 1)


class Line(DecoderView):
    """A prompt of visual tokens between two words before and `behind` words after, one head, attention as told."""

    def __init__(self, visual: int, behind: int = 3, question: tuple[int, ...] = (0,), layer: int = 3) -> None:
        generator = torch.Generator().manual_seed(visual + behind)
        size = 2 + visual + behind
        self.layer, self.depth, self.total, self.memory = layer, 32, size, {}
        self.hidden = torch.randn(size, 8, generator=generator, dtype=torch.float64)
        self.embeds = torch.randn(size, 8, generator=generator, dtype=torch.float64)
        self.visual = self.first_visual = torch.arange(2, 2 + visual)
        self.text = self.first_text = 2 + visual + torch.tensor(question)
        self.original, self.item = torch.arange(visual), torch.zeros(visual, dtype=torch.long)
        self.weights = torch.rand(size, size, generator=generator, dtype=torch.float64)
        self.asked: list[list[int]] = []

    @property
    def relation(self) -> torch.Tensor:
        """What the queries asked last give the visual tokens."""
        return self.weights[self.asked[-1]].mean(0)[self.visual]

    def received(self, layer, queries=None):
        self.asked.append(queries.tolist())
        return self.weights[queries].mean(0)

    def keys(self, layer):
        return self.hidden

    def final_norm(self, states):
        return states


def test_raters_come_from_the_question_and_upstream_from_all_text_behind_the_image():
    asked = []
    for upstream_exact in (False, True):
        view = Line(40, behind=9, question=(1, 2, 3))
        words = list(range(42, 51)) if upstream_exact else [43, 44, 45]
        liking = (view.embeds[view.visual] @ view.embeds[words].T).softmax(-1).mean(0)
        build("sparsevlm", upstream_exact=upstream_exact).keep(view, torch.arange(40), 20)
        assert view.asked == [[w for w, m in zip(words, liking, strict=True) if m > liking.mean()]]
        asked.append(view.asked)
    assert asked[0] != asked[1]


def test_upstream_raters_stand_at_the_end_of_a_prompt_that_has_become_shorter():
    view = Line(40, behind=9)
    words = view.embeds[42:]
    view.hidden, view.visual = view.hidden[20:], torch.arange(22)  # 20 tokens are gone
    build("sparsevlm", upstream_exact=True).keep(view, torch.arange(22), 10)
    liking = (view.embeds[view.first_visual] @ words.T).softmax(-1).mean(0)
    assert view.asked == [[22 + i for i, m in enumerate(liking) if m > liking.mean()]]


def test_upstream_needs_no_text_behind_the_image():
    view = Line(40, behind=0)
    assert len(build("sparsevlm", upstream_exact=True).keep(view, torch.arange(40), 20).kept) == 20
    assert view.asked == [[41]]


@pytest.mark.parametrize(("upstream_exact", "clusters", "looked_at"), [(False, 6, 91), (True, 10, 93)])
def test_merged_tokens_are_capped_canonically_alone(upstream_exact, clusters, looked_at, clusterings):
    """309 tokens of which 2 survive upstream: int(0.3 * 307) + 1 = 93 are merged into int(9.3) + 1 = 10."""
    view = Line(309)
    selection = build("sparsevlm", upstream_exact=upstream_exact).keep(view, torch.arange(309), 12)
    best = view.relation.sort(descending=True, stable=True).indices[: 12 - clusters]
    assert set(best.tolist()) <= set(selection.kept.tolist())
    assert len(selection.kept) == 12
    assert clusterings == [(looked_at, clusters)]


def test_uncapped_merged_tokens_are_on_top_of_the_survivors():
    exact = build("sparsevlm", upstream_exact=True)
    counts = exact.counts(309, Share(2.5 / 309), 32, 400)
    assert exact.count(309, Share(2.5 / 309)) == 2
    assert counts[-1] == 2 + merged_by_the_published_rule(counts[-2] - 2)


every_decoder = pytest.mark.parametrize("name", ["fastv", "pyramiddrop", "dart", "sparsevlm"])


@every_decoder
@settings(deadline=None, max_examples=200)
@given(n=st.integers(1, 3000), percent=st.integers(1, 99), depth=st.integers(4, 40), upstream=st.booleans())
def test_counts_never_grow_and_end_at_the_budget(name, n, percent, depth, upstream):
    method = build(name, upstream_exact=upstream)
    for budget in (Share(percent / 100), Tokens(percent)):
        counts = method.counts(n, budget, depth, n + 40)
        layers = method.check_layers(depth)
        assert len(counts) == len(layers)
        assert all(1 <= count <= n for count in counts)
        assert list(counts) == sorted(counts, reverse=True)
        if not upstream or isinstance(budget, Tokens):
            assert counts[-1] == budget.count(n)


def test_shrinking_is_geometric():
    assert shrinking(1000, 1, 0.001, 3) == (100, 10, 1)
    assert shrinking(5, 4, 0.8, 3) == (4, 4, 4)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("fastv", {"layer": 0}),
        ("fastv", {"rows": "some"}),
        ("dart", {"layer": 0}),
        ("dart", {"image_pivots": 0}),
        ("dart", {"text_pivots": -1}),
    ],
)
def test_unusable_option_is_one_line(name, options):
    with pytest.raises(InputError, match=next(iter(options))) as error:
        build(name, **options)
    assert "\n" not in str(error.value)


# The parts of DART and SparseVLM beside naive forms -------------------------------------------------------------------


def rows(n, width, seed, kind):
    drawn = torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if kind == "equal":
        drawn[:] = drawn[0]
    elif kind == "twice":
        drawn[n // 2 : 2 * (n // 2)] = drawn[: n // 2]
    elif kind == "zeros":
        drawn[::2] = 0
    return drawn


kinds = st.sampled_from(["drawn", "equal", "twice", "zeros"])


@settings(deadline=None, max_examples=150)
@given(n=st.integers(1, 120), t=st.integers(0, 9), seed=st.integers(0, 99), kind=kinds, data=st.data())
def test_dart_agrees_with_a_loop_over_pivots(n, t, seed, kind, data):
    count = data.draw(st.integers(1, n))
    states, keys = rows(n + t, 6, seed, kind), rows(n + t, 5, seed + 1, kind)
    norms, image, text = keys.abs().sum(1), list(range(n)), list(range(n, n + t))
    kept = pick(norms, unit_rows(states), torch.tensor(image), torch.tensor(text, dtype=torch.long), count, 4, 4)
    pivots = sorted(image, key=lambda p: (-norms[p], p))[: min(4, count)]
    others = sorted(text, key=lambda p: (-norms[p], p))[:4]
    chosen, free = list(pivots), [p for p in image if p not in pivots]
    wanted = count - len(pivots)
    for number, pivot in enumerate(pivots + others):
        share = wanted // (len(pivots) + len(others)) + (number < wanted % (len(pivots) + len(others)))
        like = {p: round(float(torch.cosine_similarity(states[p], states[pivot], 0)), 8) for p in free}
        picks = sorted(free, key=lambda p: (like[p], p))[:share]
        chosen += picks
        free = [p for p in free if p not in picks]
    assert kept.tolist() == sorted(chosen)
    assert len(set(kept.tolist())) == count


def dart_with_sets(norms, states, image, text, each):
    """DART's rule with sets of indices: pivots in the order in which CPython iterates over them."""
    ranked = [sorted(places, key=lambda p: (-norms[p], p))[:4] for places in (image, text)]
    kept = set(ranked[0])
    for pivot in list(set(ranked[0] + ranked[1])):
        free = [p for p in image if p not in kept]
        like = torch.cosine_similarity(states[free].double(), states[pivot].double()[None]).tolist()
        kept |= {p for _, p in sorted(zip(like, free, strict=True))[:each]}
    return sorted(p - image[0] for p in kept)


def test_dart_upstream_visits_pivots_in_the_order_of_their_set():
    same = by_rank = 0
    for seed in range(100):
        generator = torch.Generator().manual_seed(seed)
        states = torch.randn(680, 16, generator=generator) + torch.randn(16, generator=generator)
        norms = torch.rand(680, generator=generator)
        image, text = list(range(35, 611)), list(range(611, 680))
        arguments = norms, states, torch.tensor(image), torch.tensor(text), 4 + 8 * 15, 4, 4
        expected = dart_with_sets(norms, states, image, text, 15)
        same += pick(*arguments, set_order=True).tolist() == expected
        by_rank += pick(*arguments).tolist() == expected
    assert same == 100
    assert by_rank < 50


def test_dart_orders_by_sets_under_upstream_exact_alone():
    for upstream_exact in (False, True):
        view = Line(120, behind=9)
        norms = view.hidden.abs().sum(1)
        image, after = torch.arange(2, 122), torch.arange(122, 131)
        kept = build("dart", upstream_exact=upstream_exact).keep(view, torch.arange(120), 4 + 8 * 4).kept
        assert torch.equal(kept, pick(norms, view.hidden, image, after, 36, 4, 4, set_order=upstream_exact))
        if upstream_exact:
            assert kept.tolist() == dart_with_sets(norms, view.hidden, image.tolist(), after.tolist(), 4)


@settings(deadline=None, max_examples=150)
@given(
    n=st.integers(1, 90), seed=st.integers(0, 99), kind=kinds, chunk=st.sampled_from([1, 70, 1 << 20]), data=st.data()
)
def test_density_peaks_agree_with_the_matrix_form(n, seed, kind, chunk, data):
    clusters = data.draw(st.integers(1, n))
    x = rows(n, 6, seed, kind)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparsevlm, "_CHUNK", chunk)
        centres, nearest = density_peaks(x, clusters)
        merged = cluster_means(x, nearest, clusters)
    distance = (x[:, None] - x[None]).norm(dim=-1) / 6**0.5
    density = (-distance.sort(1).values[:, :clusters].square().mean(1)).exp()
    delta = [
        min((float(distance[a, b]) for b in range(n) if density[b] > density[a]), default=float(distance.max()))
        for a in range(n)
    ]
    score = [float(d) * e for d, e in zip(density, delta, strict=True)]
    wanted = sorted(range(n), key=lambda a: (-round(score[a], 9), a))[:clusters]
    assert merged.isfinite().all()
    assert len(set(centres.tolist())) == clusters
    if len({round(s, 6) for s in score}) == n:  # no ties that rounding could break
        assert centres.tolist() == wanted
        owner = distance[:, centres].argmin(1)
        for c in range(clusters):
            assert torch.allclose(merged[c], x[owner == c].mean(0))


def test_raters_without_a_favourite_are_all_of_the_text():
    assert raters(X, X[:1]).tolist() == [0]
    assert raters(X, X[:1].expand(3, -1)).tolist() == [0, 1, 2]


def peak_of(run):
    """Largest tensor that exists while `run` does, in elements."""
    largest = 0

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            nonlocal largest
            result = function(*args, **(kwargs or {}))
            for tensor in tree_leaves(result):
                if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                    largest = max(largest, tensor.numel())
            return result

    with Watch():
        run()
    return largest


def test_nothing_is_as_large_as_all_pairs_of_tokens():
    n = 16_384
    features = torch.randn(n, 8)
    pairs = n * n // 32
    assert peak_of(lambda: raters(features, features[:200])) < pairs
    assert peak_of(lambda: density_peaks(features[:4096], 300)) < pairs
    places = torch.arange(n - 100)
    assert peak_of(lambda: pick(features[:, 0], features, places, torch.arange(n - 100, n), 2000, 4, 4)) < pairs
