"""`idpruner`: VisionSelector's scores against redundancy, by maximal marginal relevance."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from visionselector_eval.baselines.contract.base import Selection, VisualTokens
from visionselector_eval.baselines.contract.errors import InputError
from visionselector_eval.baselines.contract.greedy import greedy_pick
from visionselector_eval.baselines.contract.numerics import first_largest, unit_rows
from visionselector_eval.models.visionselector.compressor import ScorerCompressor


@dataclass(frozen=True, kw_only=True)
class IDPruner(ScorerCompressor):
    """Picks tokens that a trained scorer finds important and that are unlike those already picked.

    The first pick is the most important token, whatever the balance; each later one has the largest balance *
    importance - (1 - balance) * (its largest cosine to a picked token). Importance is VisionSelector's score, from 0
    to 1, with the same weights (option `scorer`, else the backbone's own). Source: IDPruner, arXiv 2602.13315, as
    released in Tencent AngelSlim; its paper speaks of soft top-k outputs, the code and we of raw scores. A token is
    picked once. `upstream_exact` rounds K = round(N * (1 - pruned)), half to even, over all of a prompt's images at
    once. The scorer of its published table is `scorer=angelslim`.
    """

    name = "idpruner"
    paper = "IDPruner, arXiv 2602.13315 (as released in Tencent AngelSlim)"
    deviations = "scores as in its code, not soft top-k outputs as in its paper; no token is picked twice"
    cost = "time O(K N D), memory O(N D)"

    balance: float = field(
        default=0.5,
        metadata={
            "help": "weight of importance against likeness: 1 is visionselector, 0 likeness alone after the first pick"
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.balance <= 1:
            raise InputError(
                f"invalid option balance={self.balance!r} of method 'idpruner': expected a share from 0 to 1"
            )

    def upstream_count(self, n: int, ratio: float) -> int:
        return round(n * (1 - (1 - ratio)))  # it is given the share that goes

    def compress(self, tokens: VisualTokens, count: int) -> Selection:
        """Keep `count` of N tokens; scores: the scorer's, (N,).

        Raises:
            InputError: no scorer, or features of another width.
        """
        scores = self.score(tokens)
        kept = pick_order(tokens.features, scores, count, self.balance).sort().values
        return Selection(kept=kept, scores=scores)


@torch.no_grad()
def pick_order(features: Tensor, scores: Tensor, count: int, balance: float = 0.5) -> Tensor:
    """(count,) indices in the order of picking; among equals, up to rounding, the lowest first. O(N D) a pick.

    Args:
        features: (N, D).
        scores: (N,), any scale.
    """
    unit = unit_rows(features)
    low, high = scores.aminmax()
    importance = ((scores - low) / (high - low + 1e-6)).to(unit.dtype)
    # The most important token comes first at every balance, also at 0, where all values would be equal. Its own value
    # is not looked at again.
    first = first_largest(importance)
    importance = (balance * importance).index_fill_(0, first, 2.0)
    return greedy_pick(unit, importance, 1 - balance, count)
