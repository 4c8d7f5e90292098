"""What every compressor that chooses tokens must hold to, and cheap forms against naive ones."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from visionselector_eval.baselines import (
    Compressor,
    EncoderTrace,
    InputError,
    Selection,
    Share,
    Tokens,
    VisualTokens,
    available,
    build,
    cdpruner,
    holov,
    id_selection,
    top_k,
)
from visionselector_eval.baselines.contract import registry
from visionselector_eval.baselines.contract.base import Host
from visionselector_eval.baselines.contract.numerics import rounded, unit_rows
from visionselector_eval.baselines.divprune import pick_order
from visionselector_eval.baselines.vispruner import diverse
from visionselector_eval.harness.microbenchmarks.compressors import Allocations
from visionselector_eval.harness.microbenchmarks.naive import (
    naive_cdpruner,
    naive_divprune,
    naive_fading,
    naive_fusion2x2,
    naive_holov,
    naive_mmr,
    naive_pooling,
    naive_prumerge,
    naive_received,
    naive_scores,
    naive_tome,
    naive_visionzip,
    naive_vispruner,
)
from visionselector_eval.models.visionselector import Scorer, idpruner, soft_topk

SIZES = (1, 2, 3, 5, 8, 15, 16, 17, 576, 2048)
RATIOS = (0.01, 0.05, 0.1, 0.2, 0.3, 0.5, 1.0)
WIDTH = 12
# Down-sampling acts on pixels: there are no tokens to choose from.
# Methods inside the LLM see a layer, not a scope of tokens: tests/baselines/test_decoder_methods.py.
NAMES = [
    name
    for name in available()
    if name in registry.BUILTIN and registry.compressor_class(name).stage == "projector"  # type: ignore[attr-defined]
]
CHOOSERS = [name for name in NAMES if name != "full"]
COSINE = ["divprune", "visionzip", "cdpruner", "vispruner", "id_selection", "tome", "fusion2x2", "prumerge_plus"]
MERGING = ["tome", "fusion2x2"]
RULES = [False, True]


@pytest.fixture(scope="module", autouse=True)
def _one_thread() -> Iterator[None]:
    """Small products gain nothing from a second core, and lose a lot where another process has it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def random_scorer(width: int = WIDTH) -> Scorer:
    generator = torch.Generator().manual_seed(1)
    shapes = {"q_proj.weight": (5, width), "q_proj.bias": (5,), "k_proj.weight": (5, width), "k_proj.bias": (5,)}
    return Scorer.from_state({name: torch.randn(shape, generator=generator) for name, shape in shapes.items()})


def make(name: str, width: int = WIDTH, **options: Any) -> Compressor:
    if name in ("visionselector", "idpruner"):
        options["scorer"] = random_scorer(width)
    return build(name, **options)


def some_tokens(n: int, features: Tensor | None = None, width: int = WIDTH, dtype=torch.float32) -> VisualTokens:
    generator = torch.Generator().manual_seed(n)
    drawn = torch.randn(n, width, generator=generator, dtype=torch.float64).to(dtype)
    keys = torch.randn(n, 7, generator=generator)
    received = torch.rand(n, generator=generator)
    return VisualTokens(
        features=drawn if features is None else features,
        grid=(1, 1, n),
        trace=EncoderTrace(received=received, keys=keys, keys_concat=torch.cat([keys, -keys.flip(0)], 1), cls=received),
        text=torch.randn(4, width if features is None else features.shape[1], generator=generator),
        key=f"document {n}",
    )


def check(selection: Selection, tokens: VisualTokens, count: int) -> list[int]:
    n = tokens.features.shape[0]
    assert selection.kept.dtype == torch.int64
    kept = selection.kept.tolist()
    assert len(kept) == count
    assert kept == sorted(set(kept))
    assert 0 <= kept[0] <= kept[-1] < n
    if selection.features is not None:
        assert selection.features.shape == (count, tokens.features.shape[1])
        assert selection.features.dtype == tokens.features.dtype
        assert not selection.features.isnan().any()
    if selection.scores is not None:
        assert selection.scores.shape == (n,)
        assert selection.scores.dtype in (torch.float32, torch.float64)
    return kept


@pytest.mark.parametrize("upstream_exact", RULES)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("n", SIZES)
def test_exact_count_ascending_unique_in_range(name, n, upstream_exact):
    compressor, tokens = make(name, upstream_exact=upstream_exact), some_tokens(n)
    for ratio in RATIOS:
        count = compressor.count(n, Share(ratio))
        assert 1 <= count <= n
        if not upstream_exact and name != "full":
            assert count == min(n, max(1, math.floor(ratio * n + 1e-9)))
        kept = check(compressor.compress(tokens, count), tokens, count)
        if ratio == 1.0:
            assert kept == list(range(n))
    if name != "full":
        for number in {1, 2, n - 1, n} & set(range(1, n + 1)):
            assert compressor.count(n, Tokens(number)) == number
            check(compressor.compress(tokens, number), tokens, number)


