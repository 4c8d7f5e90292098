"""`divprune`: diversity by max-min distances (DivPrune, arXiv 2503.02175)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import LongTensor, Tensor

from visionselector_eval.baselines.contract.base import Compressor, Selection, VisualTokens
from visionselector_eval.baselines.contract.greedy import SimilarityRows, pick_all
from visionselector_eval.baselines.contract.numerics import first_largest, unit_rows

_BLOCK = 256  # rows of similarities that exist at one time, and never more than a quarter of all


@dataclass(frozen=True, kw_only=True)
class DivPrune(Compressor):
    """Keeps tokens far from each other: each pick is the one farthest from its nearest already kept token.

    Reads the features alone; no attention, no question. Source: DivPrune, arXiv 2503.02175. Here a token is
    picked once (upstream's rounding can pick one twice) and K is at least 1; `upstream_exact` rounds K as
    int(round(r * N)), half to even, over all of a prompt's images at once.
    """

    name = "divprune"
    renumbers = True
    paper = "DivPrune, arXiv 2503.02175"
    deviations = "no token is picked twice"
    cost = "time O(N^2 D) once and O(N D) a pick, memory O(N D)"

    def upstream_count(self, n: int, ratio: float) -> int:
        return round(ratio * n)  # half to even

    def compress(self, tokens: VisualTokens, count: int) -> Selection:
        """Keep `count` of N tokens; kept: (count,) int64, ascending (`pick_order` tells the order)."""
        return Selection(kept=pick_order(tokens.features, count).sort().values)  # type: ignore[arg-type]


@torch.no_grad()
def pick_order(features: Tensor, count: int) -> LongTensor:
    """The indices DivPrune picks, in the order of picking.

    With cosine distance d: first the token whose nearest other token is farthest, then again and again the
    token whose nearest picked token is farthest. Among equals, up to rounding, the lowest index. At most
    O(N^2 D) once for the first pick, O(N D) for each later one; at most 512 rows of the similarities, and a
    quarter of them all, exist at a time. On a GPU, up to 8192 tokens, all rows at once and one kernel (`pick_all`).

    Args:
        features: (N, D) any float dtype; computed in float64 for float64, else in float32. Rows of zeros (and rows with
            NaN, read as zeros) have distance 1 to every token.
        count: 1 <= count <= N.

    Returns:
        (count,) int64 on the features' device, unique.
    """
    unit = unit_rows(features)
    if (fused := pick_all(unit, None, 1.0, count)) is not None:
        return fused
    pick = _loneliest(unit)
    order = torch.empty(count, dtype=torch.long, device=unit.device)
    order[:1] = pick
    # Similarity s = 1 - d: the farthest token is the one with the smallest s to its nearest picked token.
    closest = unit.new_full((unit.shape[0],), -torch.inf)
    rows_of = SimilarityRows(unit)
    for step in range(1, count):
        # The next picks come mostly from those that are farthest now.
        torch.maximum(closest, rows_of(pick, -closest), out=closest)
        closest.index_fill_(0, pick, torch.inf)  # never again: +inf survives every later maximum
        pick = first_largest(-closest)
        order[step : step + 1] = pick
    return order  # type: ignore[return-value]


def _loneliest(unit: Tensor) -> Tensor:
    """(1,) the token whose most similar other token is least similar, of equals up to rounding the first.

    What a block of rows says about all columns is a bound for every token. Tokens whose bound is worse than the best
    token known so far need no rows of their own: on features without structure a quarter of the products is enough.
    Never more than half of them: similarity is symmetric, so that columns already asked as rows are left out.
    """
    n = unit.shape[0]
    slack = 8 * torch.finfo(unit.dtype).eps
    block = min(_BLOCK, -(-n // 4))
    closest = unit.new_full((n,), -torch.inf)
    known = torch.zeros(n, dtype=torch.bool, device=unit.device)
    left = torch.arange(n, device=unit.device)
    start = 0  # all before it are known
    while len(left):
        if 2 * len(left) > n - start:  # most of the rest: as it stands, so that columns fall away
            rows = torch.arange(start, min(n, start + block), device=unit.device)
            after = start + len(rows)
        else:
            rows, after = left[closest[left].argsort()[:block]], start
        similarity = unit[rows] @ unit[start:].T
        similarity.scatter_(1, (rows - start)[:, None], -torch.inf)
        torch.maximum(closest[start:], similarity.amax(dim=0), out=closest[start:])
        closest[rows] = torch.maximum(closest[rows], similarity.amax(dim=1))
        known[rows] = True
        start = after
        best = torch.where(known, closest, torch.inf).amin()
        left = (~known & (closest <= best + slack)).nonzero().squeeze(1)  # one wait for the device a block
    return first_largest(torch.where(known, -closest, -torch.inf))
