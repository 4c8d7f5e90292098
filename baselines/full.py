"""`full`: every visual token, the row that all others are compared with."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from visionselector_eval.baselines.contract.base import Compressor, Selection, VisualTokens
from visionselector_eval.baselines.contract.budget import Budget


@dataclass(frozen=True, kw_only=True)
class Full(Compressor):
    """The backbone itself: keeps every visual token, whatever the budget."""

    name = "full"
    paper = "none: the row that others are compared with"
    deviations = "none"
    cost = "none"

    def count(self, n: int, budget: Budget) -> int:
        return n

    def compress(self, tokens: VisualTokens, count: int) -> Selection:
        return Selection(kept=torch.arange(tokens.features.shape[0], device=tokens.features.device))