@pytest.mark.parametrize(
    ("name", "n", "ratio", "count"),
    [
        ("divprune", 5, 0.5, 2),  # round(2.5), half to even
        ("divprune", 7, 0.5, 4),
        ("divprune", 3, 0.1, 1),  # upstream keeps none
        ("divprune", 576, 0.098, 56),
        ("visionselector", 100, 0.29, 28),  # int(28.999999999999996)
        ("visionselector", 3, 0.1, 1),
        ("visionzip", 40, 0.15, 5),  # int(0.09999999999999999 * 40) + 2
        ("visionzip", 576, 0.2, 114),  # int(86.4) + int(28.8)
        ("visionzip", 2048, 0.1, 204),
        ("visionzip", 2048, 0.05, 102),  # no dominant token
        ("visionzip", 16, 0.01, 1),
        ("random", 100, 0.29, 29),
        ("prumerge_plus", 100, 0.29, 28),
        ("holov", 100, 0.29, 28),
        ("holov", 3, 0.1, 1),
        ("vispruner", 5, 0.5, 2),
        ("vispruner", 7, 0.5, 4),
        ("idpruner", 10, 0.25, 2),  # round(2.5)
        ("idpruner", 25, 0.1, 2),  # round(25 * (1 - 0.9)) = round(2.4999999999999996)
        ("idpruner", 3, 0.1, 1),
    ],
)
def test_upstream_rounding(name, n, ratio, count):
    assert make(name, upstream_exact=True).count(n, Share(ratio)) == count


