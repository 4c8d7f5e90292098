"""Ratios of cells that were measured in the same rounds, with their intervals."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd

MIN_ROUNDS = 6
"""With fewer, no 95 % interval of a median exists."""

_RESAMPLES, _SEED = 2000, 0


@dataclass(frozen=True)
class Ratio:
    """How many times faster (smaller) than `full`, with the interval that a repetition falls into 19 times of 20.

    `low` and `high` are nan for fewer than six rounds.
    """

    estimate: float
    low: float
    high: float
    rounds: int

    def __str__(self) -> str:
        if math.isnan(self.estimate):
            return "-"
        interval = "" if math.isnan(self.low) else f" [{self.low:.2f}, {self.high:.2f}]"
        return f"{self.estimate:.2f}x{interval}"


def paired_ratio(full: pd.Series, own: pd.Series) -> Ratio:
    """Median over rounds of full / own, each round its own pair, with a bootstrap interval.

    The percentile interval (2000 resamples of the rounds) is where the true ratio lies; a second run has an error of
    its own, so it is widened by the square root of 2: it says where the same measurement lands when it is repeated.

    Args:
        full, own: values by round; rounds that only one of them has are left out.
    """
    both = pd.concat([full, own], axis=1, join="inner").dropna()
    values = (both.iloc[:, 0] / both.iloc[:, 1]).to_numpy(dtype=np.float64)
    values = values[np.isfinite(values)]
    n = len(values)
    if n == 0:
        return Ratio(math.nan, math.nan, math.nan, 0)
    estimate = float(np.median(values))
    if n < MIN_ROUNDS:
        return Ratio(estimate, math.nan, math.nan, n)
    drawn = np.random.default_rng(_SEED).integers(0, n, (_RESAMPLES, n))
    low, high = np.percentile(np.median(values[drawn], axis=1), [2.5, 97.5])
    return Ratio(estimate, estimate - math.sqrt(2) * (estimate - low), estimate + math.sqrt(2) * (high - estimate), n)


def by_round(rows: pd.DataFrame, column: str) -> pd.Series:
    """A column by round; empty where the rows don't have it."""
    if column not in rows:
        return pd.Series(dtype="float64")
    return rows.drop_duplicates("round", keep="last").set_index("round")[column].astype("float64")


def median(rows: pd.DataFrame, column: str) -> float:
    """Median of a column; nan where the rows don't have it."""
    return float(rows[column].median()) if column in rows and rows[column].notna().any() else math.nan
