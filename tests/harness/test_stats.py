"""Statistics against known formulas, lmms-eval's and SciPy's own, and properties that must hold for any scores."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from visionselector_eval.harness.report.stats import (
    Interval,
    distinguishable,
    mean_of_differences,
    paired_difference,
    relative,
    scaled,
    spread,
    t_quantile,
)

SCORES = st.lists(st.tuples(st.floats(0, 1), st.floats(0, 1)), min_size=2, max_size=40)


def test_imports_neither_torch_nor_lmms_eval() -> None:
    module = "visionselector_eval.harness.report.stats"
    code = f"import sys, {module}; print({{'torch', 'lmms_eval', 'scipy.stats'}} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "set()\n"


def test_known_interval() -> None:
    # differences 1, 0, 0, 0, -1, 1: mean 1/6, variance 17/30, t(5, 0.975) = 2.570582
    interval = paired_difference([1, 1, 0, 0, 0, 1], [0, 1, 0, 0, 1, 0])
    assert interval.difference == pytest.approx(1 / 6)
    assert interval.se == pytest.approx(math.sqrt(17 / 30 / 6))
    assert interval.high - interval.difference == pytest.approx(2.570581836 * interval.se, rel=1e-8)
    assert (interval.units, interval.df) == (6, 5)
    assert not distinguishable(interval)


@pytest.mark.parametrize("n", [2, 3, 16, 500])
def test_equals_lmms_eval(n: int) -> None:
    metrics = pytest.importorskip("lmms_eval.api.metrics")
    rng = np.random.default_rng(n)
    a, b = rng.random(n), rng.integers(0, 2, n).astype(float)
    theirs = metrics.paired_ttest(a.tolist(), b.tolist())
    ours = paired_difference(a, b)
    assert ours.difference == pytest.approx(theirs["mean_diff"])
    assert ours.se == pytest.approx(theirs["se_diff"])
    assert (ours.low, ours.high) == pytest.approx((theirs["ci_lower"], theirs["ci_upper"]))
    # Clusters of one: the same. Real clusters: theirs lacks the factor G/(G-1), but for its own n/(n-1) part.
    singles = paired_difference(a, b, list(range(n)))
    assert singles.se == pytest.approx(ours.se)
    assert metrics.clustered_stderr((a - b).tolist(), list(range(n))) == pytest.approx(ours.se)
    if n == 500:
        groups = (np.arange(n) // 5).tolist()
        clustered = paired_difference(a, b, groups)
        assert clustered.se == pytest.approx(metrics.clustered_stderr((a - b).tolist(), groups), rel=0.02)
        assert clustered.units == 100


@pytest.mark.parametrize(
    ("df", "p", "quantile"),  # printed tables of Student's t; large df: the normal quantile
    [(1, 0.975, 12.7062), (2, 0.95, 2.91999), (7, 0.975, 2.36462), (30, 0.995, 2.75), (1e9, 0.975, 1.95996)],
)
def test_t_quantile_is_that_of_printed_tables(df: float, p: float, quantile: float) -> None:
    assert t_quantile(p, df) == pytest.approx(quantile, rel=1e-5)


def test_t_quantile_edges() -> None:
    assert t_quantile(0.5, 3) == 0
    for p, df in ((0.4, 3), (1.0, 3), (0.9, 0)):
        with pytest.raises(ValueError, match="are needed"):
            t_quantile(p, df)


def test_coverage_on_simulated_data() -> None:
    rng = np.random.default_rng(0)
    hits = 0
    for _ in range(1000):
        d = rng.normal(0.1, 1, 20)
        interval = paired_difference(d, np.zeros(20))
        hits += interval.low <= 0.1 <= interval.high
    assert 0.93 < hits / 1000 < 0.97


def test_clustered_coverage_where_the_plain_interval_fails() -> None:
    rng = np.random.default_rng(1)
    groups = np.repeat(np.arange(12), 8)
    plain, clustered = 0, 0
    for _ in range(500):
        d = rng.normal(0, 1, 12)[groups] + rng.normal(0, 0.3, 96)
        zero = np.zeros(96)
        plain += distinguishable(paired_difference(d, zero))
        clustered += distinguishable(paired_difference(d, zero, groups.tolist()))
    assert plain / 500 > 0.3
    assert 0.02 < clustered / 500 < 0.08


def test_no_interval_without_something_to_estimate_from() -> None:
    for interval in (
        paired_difference([], []),
        paired_difference([1.0], [0.0]),
        paired_difference([1.0, 0.0, 1.0], [0.0, 0.0, 0.0], ["a", "a", "a"]),
        paired_difference([1.0, math.nan], [0.0, 0.0]),
        mean_of_differences([]),
        mean_of_differences([paired_difference([1.0], [0.0])]),
    ):
        assert math.isnan(interval.low)
        assert not distinguishable(interval)


def test_a_constant_difference_needs_six_documents() -> None:
    few, enough = paired_difference([0.0] * 5, [1.0] * 5), paired_difference([0.0] * 6, [1.0] * 6)
    assert (few.low, few.high) == (-1, 0)
    assert (enough.low, enough.high) == (-1, -1)
    assert not distinguishable(few)
    assert distinguishable(enough)
    tenths = paired_difference([0.1 + 0.2] * 7, [0.3] * 7)  # equal but for the last bit
    assert (tenths.low, tenths.high) == (0, 0)


def test_shapes_are_checked() -> None:
    with pytest.raises(ValueError, match="same documents"):
        paired_difference([1.0], [1.0, 2.0])
    with pytest.raises(ValueError, match="clusters for"):
        paired_difference([1.0, 2.0], [1.0, 2.0], ["a"])


@given(SCORES)
def test_properties_of_the_interval(pairs: list[tuple[float, float]]) -> None:
    a, b = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
    there, back = paired_difference(a, b), paired_difference(b, a)
    assert there.low <= there.difference <= there.high
    assert (back.low, back.high) == pytest.approx((-there.high, -there.low), abs=1e-12)
    assert distinguishable(there) == (not there.low <= 0 <= there.high)
    same = paired_difference(a, a)
    assert (same.low, same.difference, same.high) == (0, 0, 0)
    wide = paired_difference(a, b, level=0.99)
    assert wide.low <= there.low + 1e-12
    assert wide.high >= there.high - 1e-12
    order = np.random.default_rng(0).permutation(len(a))
    mixed = paired_difference(np.array(a)[order], np.array(b)[order])
    assert (mixed.low, mixed.high) == pytest.approx((there.low, there.high), abs=1e-9)


@given(SCORES, st.floats(-50, 50))
def test_scaling(pairs: list[tuple[float, float]], factor: float) -> None:
    interval = paired_difference([pair[0] for pair in pairs], [pair[1] for pair in pairs])
    by = scaled(interval, factor)
    assert by.low <= by.high
    assert by.high - by.low == pytest.approx(abs(factor) * (interval.high - interval.low), abs=1e-9)


def test_mean_of_one_is_that_one_and_of_equals_is_narrower() -> None:
    rng = np.random.default_rng(3)
    part = paired_difference(rng.random(30), rng.random(30))
    one = mean_of_differences([part])
    assert (one.low, one.high, one.df) == pytest.approx((part.low, part.high, part.df))
    four = mean_of_differences([part] * 4)
    assert four.difference == pytest.approx(part.difference)
    assert four.se == pytest.approx(part.se / 2)
    assert four.df == pytest.approx(4 * 29)
    exact = Interval(0.0, 0.0, 0.0, 0.0, 30, 29.0)
    assert mean_of_differences([exact, part]).se == pytest.approx(part.se / 2)
    assert mean_of_differences([exact, exact]).high == 0


def test_relative() -> None:
    assert relative(0.4, 0.5) == pytest.approx(80)
    assert relative(1700, 1700) == 100
    assert relative(0.6, 0.5) == pytest.approx(120)
    assert relative(2.0, 1.0, higher_is_better=False) == 50
    assert relative(0.0, 0.5) == 0
    for score, full, high in ((0.5, 0.0, True), (0.0, 0.0, True), (1.0, 0.0, False), (0.0, 1.0, False), (1, -1, True)):
        assert math.isnan(relative(score, full, high))
    assert math.isnan(relative(math.nan, 1.0))


@given(st.floats(1e-6, 1e6), st.floats(1e-6, 1e6), st.floats(1e-3, 1e3), st.booleans())
def test_relative_has_no_unit(score: float, full: float, unit: float, high: bool) -> None:
    assert relative(full, full, high) == 100
    assert relative(score * unit, full * unit, high) == pytest.approx(relative(score, full, high))
    assume(abs(score - full) > 1e-9 * full)
    assert (relative(score, full, high) > 100) == ((score > full) == high)


def test_spread() -> None:
    assert spread([1.0, 2.0, 3.0]) == 1
    assert math.isnan(spread([1.0]))
    assert spread([0.7] * 3) < 1e-15
