"""`divprune`: diversity by max-min distances (METHODS 3.3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import LongTensor, Tensor

from .base import Compressor, Selection, SimilarityRows, VisualTokens, first_largest, unit_rows

_BLOCK = 512  # rows of similarities that exist at one time, and never more than a quarter of all


@dataclass(frozen=True, kw_only=True)
class DivPrune(Compressor):
    """Keeps tokens far from each other: each pick is the one farthest from its nearest already kept token.

    Reads the features alone; no attention, no question. Source: arXiv 2503.02175, METHODS 3.3. Here a token
    is picked once (upstream's rounding can pick one twice) and K is at least 1; `upstream_exact` rounds K as
    int(round(r * N)), half to even, over all of a prompt's images at once.
    """

    name = "divprune"

    def upstream_count(self, n: int, ratio: float) -> int:
        return round(ratio * n)  # half to even

    def compress(self, tokens: VisualTokens, count: int) -> Selection:
        """Keep `count` of N tokens; kept: (count,) int64, ascending (`pick_order` tells the order)."""
        return Selection(kept=pick_order(tokens.features, count).sort().values)  # type: ignore[arg-type]


@torch.no_grad()
def pick_order(features: Tensor, count: int) -> LongTensor:
    """The indices DivPrune picks, in the order of picking.

    With cosine distance d: first the token whose nearest other token is farthest, then again and again the
    token whose nearest picked token is farthest. Among equals, up to rounding, the lowest index. O(N^2 D)
    once for the first pick, O(N D) for each later one; at most 512 rows of the similarities, and a quarter of
    them all, exist at a time.

    Parameters
    ----------
    features: (N, D) any float dtype; computed in float64 for float64, else in float32. Rows of zeros (and
        rows with NaN, read as zeros) have distance 1 to every token.
    count: 1 <= count <= N.

    Returns
    -------
    (count,) int64 on the features' device, unique.
    """
    unit = unit_rows(features)
    n = unit.shape[0]

    # Similarity s = 1 - d: the farthest token is the one with the smallest s to its nearest token. Here
    # nearest means nearest other token (the second-smallest distance of a column), later nearest picked
    # token.
    closest = unit.new_full((n,), -torch.inf)
    block = min(_BLOCK, -(-n // 4))
    for start in range(0, n, block):
        # Similarity is symmetric: a block's columns say for the rows below what those would say again.
        rows = unit[start : start + block] @ unit[start:].T
        rows.fill_diagonal_(-torch.inf)
        for part, nearest in ((closest[start : start + block], rows.amax(dim=1)), (closest[start:], rows.amax(dim=0))):
            torch.maximum(part, nearest, out=part)
    pick = first_largest(-closest)
    order = torch.empty(count, dtype=torch.long, device=unit.device)
    order[:1] = pick
    closest.fill_(-torch.inf)
    rows_of = SimilarityRows(unit)
    for step in range(1, count):
        # The next picks come mostly from those that are farthest now.
        torch.maximum(closest, rows_of(pick, -closest), out=closest)
        closest.index_fill_(0, pick, torch.inf)  # never again: +inf survives every later maximum
        pick = first_largest(-closest)
        order[step : step + 1] = pick
    return order  # type: ignore[return-value]