@pytest.mark.parametrize("upstream_exact", RULES)
def test_scope_follows_the_rule_set(upstream_exact):
    for name in NAMES:
        assert make(name, upstream_exact=upstream_exact).scope == ("prompt" if upstream_exact else "item")


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("name", ["divprune", "visionselector", "idpruner", "cdpruner"])
def test_equal_tokens_give_the_lowest_indices(name, n):
    row = torch.randn(1, 3584 if n < 100 else 64, generator=torch.Generator().manual_seed(0))
    tokens = some_tokens(n, features=row.repeat(n, 1))
    for count in {1, max(1, n // 3), n}:
        assert make(name, width=row.shape[1]).compress(tokens, count).kept.tolist() == list(range(count))


def test_equal_attention_gives_the_lowest_indices():
    tokens = VisualTokens(
        features=torch.randn(20, 4), grid=(1, 4, 5), trace=EncoderTrace(received=torch.ones(20), keys=torch.ones(20, 3))
    )
    # Dominant 0..4; of the rest 5..19 one target, its first.
    assert build("visionzip").compress(tokens, 6).kept.tolist() == [0, 1, 2, 3, 4, 5]
    # One by attention, 0, and five over all 20; the port's rule: 0, 3, 6, ...
    assert build("prumerge_plus").compress(tokens, 6).kept.tolist() == [0, 2, 6, 10, 14, 18]
    assert build("prumerge_plus", upstream_exact=True).compress(tokens, 6).kept.tolist() == [0, 3, 6, 9, 12, 15]
    assert build("holov", crops=3).compress(tokens, 6).kept.tolist() == [0, 1, 7, 8, 14, 15]
    same = VisualTokens(features=torch.ones(20, 4), grid=(1, 4, 5), trace=tokens.trace)
    assert build("id_selection").compress(same, 6).kept.tolist() == [0, 1, 2, 3, 4, 5]
    # 0 to 2 by attention; 3 to 19 lose 3, 5, ... 17 and then 19, 6, 10, 14 and so on: the first of each round's even.
    assert build("vispruner").compress(same, 6).kept.tolist() == naive_vispruner(same.features, torch.ones(20), 6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("upstream_exact", RULES)
@pytest.mark.parametrize("name", CHOOSERS)
def test_duplicates_and_zero_rows(name, upstream_exact, dtype):
    distinct = some_tokens(9, dtype=dtype).features
    features = torch.cat([distinct, distinct, torch.zeros(4, WIDTH, dtype=dtype), distinct.flip(0)])
    n = features.shape[0]
    tokens = some_tokens(n, features=features)
    for count in range(1, n + 1):
        check(make(name, upstream_exact=upstream_exact).compress(tokens, count), tokens, count)
    everything_zero = some_tokens(n, features=torch.zeros_like(features))
    check(make(name, upstream_exact=upstream_exact).compress(everything_zero, 11), everything_zero, 11)


def test_divprune_takes_a_copy_only_when_nothing_else_is_left():
    distinct = some_tokens(9).features
    features = torch.cat([distinct, distinct, distinct])[torch.randperm(27, generator=torch.Generator().manual_seed(3))]
    first_nine = pick_order(features, 9)
    assert torch.unique(features[first_nine], dim=0).shape[0] == 9
    assert sorted(pick_order(features, 27).tolist()) == list(range(27))


def test_divprune_reads_broken_rows_as_zeros():
    features = some_tokens(40).features
    features[3], features[7] = torch.nan, torch.inf
    cleaned = features.clone()
    cleaned[3], cleaned[7] = 0, 0
    assert pick_order(features, 20).tolist() == pick_order(cleaned, 20).tolist()


@pytest.mark.parametrize("factor", [2.0**-20, 0.37, 5000.0])
@pytest.mark.parametrize("name", COSINE)
def test_scale_changes_nothing_for_cosines(name, factor):
    tokens = some_tokens(300, dtype=torch.float64)
    assert tokens.trace is not None
    assert tokens.trace.keys is not None
    scaled = VisualTokens(
        features=tokens.features * factor,
        grid=tokens.grid,
        trace=EncoderTrace(received=tokens.trace.received, cls=tokens.trace.cls, keys=tokens.trace.keys * factor),
        text=None if tokens.text is None else tokens.text * factor,
    )
    tokens = replace(tokens, trace=replace(tokens.trace, keys_concat=None))
    ours, theirs = make(name).compress(tokens, 60), make(name).compress(scaled, 60)
    assert ours.kept.tolist() == theirs.kept.tolist()
    if ours.features is not None:
        torch.testing.assert_close(ours.features * factor, theirs.features)


def test_similarities_are_rounded_in_double_precision_alone():
    with pytest.raises(ValueError, match="expected float64"):
        rounded(torch.ones(2))
    near = torch.tensor([0.5, 0.5 + 1e-9, 0.5 + 1e-12], dtype=torch.float64)
    assert rounded(near).unique().numel() == 2


def test_random_depends_on_document_and_seed_alone():
    def kept(key: str, seed: int, count: int = 30, width: int = 4) -> list[int]:
        tokens = VisualTokens(features=torch.randn(100, width), grid=(1, 10, 10), key=key)
        return build("random", seed=seed).compress(tokens, count).kept.tolist()

    assert kept("a", 0) == kept("a", 0, width=9)
    assert kept("a", 0) != kept("a", 1)
    assert kept("a", 0) != kept("b", 0)
    assert set(kept("a", 0, count=10)) < set(kept("a", 0))
    # Pinned: the draw may not change between processes, machines or releases of ours without notice.
    assert kept("a", 0, count=5) == [0, 10, 18, 62, 87]


def test_uniform_is_centred():
    for n, count, kept in ((16, 4, [2, 6, 10, 14]), (10, 3, [1, 5, 8]), (5, 5, [0, 1, 2, 3, 4]), (7, 1, [3])):
        tokens = VisualTokens(features=torch.zeros(n, 2), grid=(1, 1, n))
        assert build("uniform").compress(tokens, count).kept.tolist() == kept


@pytest.mark.parametrize("upstream_exact", RULES)
@pytest.mark.parametrize(("n", "count"), [(5, 2), (16, 3), (17, 9), (100, 20), (100, 99), (576, 57)])
def test_visionzip_merges_every_dropped_token_once(n, count, upstream_exact):
    # One-hot features: a merged row then spells out which tokens are in it.
    tokens = some_tokens(n, features=torch.eye(n, dtype=torch.float64))
    compressor = build("visionzip", upstream_exact=upstream_exact)
    selection = compressor.compress(tokens, count)
    kept = selection.kept.tolist()
    assert selection.features is not None
    seen = torch.zeros(n)
    for place, row in zip(kept, selection.features, strict=True):
        assert row[place] == 1
        members = [i for i in row.nonzero()[:, 0].tolist() if i != place]
        assert not set(members) & set(kept)
        if members:
            torch.testing.assert_close(row[members], torch.full((len(members),), 1 / len(members), dtype=row.dtype))
        seen[members] += 1
    dropped = [i for i in range(n) if i not in kept]
    assert (seen[dropped] == 1).all()
    assert seen.sum() == len(dropped)


@pytest.mark.parametrize("upstream_exact", RULES)
def test_visionzip_merges_10_of_64_kept_tokens_with_a_cls_token_and_5_percent_of_all_without(upstream_exact):
    n = 576
    compressor = build("visionzip", upstream_exact=upstream_exact)
    for kept, of_kept in ((64, 10), (128, 20), (192, 30)):
        for trace, contextual in (("cls", of_kept), ("received", 28)):
            # Equal keys: all that is dropped joins the first target, and the others stand as they are.
            tokens = VisualTokens(
                features=torch.eye(n),
                grid=(1, 24, 24),
                trace=EncoderTrace(keys=torch.ones(n, 3), **{trace: torch.arange(n).float()}),
            )
            chosen = compressor.compress(tokens, kept).kept
            dominant = kept - contextual
            assert chosen[contextual:].tolist() == list(range(n - dominant, n))
            targets = [i * ((n - dominant) // contextual) for i in range(contextual)]
            assert chosen[:contextual].tolist() == targets


def test_visionzip_counts_as_published_for_the_backbones_encoder():
    on_clip, on_qwen = Host("clip", 8, traces=frozenset({"cls", "keys"})), Host("qwen", 8, traces=frozenset({"keys"}))
    exact = build("visionzip", upstream_exact=True)
    # With a CLS token published budgets are counts; a share then is rounded as everywhere.
    assert exact.bind(on_clip).count(576, Share(0.2)) == 115
    assert exact.bind(on_qwen).count(576, Share(0.2)) == exact.count(576, Share(0.2)) == 114
    assert exact.bind(on_clip).bind(on_qwen).count(576, Share(0.2)) == 114
    given_share = build("visionzip", upstream_exact=True, contextual=0.05)
    assert given_share.bind(on_clip).count(576, Share(0.2)) == 114


def test_visionzip_takes_a_given_contextual_share_with_a_cls_token_too():
    tokens = some_tokens(100, features=torch.eye(100, dtype=torch.float64))
    for contextual, merged in ((0.05, 5), (0.0, 1), (0.3, 10)):
        selection = build("visionzip", contextual=contextual).compress(tokens, 20)
        assert tokens.trace is not None
        assert tokens.trace.cls is not None
        dominant = set(top_k(tokens.trace.cls, 20 - merged).tolist())
        assert len(dominant) == 20 - merged
        assert dominant < set(selection.kept.tolist())
        assert len(set(selection.kept.tolist()) - set(top_k(tokens.trace.cls, 21 - merged).tolist())) >= merged - 1


def test_visionzip_keeps_one_token_without_merging():
    selection = build("visionzip").compress(some_tokens(50), 1)
    assert selection.features is None


@pytest.mark.parametrize("upstream_exact", RULES)
@pytest.mark.parametrize("name", MERGING)
@pytest.mark.parametrize("grid", [(1, 1, 2), (1, 4, 4), (1, 5, 7), (3, 5, 4), (16, 1, 1), (2, 1, 9), (1, 24, 24)])
def test_merged_mass_is_all_there_is(name, grid, upstream_exact):
    n = math.prod(grid)
    # One-hot features: a merged row then spells out which tokens are in it, and at what share.
    tokens = replace(some_tokens(n, features=torch.eye(n, dtype=torch.float64)), grid=grid)
    compressor: Any = build(name, upstream_exact=upstream_exact)
    for count in {1, 2, max(1, n // 5), max(1, n // 2), n - 1, n}:
        selection, sizes = (compressor.merge if name == "tome" else compressor.fuse)(tokens, count)
        assert sizes.shape == (count,)
        assert sizes.sum() == n
        torch.testing.assert_close((selection.features * sizes[:, None]).sum(dim=0), torch.ones(n, dtype=torch.float64))
        assert ((selection.features > 0).sum(dim=1) == sizes).all()
        own = selection.features[torch.arange(count), selection.kept]
        assert (own > 0).all(), "an anchor is in its own token"
        alone = selection.features[sizes == 1]
        assert torch.equal(alone, tokens.features[selection.kept[sizes == 1]])


def test_fusion_stays_inside_windows_while_it_can():
    n, grid = 5 * 7, (1, 5, 7)
    tokens = replace(some_tokens(n, features=torch.eye(n)), grid=grid)
    for count in range(12, n):
        features = build("fusion2x2").compress(tokens, count).features
        assert features is not None
        for row in features:
            places = row.nonzero()[:, 0]
            assert (places // 7 // 2).unique().numel() == (places % 7 // 2).unique().numel() == 1


def test_fusion_weights_and_norms():
    tokens = replace(some_tokens(16, dtype=torch.float64), grid=(1, 4, 4))
    window = tokens.features[[0, 1, 4, 5]]
    mean = window.mean(dim=0)
    weights = torch.softmax(torch.cosine_similarity(window, mean[None]) / 0.1, dim=0)
    for options, expected in (
        ({}, mean),
        ({"weights": "sim"}, weights @ window),
        ({"restore_norm": True}, mean / mean.norm() * window.norm(dim=1).mean()),
    ):
        features = build("fusion2x2", **options).compress(tokens, 4).features
        assert features is not None
        torch.testing.assert_close(features[0], expected)


@pytest.mark.parametrize("grid", [(1, 7, 9), (3, 4, 6), (5, 1, 8), (9, 2, 2)])
def test_pooling_covers_every_token_within_its_cells(grid):
    n = math.prod(grid)
    tokens = replace(some_tokens(n, features=torch.eye(n, dtype=torch.float64)), grid=grid)
    for count in range(1, n + 1):
        selection = build("pooling").compress(tokens, count)
        assert selection.features is not None
        assert (selection.features.sum(dim=0) > 0).all()
        torch.testing.assert_close(selection.features.sum(dim=1), torch.ones(count, dtype=torch.float64))
        assert (selection.features[torch.arange(count), selection.kept] > 0).all()


@pytest.mark.parametrize(("bands", "columns"), [(1, 1), (2, 2), (3, 4), (5, 6), (12, 16)])
def test_pooling_is_adaptive_average_pooling_where_the_count_allows(bands, columns):
    tokens = replace(some_tokens(3 * 12 * 16, dtype=torch.float64), grid=(3, 12, 16))
    features = build("pooling").compress(tokens, 3 * bands * columns).features
    torch.testing.assert_close(features, naive_pooling(tokens.features, tokens.grid, bands, columns))


def test_prumerge_takes_heads_side_by_side_and_else_their_mean():
    tokens = some_tokens(40)
    assert tokens.trace is not None
    own = build("prumerge_plus").compress(tokens, 5)
    mean = build("prumerge_plus").compress(replace(tokens, trace=replace(tokens.trace, keys_concat=None)), 5)
    assert own.kept.tolist() == mean.kept.tolist()
    assert own.features is not None
    assert not torch.equal(own.features, mean.features)
    assert build("prumerge_plus", neighbours=0).compress(tokens, 5).features.equal(tokens.features[own.kept])


@pytest.mark.parametrize(
    ("name", "lacking"),
    [
        ("prumerge_plus", "cls_whole/cls/received and keys_whole/keys_concat/keys"),
        ("holov", "cls/received"),
        ("vispruner", "cls/received"),
        ("id_selection", "cls/received"),
        ("cdpruner", "question"),
    ],
)
def test_what_is_missing_is_named(name, lacking):
    tokens = VisualTokens(features=torch.eye(8), grid=(1, 2, 4), trace=EncoderTrace())
    with pytest.raises(InputError, match=lacking):
        build(name).compress(tokens, 3)


def test_tome_needs_keys_only_where_it_measures_on_them():
    assert build("tome").needs == frozenset()
    assert build("tome", metric="keys").needs == {"keys"}
    with pytest.raises(InputError, match="keys"):
        build("tome", metric="keys").compress(VisualTokens(features=torch.eye(8), grid=(1, 2, 4)), 3)


def test_cdpruner_follows_the_question():
    features = torch.eye(12)
    text = torch.zeros(2, 12)
    text[:, 3], text[:, 8] = 1.0, 0.5
    tokens = VisualTokens(features=features, grid=(1, 3, 4), text=text)
    assert build("cdpruner").compress(tokens, 2).kept.tolist() == [3, 8]
    assert not {3, 8} & set(build("cdpruner", negate=True).compress(tokens, 9).kept.tolist())
    nothing_asked = replace(tokens, text=torch.zeros(0, 12))
    assert build("cdpruner").compress(nothing_asked, 3).kept.tolist() == [0, 1, 2]


def test_idpruner_without_likeness_is_visionselector():
    tokens = some_tokens(50)
    kept = [
        make(name, **o).compress(tokens, 9).kept.tolist()
        for name, o in (("idpruner", {"balance": 1.0}), ("visionselector", {}))
    ]
    assert kept[0] == kept[1]


def test_idpruner_begins_with_the_most_important_token_at_every_balance():
    features = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
    scores = torch.tensor([0.1, 0.9, 0.5])
    for balance in (0.0, 0.2, 1.0):
        assert idpruner.pick_order(features, scores, 1, balance).tolist() == [1]
    # Without importance it is the farthest from the picked ones that follows.
    assert idpruner.pick_order(features, scores, 3, 0.0).tolist() == [1, 0, 2]


def test_holov_gives_a_full_crops_share_to_the_others():
    received = torch.full((16,), 0.01)
    received[4:8], received[14] = 1.0, 0.02
    tokens = VisualTokens(features=torch.zeros(16, 3), grid=(1, 4, 4), trace=EncoderTrace(received=received))
    assert build("holov", crops=4).compress(tokens, 6).kept.tolist() == [0, 4, 5, 6, 7, 14]


def outstanding(n: int, outliers: list[int]) -> VisualTokens:
    attention = torch.linspace(1.0, 1.01, n, dtype=torch.float64)
    attention[outliers] = 5.0
    keys = torch.randn(n, 5, generator=torch.Generator().manual_seed(0))
    trace = EncoderTrace(received=attention, keys=keys)
    return VisualTokens(features=torch.eye(n, dtype=torch.float64), grid=(1, 1, n), trace=trace)


@pytest.mark.parametrize(
    ("n", "outliers", "count", "spaced"),
    [
        (24, [5, 17], 6, [3, 9, 15, 21]),
        (24, [9, 17], 6, [3, 8, 15, 21]),  # 8 and 10 are equally near: the lower
        (24, [8, 9], 6, [3, 10, 15, 21]),
        (24, [0, 9, 10, 8], 8, [3, 7, 15, 21]),
        (24, [3, 9, 15, 21], 8, [2, 8, 14, 20]),
        (10, [0, 1], 3, [5]),
        (10, [0, 5], 3, [4]),
        (12, [0, 1], 12, list(range(2, 12))),
    ],
)
def test_prumerge_spaces_tokens_over_the_whole_image(n, outliers, count, spaced):
    kept = build("prumerge_plus").compress(outstanding(n, outliers), count).kept.tolist()
    assert kept == sorted([*outliers, *spaced])


def test_prumerge_reaches_every_part_of_the_image_where_the_port_stays_at_the_top():
    outliers = list(range(300, 350))
    tokens = outstanding(576, outliers)
    ours, ports = (
        [
            i // 24
            for i in build("prumerge_plus", upstream_exact=exact).compress(tokens, 57).kept.tolist()
            if i not in outliers
        ]
        for exact in RULES
    )
    assert len(ours) == len(ports) == 7
    assert ours == [math.floor((i + 0.5) * 576 / 7) // 24 for i in range(7)]
    assert max(ports) <= 3


def test_holov_variance_changes_nothing():
    for seed in range(20):
        tokens = some_tokens(300 + seed, dtype=torch.float64)
        assert tokens.trace is not None
        assert tokens.trace.received is not None
        received = tokens.trace.received.double() * 1000  # upstream's factor, beside which its 1e-6 is nothing
        with_variance = naive_holov(received, 60, 8, tokens.features)
        assert sorted(with_variance) == sorted(holov.pick_order(received, 60, 8).tolist())


# --- cheap forms against naive ones ---------------------------------------------------------------------------------


@st.composite
def awkward_rows(draw: st.DrawFn, smallest: int = 1, largest: int = 300, width: int = 5) -> Tensor:
    """(N, width) float64: random rows, or small whole numbers, which bring equal, opposite and zero rows along."""
    n = draw(st.integers(smallest, largest))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    if draw(st.booleans()):
        return torch.randint(-1, 2, (n, width), generator=generator).double()
    rows = torch.randn(n, width, generator=generator, dtype=torch.float64)
    copies = torch.randint(0, n, (n,), generator=generator)
    rows = torch.where(torch.rand(n, 1, generator=generator) < draw(st.sampled_from([0.0, 0.3])), rows[copies], rows)
    return torch.where(torch.rand(n, 1, generator=generator) < 0.05, 0.0, rows)


few = settings(max_examples=60, deadline=None, derandomize=True)


@few
@given(features=awkward_rows(), share=st.floats(0.01, 1))
def test_divprune_equals_the_full_matrix_form(features, share):
    count = max(1, int(share * features.shape[0]))
    assert pick_order(features, count).tolist() == naive_divprune(features, count)


@pytest.mark.parametrize("n", [511, 512, 513, 2047, 2048, 2049, 2600])
def test_divprune_order_does_not_depend_on_how_much_is_held(n):
    features = torch.randn(n, 32, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    assert pick_order(features, 40).tolist() == naive_divprune(features, 40)


@few
@given(features=awkward_rows(), keys=awkward_rows(300, 300), share=st.floats(0.01, 1), contextual=st.floats(0, 0.4))
def test_visionzip_equals_the_form_that_goes_token_by_token(features, keys, share, contextual):
    n = features.shape[0]
    keys, received = keys[:n], features.abs().sum(dim=1)  # whole numbers half of the time: many ties
    count = max(1, int(share * n))
    merged_count = min(max(1, math.floor(contextual * n + 1e-9)), count // 2)
    tokens = VisualTokens(features=features, grid=(1, 1, n), trace=EncoderTrace(received=received, keys=keys))
    selection = build("visionzip", contextual=contextual).compress(tokens, count)
    naive = naive_visionzip(features, keys, received, count - merged_count, merged_count)
    assert selection.kept.tolist() == sorted([*naive.dominant, *naive.joined])
    rows = torch.stack([naive.merged.get(i, features[i]) for i in selection.kept.tolist()])
    torch.testing.assert_close(features[selection.kept] if selection.features is None else selection.features, rows)


@few
@given(features=awkward_rows(), share=st.floats(0.01, 1), levels=st.sampled_from([0, 3]))
def test_greedy_picks_equal_the_full_matrix_forms(features, share, levels):
    n = features.shape[0]
    count = max(1, int(share * n))
    importance = torch.rand(n, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    if levels:
        importance = (importance * levels).floor()  # many equal ones
    assert idpruner.pick_order(features, importance, count).tolist() == naive_mmr(features, importance, count)
    assert id_selection.pick_order(features, importance, count).tolist() == naive_fading(features, importance, count)


@few
@given(features=awkward_rows(width=24), share=st.floats(0.01, 1), asked=st.booleans())
def test_cdpruner_equals_the_full_kernel_form(features, share, asked):
    count = max(1, int(share * features.shape[0]))
    unit = unit_rows(features)
    direction = torch.linspace(-1, 1, 24, dtype=torch.float64) if asked else torch.zeros(24, dtype=torch.float64)
    relevance = cdpruner.relevance(unit, direction)
    assert cdpruner.pick_order(unit, relevance, count).tolist() == naive_cdpruner(features, relevance, count)


@few
@given(features=awkward_rows(), share=st.floats(0.01, 1), important=st.floats(0, 1))
def test_vispruner_equals_the_form_that_compares_all_in_every_round(features, share, important):
    n = features.shape[0]
    count = max(1, int(share * n))
    received = features.abs().sum(dim=1)  # whole numbers half of the time: many ties
    tokens = VisualTokens(features=features, grid=(1, 1, n), trace=EncoderTrace(received=received))
    kept = build("vispruner", important=important).compress(tokens, count).kept.tolist()
    assert kept == naive_vispruner(features, received, count, important)


def test_vispruner_tells_similarities_apart_that_float32_takes_for_equal():
    rows = torch.tensor([[0.5, 0.8660254, 0, 0], [1, 0, 0, 0], [0.5000004, 0, 0.8660252, 0], [0, 0, 0, 1]])
    for dtype in (torch.float32, torch.float64):
        assert sorted(diverse(rows.to(dtype), 3).tolist()) == [0, 1, 3]


def smooth_tokens(seed: int) -> VisualTokens:
    """24 x 24 tokens as of an image: neighbours are alike, all have a common part, and copies are rare."""
    generator = torch.Generator().manual_seed(seed)
    fields = torch.nn.functional.interpolate(
        torch.randn(1, 16, 6, 6, generator=generator), size=(24, 24), mode="bicubic"
    )
    smooth = fields[0].flatten(1).T

    def rows(width: int) -> Tensor:
        own = 0.5 * torch.randn(576, width, generator=generator) + torch.randn(1, width, generator=generator)
        return 0.3 * smooth @ torch.randn(16, width, generator=generator) + own

    features, keys = rows(256), rows(64)
    attention = torch.softmax(torch.randn(576, generator=generator), dim=0)
    trace = EncoderTrace(received=attention, keys=keys, keys_concat=keys)
    return VisualTokens(features=features, grid=(1, 24, 24), trace=trace, text=features[:4], key="k")


@pytest.mark.parametrize("name", [name for name in COSINE if name != "divprune"] + ["divprune", "idpruner"])
def test_single_precision_keeps_what_double_precision_keeps(name):
    """No similarity is rounded so far that different ones become equal: ties then go to the lower index."""
    for seed in range(4):
        tokens = smooth_tokens(seed)
        trace = tokens.trace
        assert trace is not None
        double = replace(
            tokens,
            features=tokens.features.double(),
            text=None if tokens.text is None else tokens.text.double(),
            trace=EncoderTrace(**{k: None if v is None else v.double() for k, v in vars(trace).items()}),
        )
        for count in (64, 192):
            if name == "idpruner":
                assert trace.received is not None
                kept = [
                    sorted(idpruner.pick_order(t.features, trace.received, count).tolist()) for t in (tokens, double)
                ]
            else:
                kept = [build(name).compress(t, count).kept.tolist() for t in (tokens, double)]
            assert kept[0] == kept[1]


def test_vispruner_finds_similar_tokens_beyond_its_lists():
    # 30 groups of 30 near copies: a list of 64 holds little else, and soon nothing that is left.
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(30, 16, generator=generator, dtype=torch.float64).repeat(30, 1)
    features += 1e-3 * torch.randn(900, 16, generator=generator, dtype=torch.float64)
    received = torch.rand(900, generator=generator)
    tokens = VisualTokens(features=features, grid=(1, 30, 30), trace=EncoderTrace(received=received))
    for count in (10, 40, 300):
        assert build("vispruner").compress(tokens, count).kept.tolist() == naive_vispruner(features, received, count)


@few
@given(
    features=awkward_rows(2),
    keys=awkward_rows(300, 300),
    share=st.floats(0.01, 1),
    neighbours=st.integers(1, 40),
    upstream_exact=st.booleans(),
)
def test_prumerge_equals_the_form_that_goes_token_by_token(features, keys, share, neighbours, upstream_exact):
    n = features.shape[0]
    keys, received = keys[:n], features.abs().sum(dim=1) + 0.1
    count = max(1, int(share * n))
    tokens = VisualTokens(features=features, grid=(1, 1, n), trace=EncoderTrace(received=received, keys=keys))
    compressor = build("prumerge_plus", neighbours=neighbours, upstream_exact=upstream_exact)
    selection = compressor.compress(tokens, count)
    kept, rows = naive_prumerge(features, keys, received, count, neighbours, upstream_exact)
    assert selection.kept.tolist() == kept
    torch.testing.assert_close(selection.features, rows)


@few
@given(features=awkward_rows(), share=st.floats(0.01, 1), crops=st.integers(1, 40))
def test_holov_equals_the_form_that_goes_crop_by_crop(features, share, crops):
    n = features.shape[0]
    count, crops = max(1, int(share * n)), min(crops, n)
    received = features.abs().sum(dim=1)
    assert holov.pick_order(received, count, crops).tolist() == naive_holov(received, count, crops)


@few
@given(features=awkward_rows(), keys=awkward_rows(300, 300), share=st.floats(0.01, 1), on_keys=st.booleans())
def test_tome_equals_the_full_matrix_form(features, keys, share, on_keys):
    n = features.shape[0]
    count = max(1, int(share * n))
    tokens = VisualTokens(features=features, grid=(1, 1, n), trace=EncoderTrace(keys=keys[:n]))
    compressor: Any = build("tome", metric="keys" if on_keys else "features")
    selection, sizes = compressor.merge(tokens, count)
    place, rows, naive_sizes = naive_tome(features, keys[:n] if on_keys else None, count)
    assert selection.kept.tolist() == place
    assert sizes.tolist() == naive_sizes
    torch.testing.assert_close(selection.features, rows)


@few
@given(
    grid=st.tuples(st.integers(1, 4), st.integers(1, 9), st.integers(1, 8)),
    rows=awkward_rows(300, 300),
    share=st.floats(0.01, 1),
    sim=st.booleans(),
    restore_norm=st.booleans(),
)
def test_fusion_equals_the_form_that_goes_window_by_window(grid, rows, share, sim, restore_norm):
    n = math.prod(grid)
    features, count = rows[:n], max(1, int(share * n))
    compressor: Any = build("fusion2x2", weights="sim" if sim else "avg", restore_norm=restore_norm)
    selection, sizes = compressor.fuse(VisualTokens(features=features, grid=grid), count)
    place, naive_rows, naive_sizes = naive_fusion2x2(features, grid, count, sim, restore_norm)
    assert selection.kept.tolist() == place
    assert sizes.tolist() == naive_sizes
    torch.testing.assert_close(selection.features, naive_rows)


@few
@given(features=awkward_rows(), hidden=st.integers(1, 7))
def test_scores_equal_the_quadratic_form(features, hidden):
    torch.manual_seed(hidden)
    scorer = Scorer(5, hidden).double()
    for parameter in scorer.parameters():
        torch.nn.init.normal_(parameter)
    torch.testing.assert_close(scorer(features), naive_scores(scorer, features), rtol=1e-11, atol=1e-12)
    row = torch.zeros(features.shape[0], dtype=torch.long)
    assert scorer(features[row]).unique().numel() == 1  # equal tokens, bitwise equal scores


def test_scores_stay_in_full_precision():
    scorer, features = random_scorer(), some_tokens(64).features
    exact = naive_scores(random_scorer().double(), features.double())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = scorer(features)
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores.double(), exact, rtol=1e-5, atol=1e-5)
    assert scorer(features.bfloat16()).dtype == torch.float32
    assert scorer(features.double()).dtype == torch.float64


def test_gradient_of_the_query_bias_is_zero_through_the_mask():
    scorer = random_scorer().requires_grad_(True)
    mask = soft_topk(scorer(some_tokens(30).features)[None], 6)
    (mask * torch.rand(1, 30)).sum().backward()
    assert scorer.q_proj.bias.grad is not None
    assert scorer.k_proj.weight.grad is not None
    assert scorer.q_proj.bias.grad.abs().max() < 1e-5 * scorer.k_proj.weight.grad.abs().max()


def test_naive_attention_sums_to_the_number_of_queries():
    q, k = torch.randn(3, 10, 4), torch.randn(3, 10, 4)
    torch.testing.assert_close(naive_received(q, k).sum(), torch.tensor(10.0))


# --- soft top-k -----------------------------------------------------------------------------------------------------


@few
@given(
    rows=st.integers(1, 4),
    n=st.integers(2, 200),
    share=st.floats(0, 1),
    spread=st.sampled_from([0.0, 1e-4, 1.0, 50.0]),
    seed=st.integers(0, 999),
)
def test_soft_topk_rows_sum_to_k(rows, n, share, spread, seed):
    k = min(n - 1, max(1, int(share * n)))
    scores = torch.randn(rows, n, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * spread
    scores.requires_grad_()
    mask = soft_topk(scores, k)
    assert ((mask > 0) & (mask < 1)).all() or spread == 50.0
    torch.testing.assert_close(mask.sum(dim=1), torch.full((rows,), float(k), dtype=torch.float64), atol=1e-6, rtol=0)
    (gradient,) = torch.autograd.grad(mask, scores, torch.randn_like(mask))
    assert gradient.sum(dim=1).abs().max() < 1e-9
    ours = soft_topk(scores, torch.full((rows,), k))
    assert torch.equal(ours, mask)


def test_soft_topk_in_single_and_half_precision():
    scores = torch.randn(3, 2048)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        mask = soft_topk(scores.to(dtype), 409)
        assert mask.dtype == torch.float32
        torch.testing.assert_close(mask.sum(dim=1), torch.full((3,), 409.0), rtol=1e-6, atol=0)


def test_soft_topk_bracket_holds_for_one_token_of_very_many():
    scores = torch.zeros(1, 60_000, dtype=torch.float64)  # a share of 1.7e-5, beyond the published bracket
    assert soft_topk(scores, 1).sum().item() == pytest.approx(1, abs=1e-9)
    assert soft_topk(scores, 59_999).sum().item() == pytest.approx(59_999, abs=1e-6)


def test_soft_topk_gradient_by_finite_differences():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(3, 9, generator=generator, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda s: soft_topk(s, 4), scores, eps=1e-6, atol=1e-6)
    k = torch.tensor([1, 4, 5])
    valid = torch.arange(9)[None] < torch.tensor([9, 7, 6])[:, None]
    assert torch.autograd.gradcheck(lambda s: soft_topk(s, k, valid), scores, eps=1e-6, atol=1e-6)


def test_soft_topk_ragged_rows_equal_rows_alone():
    scores = torch.randn(3, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    sizes, k = [12, 7, 5], torch.tensor([3, 6, 1])
    valid = torch.arange(12)[None] < torch.tensor(sizes)[:, None]
    padded = scores.masked_fill(~valid, torch.nan).requires_grad_()  # whatever stands there must not matter
    mask = soft_topk(padded, k, valid)
    mask.backward(torch.ones_like(mask).masked_fill(~valid, torch.nan))
    assert padded.grad is not None
    for row, size in enumerate(sizes):
        alone = soft_topk(scores[row : row + 1, :size], int(k[row]))
        torch.testing.assert_close(mask[row, :size], alone[0])
        assert (mask[row, size:] == 0).all()
        assert (padded.grad[row, size:] == 0).all()
        assert not padded.grad[row].isnan().any()


@pytest.mark.parametrize(
    "k", [0, 5, -1, 6, True, 2.0, torch.tensor([2]), torch.tensor([2.0, 2.0]), torch.tensor([0, 2])]
)
def test_soft_topk_refuses_a_bad_k(k):
    with pytest.raises(InputError):
        soft_topk(torch.zeros(2, 5), k)


def test_soft_topk_refuses_bad_shapes():
    valid = torch.tensor([[True, True, False], [True, True, True]])
    for scores, k, mask in (
        (torch.zeros(3), 1, None),
        (torch.zeros(2, 3, dtype=torch.long), 1, None),
        (torch.zeros(2, 3), 2, valid),  # the first row has two places only
        (torch.zeros(2, 3), 1, valid.float()),
        (torch.zeros(2, 3), 1, valid[:1]),
    ):
        with pytest.raises(InputError):
            soft_topk(scores, k, mask)


# --- memory ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CHOOSERS)
def test_no_square_array_at_16384_tokens(name):
    n = 16384
    tokens = some_tokens(n, width=64)
    compressor = make(name, width=64)
    compressor.compress(some_tokens(4, width=64), 2)  # anything loaded once is not what is measured
    # Each pick allocates the same, and rounds of eight less and less.
    count = {"divprune": 16, "idpruner": 200, "id_selection": 200, "cdpruner": 200, "vispruner": n - 200}.get(
        name, n // 5
    )
    with Allocations() as allocations:
        compressor.compress(tokens, count)
    assert 0 < allocations.largest < n * 1024
    assert allocations.peak_bytes < 4 * n * 2048


def test_allocations_are_counted():
    with Allocations() as allocations:
        first = torch.ones(1000) + 1
        del first
        second = torch.ones(10, 50).T.contiguous()
    assert allocations.largest == 1000
    assert allocations.peak_bytes == 8000
    assert second.shape == (50, 10)


def test_top_k_breaks_ties_by_index_and_ranks_nan_last():
    assert top_k(torch.tensor([1.0, 2.0, 2.0, torch.nan, 2.0]), 2).tolist() == [1, 2]
    assert top_k(torch.tensor([torch.nan, -5.0]), 1).tolist() == [1]
