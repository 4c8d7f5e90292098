"""`divprune`: diversity by max-min distances (METHODS 3.3)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import LongTensor, Tensor
from torch.nn.functional import normalize

from .base import Compressor, Selection, VisualTokens, working_dtype

_BLOCK = 512  # rows of similarities that exist at one time, and never more than a quarter of all
_GUESS = 32  # rows computed together on the CPU, where one product for one row is bound by memory


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
    unit = normalize(features.to(working_dtype(features)), dim=-1, eps=1e-12).nan_to_num_()
    n = unit.shape[0]

    # Similarity s = 1 - d: the farthest token is the one with the smallest s to its nearest token. Here
    # nearest means nearest other token (the second-smallest distance of a column), later nearest picked
    # token.
    closest = unit.new_full((n,), -torch.inf)
    block = _block(n)
    for start in range(0, n, block):
        # Similarity is symmetric: a block's columns say for the rows below what those would say again.
        rows = unit[start : start + block] @ unit[start:].T
        rows.fill_diagonal_(-torch.inf)
        for part, nearest in ((closest[start : start + block], rows.amax(dim=1)), (closest[start:], rows.amax(dim=0))):
            torch.maximum(part, nearest, out=part)
    pick = _first_smallest(closest)
    order = torch.empty(count, dtype=torch.long, device=unit.device)
    order[:1] = pick
    closest.fill_(-torch.inf)
    row_of = _one_row if unit.is_cuda else _Guessing(n)
    for step in range(1, count):
        torch.maximum(closest, row_of(unit, pick, closest), out=closest)
        closest.index_fill_(0, pick, torch.inf)  # never again: +inf survives every later maximum
        pick = _first_smallest(closest)
        order[step : step + 1] = pick
    return order  # type: ignore[return-value]


def _block(n: int) -> int:
    return min(_BLOCK, -(-n // 4))


def _one_row(unit: Tensor, pick: Tensor, closest: Tensor) -> Tensor:
    """Similarities of `pick` to all tokens. It stays on the device: reading it here would stop a GPU at each pick."""
    return torch.mv(unit, unit.index_select(0, pick)[0])


class _Guessing:
    """Rows of similarities for a device whose memory is slow beside its arithmetic, and where reading a pick is free.

    A row costs a pass over all features, and so do 32 rows in one product. When a row is missing, those of the
    tokens that are farthest now come along: farthest-point picks come mostly from there. Which rows are guessed
    changes the time only.
    """

    def __init__(self, n: int) -> None:
        self._rows: dict[int, Tensor] = {}
        self._guess, self._most = min(_GUESS, _block(n)), _block(n)

    def __call__(self, unit: Tensor, pick: Tensor, closest: Tensor) -> Tensor:
        wanted = int(pick)
        if wanted not in self._rows:
            farthest = torch.topk(closest, self._guess, largest=False).indices.tolist()
            fresh = [wanted, *(i for i in farthest if i != wanted and i not in self._rows)]
            if len(self._rows) + len(fresh) > self._most:
                self._rows.clear()
            self._rows.update(zip(fresh, unit[fresh] @ unit.T, strict=True))
        return self._rows.pop(wanted)


def _first_smallest(values: Tensor) -> Tensor:
    """(1,) the first index whose value is the smallest up to rounding.

    A matrix product sums a row in an order that depends on the row's place, so that equal tokens get
    similarities a few units of rounding apart; a plain argmin would let that noise break their tie.
    """
    slack = 8 * torch.finfo(values.dtype).eps
    return (values <= values.amin() + slack).to(torch.uint8).argmax(dim=0, keepdim=True)
