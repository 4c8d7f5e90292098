"""`vispruner`: the most attended tokens, and of the rest those least like the others (VisPruner)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from visionselector_eval.baselines.contract.base import Compressor, Selection, VisualTokens, traced
from visionselector_eval.baselines.contract.errors import InputError
from visionselector_eval.baselines.contract.numerics import rounded, unit_rows

_BLOCK = 256  # rows of similarities that exist at one time
_NEAREST = 64  # similar tokens remembered for each token
_DROPPED = 8  # tokens that leave in one round


@dataclass(frozen=True, kw_only=True)
class VisPruner(Compressor):
    """Keeps the most attended tokens, and drops from the others, eight at a time, those most like another one.

    `important` of the K tokens go by attention. The others are, round after round, split into those at even and at odd
    places; the even ones most like an odd one leave. Source: VisPruner, arXiv 2412.01818. Attention is the CLS token's,
    and tokens are compared before the projector, where the encoder has a CLS token; else attention is what the
    encoder's tokens receive, and they are compared as the LLM sees them. Similarities are float64: a single swap shifts
    which tokens are at even places in all later rounds. Odd and short lists, which break upstream, work.
    `upstream_exact` rounds K = round(r * N) over all of a prompt's images at once.
    """

    name = "vispruner"
    needs = frozenset({"cls|received", "patches"})
    renumbers = True
    paper = "VisPruner, arXiv 2412.01818"
    deviations = "odd and short lists work; without a CLS token, received attention and features behind the projector"
    cost = "time O(N^2 D), memory O(N D)"

    important: float = field(default=0.5, metadata={"help": "share of the kept tokens that is chosen by attention"})

    def __post_init__(self) -> None:
        if not 0 <= self.important <= 1:
            raise InputError(
                f"invalid option important={self.important!r} of method 'vispruner': expected a share from 0 to 1"
            )

    def upstream_count(self, n: int, ratio: float) -> int:
        return round(ratio * n)  # half to even

    @torch.no_grad()
    def compress(self, tokens: VisualTokens, count: int) -> Selection:
        """Keep `count` of N tokens; scores: the attention, (N,)."""
        (attention,) = traced(tokens, self.name, "cls|received")
        ranked = torch.sort(attention.nan_to_num(nan=-torch.inf), descending=True, stable=True).indices
        important = int(count * self.important)
        kept, rest = ranked[:important], ranked[important:]
        if important < count:
            rest = rest[diverse(tokens.rows[rest], count - important)]
            kept = torch.cat([kept, rest])
        return Selection(kept=kept.sort().values, scores=attention)


@torch.no_grad()
def diverse(features: Tensor, count: int) -> Tensor:
    """The `count` rows that stay when those most like another one leave, in no order.

    Upstream computes all similarities again in each of the (R - count) / 8 rounds. Here each row's 64 most similar ones
    are found once, by blocks; the first of them that is among the round's odd rows says the row's similarity. A row
    that has none left is compared with all again, and gets a new list. What stays is the same. The rounds read back
    from the device one answer for eight tokens: whether there is such a row.

    Args:
        features: (R, D), in the order in which the first round splits them; compared in float64 whatever their dtype.
        count: 1 <= count <= R.
    """
    unit = unit_rows(features.double())
    total = unit.shape[0]
    left = torch.arange(total, device=unit.device)
    if total <= count:
        return left
    listed = min(_NEAREST, total)
    nearest = torch.empty(total, listed, dtype=torch.int64, device=unit.device)
    similarity = unit.new_empty(total, listed)
    for block in left.split(_BLOCK):
        similarity[block], nearest[block] = rounded(unit[block] @ unit.T).topk(listed, dim=1)
    is_odd = torch.zeros(total, dtype=torch.bool, device=unit.device)
    while (size := left.shape[0]) > count:
        even, odd = left[::2], left[1::2]
        is_odd.zero_()
        is_odd[odd] = True
        there = is_odd[nearest[even]]
        found, first = there.any(dim=1), there.to(torch.uint8).argmax(dim=1, keepdim=True)
        best = similarity[even].gather(1, first)[:, 0]
        if not bool(found.all()):
            lost = (~found).nonzero()[:, 0]
            others = unit[left]
            for block in lost.split(_BLOCK):
                tokens = even[block]
                against = rounded(unit[tokens] @ others.T)
                best[block] = against[:, 1::2].amax(dim=1)
                values, at = against.topk(min(listed, size), dim=1)
                nearest[tokens] = tokens[:, None]  # itself is never odd when it asks
                similarity[tokens, : values.shape[1]] = values
                nearest[tokens, : values.shape[1]] = left[at]
        dropped = min(_DROPPED, size - count, even.shape[0])
        order = best.sort(descending=True, stable=True).indices
        left = torch.cat([even[order[dropped:]], odd])
    return left
