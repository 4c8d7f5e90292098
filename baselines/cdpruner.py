"""`cdpruner`: a determinantal point process over features, weighted by the question (METHODS 3.12)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import LongTensor, Tensor
from torch.nn.functional import normalize

from .base import Compressor, InputError, Selection, VisualTokens, first_largest, unit_rows

_GUESS = 128  # tokens made ready together on the CPU, where one product for one token is bound by memory
_RECENT = 32  # picks whose share in those is taken out one by one


@dataclass(frozen=True, kw_only=True)
class CDPruner(Compressor):
    """Picks tokens that differ from each other and fit the question: greedy maximum of a determinant.

    The kernel is diag(rel) cos(V, V) diag(rel). Source: arXiv 2506.10967, METHODS 3.12. Upstream's relevance is CLIP's,
    negated; Qwen2.5-VL has no CLIP text tower, so here it is the cosine with the mean embedding of the question's
    tokens, from 0 to 1, larger for tokens like the question (`negate` turns it round). Without question tokens all are
    equally relevant. Tokens that the picked ones already span (copies) count as 0 and come last, by index, where
    upstream gives NaN. `upstream_exact` only widens the scope to the whole prompt: upstream's budgets are absolute.
    """

    name = "cdpruner"
    needs = frozenset({"text"})

    negate: bool = field(
        default=False,
        metadata={"help": "prefer tokens unlike the question, the sign upstream has with CLIP; compare both on data"},
    )

    @torch.no_grad()
    def compress(self, tokens: VisualTokens, count: int) -> Selection:
        """Keep `count` of N tokens; scores: the relevance, (N,).

        Raises
        ------
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
        return Selection(kept=pick_order(unit, scores, count).sort().values, scores=scores)  # type: ignore[arg-type]


def relevance(unit: Tensor, direction: Tensor) -> Tensor:
    """(N,) products of the rows with `direction`, as (s - min + 1e-6) / (max - min); 1 where all are equal."""
    similarity = torch.mv(unit, direction)
    low, high = similarity.aminmax()
    spread = high - low
    # Equal tokens differ by rounding alone: that is no relevance.
    flat = spread <= 8 * torch.finfo(unit.dtype).eps
    return torch.where(flat, 1.0, (similarity - low + 1e-6) / spread)


@torch.no_grad()
def pick_order(unit: Tensor, relevance: Tensor, count: int) -> LongTensor:
    """The indices CDPruner picks, in the order of picking; among equals, up to rounding, the lowest. O(N D) a pick.

    Greedy maximisation of det(L_S), L = diag(rel) U U' diag(rel). L is never formed: as L = B B' with rows
    b_i = rel_i u_i, picking by the largest diagonal of L's Cholesky remainder is picking the row of B with the largest
    part orthogonal to the picked ones. So an orthonormal basis of the picked rows, (K, D), takes the place of the
    (K, N) factor.

    Parameters
    ----------
    unit: (N, D) rows of length 1, or 0. relevance: (N,).
    """
    n, width = unit.shape
    eps = torch.finfo(unit.dtype).eps
    norm = relevance.square() * torch.linalg.vector_norm(unit, dim=1).square()
    # What a remainder has to exceed to be more than rounding.
    floor = norm * max(1e-12, 100 * eps)
    rounding = 8 * eps * norm
    slack = rounding
    remainder, bottom = norm.clone(), torch.zeros_like(norm)
    basis = unit.new_zeros(count, width)
    order = torch.empty(count, dtype=torch.int64, device=unit.device)
    # On a GPU a block is the pick alone, and nothing is read back.
    guess = 1 if unit.is_cuda else min(_GUESS, n)
    held: dict[int, int] = {}
    filled = 0
    for step in range(count):
        pick = first_largest(remainder, slack)
        order[step : step + 1] = pick
        if step + 1 == count:
            break
        place = 0 if guess == 1 else held.get(int(pick))
        if place is None or guess == 1:
            # The pick and those likely to come next: what is orthogonal to the basis so far, (block, D), and its
            # products with all rows of B, (block, N), side by side.
            block = pick
            if guess > 1:
                likely = torch.topk(remainder, guess).indices
                block = torch.cat([pick, likely[likely != pick]])[:guess]
                held = {token: i for i, token in enumerate(block.tolist())}
            place, filled = 0, step
            parts = relevance[block, None] * unit[block]
            parts -= (parts @ basis[:step].T) @ basis[:step]
            ready = torch.cat([parts, (parts @ unit.T).mul_(relevance)], dim=1)
            later = torch.empty_like(ready[:_RECENT])  # the same of the picks since then, of length 1
        elif step - filled == len(later):
            # Taking these from all rows at once is cheaper than from each row when it is picked.
            ready -= later.index_select(1, block + width).T @ later
            filled = step
        recent = later[: step - filled]
        row = ready[place] - recent.index_select(1, pick + width)[:, 0] @ recent
        row *= torch.where(remainder[pick] > 0, 1 / row[:width].norm().clamp(min=1e-30), 0)  # spanned: takes nothing
        later[step - filled] = row
        basis[step] = row[:width]
        # 0 for what is spanned, -inf for what is picked.
        bottom.index_fill_(0, pick, -torch.inf)
        remainder = remainder.addcmul(row[width:], row[width:], value=-1).index_fill_(0, pick, -torch.inf)
        some = remainder > floor
        remainder = torch.where(some, remainder, bottom)
        slack = rounding * some
    return order  # type: ignore[return-value]
