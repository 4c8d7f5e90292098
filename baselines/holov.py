"""`holov`: the budget is shared among runs of the image by their attention (HoloV)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from visionselector_eval.baselines.contract.base import Compressor, Selection, VisualTokens, traced
from visionselector_eval.baselines.contract.errors import InputError

_CROPS = 1024 / 576  # 16 crops where 64 of 576 tokens stay, as in the paper


@dataclass(frozen=True, kw_only=True)
class HoloV(Compressor):
    """Cuts the raster sequence into crops, shares K among them by mean attention and keeps each one's most attended.

    Tokens that a full crop can't take go to the most attended tokens left, so that exactly K remain. Source: HoloV,
    arXiv 2510.02912. Its variance of similarities scales every crop alike (1.09 times the attention) and is left
    out: features change nothing. Upstream loses the tokens of full crops (zero rows instead), starves crops of one
    token, and its port reads attention in window order and one token off. `upstream_exact` only rounds
    K = max(1, int(r * N)) over all of a prompt's images at once.
    """

    name = "holov"
    needs = frozenset({"cls|received"})
    renumbers = True
    paper = "HoloV, arXiv 2510.02912"
    deviations = "the variance term, which changes nothing, is left out; what full crops can't take is given to others"
    cost = "time O(N log N), memory O(N)"

    crops: int = field(
        default=0, metadata={"help": "number of crops; 0: int(1024 / 576 * N / K), at least 1, as upstream"}
    )

    def __post_init__(self) -> None:
        if self.crops < 0:
            raise InputError(f"invalid option crops={self.crops!r} of method 'holov': expected 0 or more")

    def upstream_count(self, n: int, ratio: float) -> int:
        return int(ratio * n)

    def compress(self, tokens: VisualTokens, count: int) -> Selection:
        """Keep `count` of N tokens; scores: the attention, (N,)."""
        (attention,) = traced(tokens, self.name, "cls|received")
        n = attention.shape[0]
        crops = min(n, self.crops or max(1, int(_CROPS * n / count)))
        kept = pick_order(attention, count, crops).sort().values
        return Selection(kept=kept, scores=attention)


@torch.no_grad()
def pick_order(attention: Tensor, count: int, crops: int) -> Tensor:
    """(count,) indices by crop and then by descending attention, and last those that full crops had no room for.

    Args:
        attention: (N,) 0 or more; among equals the lower index comes first.
        crops: 1 <= crops <= N runs, the first N mod crops of them one token longer.
    """
    n = attention.shape[0]
    # float64: the shares are rounded down, where one unit of rounding can cost a token.
    attention = attention.double().nan_to_num(nan=0.0)
    index = torch.arange(n, device=attention.device)
    base, longer = divmod(n, crops)
    crop = torch.where(index < longer * (base + 1), index // (base + 1), (index - longer) // base)
    numbers = torch.arange(crops, device=attention.device)
    start = numbers * base + numbers.clamp(max=longer)
    size = base + (numbers < longer).long()

    # Each crop is a row of this, so that its sum has one order on every device.
    rows = (start[:, None] + torch.arange(base + 1, device=attention.device)).clamp(max=n - 1)
    inside = torch.arange(base + 1, device=attention.device) < size[:, None]
    mean = (attention[rows] * inside).sum(dim=1) / size
    total = mean.sum()
    share = torch.where(total > 0, mean / total, 1 / crops)
    allotted = (share * count + 1e-9).floor().long()
    best_crops = mean.sort(descending=True, stable=True).indices
    allotted[best_crops] += (numbers < count - allotted.sum()).long()

    by_attention = attention.sort(descending=True, stable=True).indices
    order = by_attention[crop[by_attention].sort(stable=True).indices]  # crop after crop, each by attention
    rank = index - start[crop]  # of order[i] in its crop; crops are runs, so order[i] is in crop[i]
    first = rank < allotted[crop]
    # Chosen by their crops in this order, then the others by attention.
    left = attention[order].masked_fill(first, torch.inf)
    return order[left.sort(descending=True, stable=True).indices[:count]]
