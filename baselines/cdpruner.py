"""`cdpruner`: a determinantal point process over features, weighted by the question (CDPruner)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import normalize

from visionselector_eval.baselines.contract.base import Compressor, Selection, VisualTokens
from visionselector_eval.baselines.contract.errors import InputError
from visionselector_eval.baselines.contract.numerics import first_largest, unit_rows

_GUESS = 128  # tokens made ready together on the CPU, where one product for one token is bound by memory
_RECENT = 32  # picks whose share in those is taken out one by one
_FRESH = 1024  # tokens that come into play together


@dataclass(frozen=True, kw_only=True)
class CDPruner(Compressor):
    """Picks tokens that differ from each other and fit the question: greedy maximum of a determinant.

    The kernel is diag(rel) cos(V, V) diag(rel). Source: CDPruner, arXiv 2506.10967. Upstream's relevance is CLIP's,
    negated; no backbone here has CLIP's text tower, so it is the cosine with the mean embedding of the question's
    tokens, from 0 to 1, larger for tokens like the question (`negate` turns it round). Without question tokens all are
    equally relevant. Tokens that the picked ones already span (copies) count as 0 and come last, by index, where
    upstream gives NaN. `upstream_exact` only widens the scope to the whole prompt: upstream's budgets are absolute.
    """

    name = "cdpruner"
    needs = frozenset({"text"})
    renumbers = True
    paper = "CDPruner, arXiv 2506.10967"
    deviations = "relevance is the cosine with the mean question token, not CLIP's; copies come last instead of NaN"
    cost = "time O(K N D + K^2 D), memory O(N D + K D)"

    negate: bool = field(
        default=False,
        metadata={"help": "prefer tokens unlike the question, the sign upstream has with CLIP; compare both on data"},
    )

    @torch.no_grad()
    def compress(self, tokens: VisualTokens, count: int) -> Selection:
        """Keep `count` of N tokens; scores: the relevance, (N,).

        Raises:
            InputError: where `tokens.text` is None.
        """
        if tokens.text is None:
            raise InputError("cdpruner needs the question's embeddings, which tokens.text does not hold")
        unit = unit_rows(tokens.features)
        if tokens.text.shape[0]:
            direction = normalize(tokens.text.to(unit.dtype).mean(dim=0), dim=0, eps=1e-12).nan_to_num_()
        else:
            direction = unit.new_zeros(unit.shape[1])
        scores = relevance(unit, -direction if self.negate else direction)
        return Selection(kept=pick_order(unit, scores, count).sort().values, scores=scores)


def relevance(unit: Tensor, direction: Tensor) -> Tensor:
    """(N,) products of the rows with `direction`, as (s - min + 1e-6) / (max - min); 1 where all are equal."""
    similarity = torch.mv(unit, direction)
    low, high = similarity.aminmax()
    spread = high - low
    # Equal tokens differ by rounding alone: that is no relevance.
    flat = spread <= 8 * torch.finfo(unit.dtype).eps
    return torch.where(flat, 1.0, (similarity - low + 1e-6) / spread)


@torch.no_grad()
def pick_order(unit: Tensor, relevance: Tensor, count: int) -> Tensor:
    """The indices CDPruner picks, in the order of picking; among equals, up to rounding, the lowest. O(N D) a pick.

    Greedy maximisation of det(L_S), L = diag(rel) U U' diag(rel). L is never formed: as L = B B' with rows
    b_i = rel_i u_i, picking by the largest diagonal of L's Cholesky remainder is picking the row of B with the largest
    part orthogonal to the picked ones. So an orthonormal basis of the picked rows, (K, D), takes the place of the
    (K, N) factor.

    Args:
        unit: (N, D) rows of length 1, or 0.
        relevance: (N,).
    """
    order = torch.empty(count, dtype=torch.int64, device=unit.device)
    rows = _Rows(unit, relevance, count)
    for step in range(count):
        pick = rows.largest(step)
        order[step : step + 1] = rows.index[pick]
        if step + 1 < count:
            rows.take(pick, step)
    return order


class _Rows:
    """The rows of B that can be the next pick, and how much of each lies outside the span of the picked ones.

    That remainder only shrinks, and starts as the row's own squared length. So rows shorter than the best remainder are
    left out until it has come down to them (not on a GPU, where knowing would mean waiting for it at every pick).

    Attributes:
        index: (M,) the tokens in play, ascending.
        remainder: (M,), -inf for what is picked, 0 for what is spanned.
    """

    def __init__(self, unit: Tensor, relevance: Tensor, count: int) -> None:
        n, width = unit.shape
        self._unit, self._relevance = unit, relevance
        self._eps = torch.finfo(unit.dtype).eps
        self._norm = relevance.square() * torch.linalg.vector_norm(unit, dim=1).square()
        self._basis = unit.new_zeros(count, width)
        # On a GPU a block is the pick alone, and nothing is read back.
        self._guess = 1 if unit.is_cuda else min(_GUESS, n)
        self._lengths, self._ranked = self._norm.sort(descending=True, stable=True)
        self._size = n if unit.is_cuda else self._apart(2 * count)
        self._set(self._norm.clone(), torch.zeros_like(self._norm))

    def _apart(self, size: int) -> int:
        """At least `size` of the rows by falling length, so that no two of equal length are parted."""
        if size >= len(self._lengths):
            return len(self._lengths)
        shorter = self._lengths[size:] < self._lengths[size - 1 : -1] * (1 - 16 * self._eps)
        return size + int(shorter.to(torch.uint8).argmax()) if bool(shorter.any()) else len(self._lengths)

    def _set(self, remainder: Tensor, bottom: Tensor) -> None:
        """Put the first `_size` rows by length in play; (N,) `remainder` and `bottom` (0, or -inf for picked ones)."""
        if self._size == len(self._norm):
            self.index = torch.arange(self._size, device=self._unit.device)
            self._rows = self._unit
        else:
            self.index = self._ranked[: self._size].sort().values
            self._rows = self._unit[self.index]
        norm = self._norm[self.index]
        self._weight = self._relevance[self.index]
        # What a remainder has to exceed to be more than rounding.
        self._floor = norm * max(1e-12, 100 * self._eps)
        self._rounding = 8 * self._eps * norm
        self.remainder, self._bottom = remainder[self.index], bottom[self.index]
        self._slack = self._rounding * (self.remainder > self._floor)
        self._held: dict[int, int] = {}

    def largest(self, step: int) -> Tensor:
        """(1,) place in `index` of the next pick, after `step` picks."""
        while self._size < len(self._norm):
            waiting = self._lengths[self._size] * (1 + 16 * self._eps)
            if bool(self.remainder.amax() > waiting):
                break
            self._widen(step)
        return first_largest(self.remainder, self._slack)

    def _widen(self, step: int) -> None:
        """Twice as many rows in play."""
        remainder, bottom = self._norm.clone(), torch.zeros_like(self._norm)
        remainder[self.index], bottom[self.index] = self.remainder, self._bottom
        before, self._size = self._size, self._apart(2 * self._size)
        for fresh in self._ranked[before : self._size].split(_FRESH):
            inside = (self._unit[fresh] @ self._basis[:step].T).square_().sum(dim=1)
            left = self._norm[fresh] - self._relevance[fresh].square() * inside
            spanned = left <= self._norm[fresh] * max(1e-12, 100 * self._eps)
            remainder[fresh] = left.masked_fill_(spanned, 0)
        self._set(remainder, bottom)

    def take(self, pick: Tensor, step: int) -> None:
        """Take the part of row `pick` that is orthogonal to the `step` picks before out of all rows."""
        width = self._unit.shape[1]
        place = 0 if self._guess == 1 else self._held.get(int(pick))
        if place is None or self._guess == 1:
            # The pick and those likely to come next: what is orthogonal to the basis so far, (block, D), and its
            # products with all rows of B, (block, M), side by side.
            block = pick
            if self._guess > 1:
                likely = torch.topk(self.remainder, min(self._guess, self._size)).indices
                block = torch.cat([pick, likely[likely != pick]])[: self._guess]
                self._held = {token: i for i, token in enumerate(block.tolist())}
            place, self._filled = 0, step
            parts = self._weight[block, None] * self._rows[block]
            parts -= (parts @ self._basis[:step].T) @ self._basis[:step]
            self._block = block
            self._ready = torch.cat([parts, (parts @ self._rows.T).mul_(self._weight)], dim=1)
            self._later = torch.empty_like(self._ready[:_RECENT])  # the same of the picks since then, of length 1
        elif step - self._filled == len(self._later):
            # Taking these from all rows at once is cheaper than from each row when it is picked.
            self._ready -= self._later.index_select(1, self._block + width).T @ self._later
            self._filled = step
        recent = self._later[: step - self._filled]
        row = self._ready[place] - recent.index_select(1, pick + width)[:, 0] @ recent
        # A spanned row takes nothing.
        row *= torch.where(self.remainder[pick] > 0, 1 / row[:width].norm().clamp(min=1e-30), 0)
        self._later[step - self._filled] = row
        self._basis[step] = row[:width]
        # 0 for what is spanned, -inf for what is picked.
        self._bottom.index_fill_(0, pick, -torch.inf)
        remainder = self.remainder.addcmul(row[width:], row[width:], value=-1).index_fill_(0, pick, -torch.inf)
        some = remainder > self._floor
        self.remainder = torch.where(some, remainder, self._bottom)
        self._slack = self._rounding * some
