"""`divprune`: diversity by max-min distances (METHODS 3.3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import LongTensor, Tensor
from torch.nn.functional import normalize

from .base import Compressor, Selection, VisualTokens, working_dtype

_BLOCK = 512  # rows of similarities that exist at one time
# Up to so many tokens (16 MiB in float32) all rows are kept: the first pick has to compute them in any case.
_HELD = 2048


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
    once for the first pick. Each later one costs O(N) up to 2048 tokens and O(N D) beyond, where only a block
    of the similarities ever exists: O(N) memory beside a normalised copy of the features.

    Parameters
    ----------
    features: (N, D) any float dtype; computed in float64 for float64, else in float32. Rows of zeros (and
        rows with NaN, read as zeros) have distance 1 to every token.
    count: 1 <= count <= N.

    Returns
    -------
    (count,) int64 on the features' device, unique.
    """
    unit = normalize(features.to(working_dtype(features)), dim=-1, eps=1e-12).nan_to_num_()
    n = unit.shape[0]
    held = unit @ unit.T if n <= _HELD else None

    # Similarity s = 1 - d: the farthest token is the one with the smallest s to its nearest token. Here
    # nearest means nearest other token (the second-smallest distance of a column), later nearest picked
    # token.
    closest = unit.new_empty(n)
    for start in range(0, n, _BLOCK):
        stop = min(start + _BLOCK, n)
        rows = unit[start:stop] @ unit.T if held is None else held[start:stop]
        rows.diagonal(start).fill_(-torch.inf)
        closest[start:stop] = rows.amax(dim=1)
    pick = _first_smallest(closest)
    order = torch.empty(count, dtype=torch.long, device=unit.device)
    order[:1] = pick
    closest.fill_(-torch.inf)
    for step in range(1, count):
        # `pick` stays a tensor throughout: reading it on the host would stop a GPU once for each token.
        if held is None:
            to_pick = torch.mv(unit, unit.index_select(0, pick)[0])
        else:
            to_pick = held.index_select(0, pick)[0]
        torch.maximum(closest, to_pick, out=closest)
        closest.index_fill_(0, pick, torch.inf)  # never again: +inf survives every later maximum
        pick = _first_smallest(closest)
        order[step : step + 1] = pick
    return order  # type: ignore[return-value]


def _first_smallest(values: Tensor) -> Tensor:
    """(1,) the first index whose value is the smallest up to rounding.

    A matrix product sums a row in an order that depends on the row's place, so that equal tokens get
    similarities a few units of rounding apart; a plain argmin would let that noise break their tie.
    """
    slack = 8 * torch.finfo(values.dtype).eps
    return (values <= values.amin() + slack).to(torch.uint8).argmax(dim=0, keepdim=True)
