"""`divprune`: diversity by max-min distances (DivPrune, arXiv 2503.02175)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from visionselector_eval.baselines.contract.base import Compressor, Selection, VisualTokens
from visionselector_eval.baselines.contract.greedy import greedy_pick
from visionselector_eval.baselines.contract.numerics import unit_rows


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
        return Selection(kept=pick_order(tokens.features, count).sort().values)


@torch.no_grad()
def pick_order(features: Tensor, count: int) -> Tensor:
    """The indices DivPrune picks, in the order of picking.

    With cosine distance d: first the token whose nearest other token is farthest, then again and again the
    token whose nearest picked token is farthest. Among equals, up to rounding, the lowest index. At most
    O(N^2 D) once for the first pick, O(N D) for each later one (`greedy_pick`).

    Args:
        features: (N, D) any float dtype; computed in float64 for float64, else in float32. Rows of zeros (and rows with
            NaN, read as zeros) have distance 1 to every token.
        count: 1 <= count <= N.

    Returns:
        (count,) int64 on the features' device, unique.
    """
    return greedy_pick(unit_rows(features), None, 1.0, count)
