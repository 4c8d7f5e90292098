"""Decoder-stage methods by themselves: golden vectors (float64), counts, layers and invariants."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from visionselector_eval.baselines import InputError, Tokens, build, sparsevlm
from visionselector_eval.baselines.base import Share, shrinking, unit_rows
from visionselector_eval.baselines.dart import pick
from visionselector_eval.baselines.sparsevlm import density_peaks, merged_into, raters

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
    centres, merged = density_peaks(X, 3)
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


@settings(deadline=None, max_examples=150)
@given(
    n=st.integers(1, 90), seed=st.integers(0, 99), kind=kinds, chunk=st.sampled_from([1, 70, 1 << 20]), data=st.data()
)
def test_density_peaks_agree_with_the_matrix_form(n, seed, kind, chunk, data):
    clusters = data.draw(st.integers(1, n))
    x = rows(n, 6, seed, kind)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sparsevlm, "_CHUNK", chunk)
        centres, merged = density_peaks(x, clusters)
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
