"""`id_selection`: importance that fades around each token picked (arXiv 2604.05601)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from visionselector_eval.baselines.contract.base import Compressor, Selection, VisualTokens, traced
from visionselector_eval.baselines.contract.errors import InputError
from visionselector_eval.baselines.contract.greedy import greedy_pick
from visionselector_eval.baselines.contract.numerics import unit_rows


@dataclass(frozen=True, kw_only=True)
class IDSelection(Compressor):
    """Picks the most important token again and again, and takes importance from the tokens that are like it.

    Importance is the CLS token's attention in the vision encoder, or that received where there is none, from 0 to 1;
    each pick p takes exp(-gamma * (1 - cos)^2) * S_p from the others, never below 0. Source: ID-Selection,
    arXiv 2604.05601. No official code is known: the bound at 0 is that of two re-implementations, which also use
    attention inside the LLM.
    `upstream_exact` only widens the scope to the whole prompt.
    """

    name = "id_selection"
    needs = frozenset({"cls|received"})
    paper = "ID-Selection, arXiv 2604.05601"
    deviations = "importance from the vision encoder, bounded at 0 (no official code is known)"
    cost = "time O(K N D), memory O(N D)"

    gamma: float = field(
        default=20.0, metadata={"help": "how fast a pick's effect fades with distance; larger: only near copies suffer"}
    )

    def __post_init__(self) -> None:
        if not self.gamma >= 0:
            raise InputError(f"invalid option gamma={self.gamma!r} of method 'id_selection': expected 0 or more")

    def compress(self, tokens: VisualTokens, count: int) -> Selection:
        """Keep `count` of N tokens; scores: the attention, (N,)."""
        (attention,) = traced(tokens, self.name, "cls|received")
        kept = pick_order(tokens.features, attention, count, self.gamma).sort().values
        return Selection(kept=kept, scores=attention)


@torch.no_grad()
def pick_order(features: Tensor, importance: Tensor, count: int, gamma: float = 20.0) -> Tensor:
    """(count,) indices in the order of picking; among equals, up to rounding, the lowest first. O(N D) a pick.

    Args:
        features: (N, D).
        importance: (N,), any scale.
    """
    unit = unit_rows(features)
    low, high = importance.aminmax()
    # Where all are equal, all are 1: then only the distances decide.
    start = torch.where(high > low, (importance - low) / (high - low), 1).to(unit.dtype)
    return greedy_pick(unit, start, gamma, count, fades=True)
