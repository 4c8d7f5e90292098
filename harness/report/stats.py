"""The statistics of the tables: pure functions, no files, no frames.

The interval is that of lmms-eval's `paired_ttest` (tests compare the two), written out here for three reasons:
importing `lmms_eval.api.metrics` takes seconds and loads torch, which `report` does not need; clusters are handled with
it; and a constant difference gets an honest interval. lmms-eval's `clustered_stderr` is not used: without the factor
G/(G-1) it is near 0 where all documents are in one cluster, and far too small for a few.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import stdtrit

MINIMUM_UNITS = 8
"""Fewest independent documents, or clusters of them, from which tables show an interval: below it the t quantile
widens the interval up to sixfold (2.4 at 7 degrees of freedom, 12.7 at 1), so it says nothing about a method."""

TOO_FEW = "too few documents"
"""What stands in place of an interval from fewer than `MINIMUM_UNITS`."""

_ROUNDING = 1e-12
_SIGN_TEST_MINIMUM = 6  # 2 * 0.5**5 > 0.05: with fewer units no sign test can reject at 5 %


@dataclass(frozen=True, slots=True)
class Interval:
    """A difference with its confidence interval; `low` and `high` are nan where nothing can be estimated.

    Attributes:
        difference: the estimate.
        low, high: the interval.
        se: standard error.
        units: number of independent units: documents, or clusters of documents.
        df: degrees of freedom.
    """

    difference: float
    low: float
    high: float
    se: float
    units: int
    df: float


def paired_difference(
    scores: Sequence[float] | np.ndarray,
    base: Sequence[float] | np.ndarray,
    clusters: Sequence[Hashable] | None = None,
    *,
    level: float = 0.95,
) -> Interval:
    """Mean of the per-document differences `scores - base`, with its t interval.

    Without clusters: mean d, se = sd(d) / sqrt(n), t with n-1 degrees of freedom. With G clusters (several questions
    about one image): se^2 = G/(G-1) * sum_c (sum_{i in c} (d_i - mean))^2 / n^2, t with G-1; the same as before where
    every document is its own cluster.

    Where all differences are the same non-zero number the formula's interval has no width. It is kept from six units
    on; below that it is widened to 0, since no sign test could reject with so few.

    Args:
        scores, base: (n,) scores of the same documents in the same order.
        clusters: (n,) cluster of each document.
        level: coverage.
    """
    a, b = np.asarray(scores, dtype=np.float64), np.asarray(base, dtype=np.float64)
    if a.shape != b.shape or a.ndim != 1:
        raise ValueError(f"scores of the same documents are needed: {a.shape} and {b.shape}")
    if clusters is not None and len(clusters) != len(a):
        raise ValueError(f"{len(clusters)} clusters for {len(a)} documents")
    n = len(a)
    if n == 0 or not (np.isfinite(a).all() and np.isfinite(b).all()):
        return Interval(math.nan, math.nan, math.nan, math.nan, n, math.nan)
    d = a - b
    # A mean over seeds of equal numbers can be off by one bit; that is no difference.
    d[np.abs(d) <= _ROUNDING * np.maximum(np.abs(a), np.abs(b))] = 0.0
    mean = float(d.mean())
    sums: np.ndarray = d - mean
    if clusters is not None:
        place: dict[Hashable, int] = {}
        index = [place.setdefault(cluster, len(place)) for cluster in clusters]
        sums = np.bincount(index, weights=sums)
    units = len(sums)
    if units < 2:
        return Interval(mean, math.nan, math.nan, math.nan, units, math.nan)
    se = math.sqrt(units / (units - 1) * float((sums**2).sum())) / n
    return _interval(mean, se, units, float(units - 1), level)


def mean_of_differences(parts: Sequence[Interval], *, level: float = 0.95) -> Interval:
    """The plain mean of independent differences (one a benchmark), with its interval.

    se^2 = sum se_t^2 / T^2; degrees of freedom by Welch and Satterthwaite. Any part without an interval leaves the
    result without one.
    """
    if not parts:
        return Interval(math.nan, math.nan, math.nan, math.nan, 0, math.nan)
    mean = math.fsum(part.difference for part in parts) / len(parts)
    units = sum(part.units for part in parts)
    variances = [part.se**2 for part in parts]
    total = math.fsum(variances)
    if not math.isfinite(total):
        return Interval(mean, math.nan, math.nan, math.nan, units, math.nan)
    largest = max(variances)
    if largest > 0:
        # divided by the largest first: the squares of tiny variances would underflow
        shares = [variance / largest for variance in variances]
        df = math.fsum(shares) ** 2 / math.fsum(share**2 / part.df for share, part in zip(shares, parts, strict=True))
    else:
        df = float(sum(part.df for part in parts))
    return _interval(mean, math.sqrt(total) / len(parts), units, df, level)


def scaled(interval: Interval, factor: float) -> Interval:
    """The interval of `factor` times the difference; a negative factor turns it round."""
    low, high = sorted((interval.low * factor, interval.high * factor))
    return Interval(interval.difference * factor, low, high, interval.se * abs(factor), interval.units, interval.df)


def shown(interval: Interval) -> Interval:
    """The interval as tables show it: without its ends where it comes from fewer than `MINIMUM_UNITS`."""
    if interval.units >= MINIMUM_UNITS:
        return interval
    return Interval(interval.difference, math.nan, math.nan, math.nan, interval.units, math.nan)


def distinguishable(interval: Interval) -> bool:
    """Whether the interval leaves 0 out. False where there is no interval: nothing has been shown then."""
    return interval.low > 0 or interval.high < 0


def relative(score: float, full: float, higher_is_better: bool = True) -> float:
    """Per cent of the full model's score: 100 * score / full, or 100 * full / score where less is better.

    nan where that has no meaning: a full score of 0 or below (nothing to be relative to), or a denominator
    of 0.
    """
    if not (math.isfinite(score) and math.isfinite(full)) or full <= 0:
        return math.nan
    if higher_is_better:
        return 100.0 * (score / full)
    return 100.0 * (full / score) if score > 0 else math.nan


def spread(values: Sequence[float]) -> float:
    """Standard deviation over seeds (n-1); nan for fewer than two."""
    if len(values) < 2:
        return math.nan
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def _interval(mean: float, se: float, units: int, df: float, level: float) -> Interval:
    if se <= _ROUNDING * abs(mean):
        low, high = (mean, mean) if units >= _SIGN_TEST_MINIMUM else (min(mean, 0.0), max(mean, 0.0))
        return Interval(mean, low, high, 0.0, units, df)
    half = t_quantile(0.5 + level / 2, df) * se
    return Interval(mean, mean - half, mean + half, se, units, df)


def t_quantile(p: float, df: float) -> float:
    """The p-quantile of Student's t, 0.5 <= p < 1, for any df > 0."""
    if not 0.5 <= p < 1 or not df > 0:
        raise ValueError(f"p in [0.5, 1) and df > 0 are needed: {p}, {df}")
    return float(stdtrit(df, p))
