"""`prumerge_plus`: attended and evenly spaced tokens, each enriched by its neighbours (LLaVA-PruMerge)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from visionselector_eval.baselines.contract.base import Compressor, Selection, VisualTokens, traced
from visionselector_eval.baselines.contract.errors import InputError
from visionselector_eval.baselines.contract.numerics import unit_rows, working_dtype

_BLOCK = 128  # rows of similarities that exist at one time


@dataclass(frozen=True, kw_only=True)
class PruMergePlus(Compressor):
    """Keeps tokens of outstanding attention and evenly spaced ones, and adds to each those with the most similar keys.

    With I outliers of the attention (above Q3 + 1.5 IQR, at least 1): the I most attended, then K - I spaced over the
    whole scope, floor((i + 0.5) * N / (K - I)), and where one of these is an outlier the nearest free token instead;
    each becomes x_i + sum a_j x_j over its 32 nearest. Source: LLaVA-PruMerge, arXiv 2403.15388, in the form with a
    budget (the paper's own number of tokens depends on the image, and has one more for all that is dropped). Encoders
    with a CLS token give its attention and the keys of their last block, heads not split, and tokens are merged before
    the projector, as in the paper; others the attention received and the keys, heads side by side, and tokens are
    merged behind it. Attention received sums to 1 over the scope (the port's mean pooling leaves a quarter of that).
    `upstream_exact` spaces as the published port does, the first of 0, g, 2g, ... with g = N // K (mostly in the upper
    part of the image), and rounds K = max(1, int(r * N)) and I = max(1, int(N * rho)) over all of a prompt's images at
    once; where the port fills up at random, this goes by attention. The port leaves features in the order of rank while
    positions are sorted: here both are sorted.
    """

    name = "prumerge_plus"
    needs = frozenset({"cls_whole|cls|received", "keys_whole|keys_concat|keys", "patches"})
    renumbers = True
    paper = "LLaVA-PruMerge, arXiv 2403.15388"
    deviations = (
        "K tokens, as in the published port, without its misplaced features; spaced tokens cover the whole image, the "
        "port's its upper part"
    )
    cost = "time O(K N Dk + 32 K D), memory O(N (D + Dk))"

    neighbours: int = field(default=32, metadata={"help": "tokens with similar keys that are added to each kept one"})

    def __post_init__(self) -> None:
        if self.neighbours < 0:
            raise InputError(
                f"invalid option neighbours={self.neighbours!r} of method 'prumerge_plus': expected 0 or more"
            )

    def upstream_count(self, n: int, ratio: float) -> int:
        return int(ratio * n)

    @torch.no_grad()
    def compress(self, tokens: VisualTokens, count: int) -> Selection:
        """Keep `count` of N tokens; features: (count, D), summed in float32 (float64 for float64); scores: attention.

        Raises:
            InputError: where the trace lacks attention (`cls_whole`, `cls` or `received`, in this order) or keys
                (`keys_whole`, `keys_concat` or `keys`).
        """
        n = tokens.features.shape[0]
        given, keys = traced(tokens, self.name, "cls_whole|cls|received", "keys_whole|keys_concat|keys")
        attention = given.to(working_dtype(tokens.features)).nan_to_num(nan=0.0)
        if tokens.trace is not None and given is tokens.trace.received:  # a CLS token's is a row of a softmax already
            attention = attention / attention.sum().clamp(min=torch.finfo(attention.dtype).tiny)
        kept = self._kept(attention, count)

        neighbours = min(self.neighbours, n - 1)
        nearest = []
        if neighbours:
            unit = unit_rows(keys.double())
            nearest = [_nearest(unit, block, neighbours) for block in kept.split(_BLOCK)]

        def merge(rows: Tensor) -> Tensor:
            merged = rows[kept]
            for part, near in zip(merged.split(_BLOCK), nearest, strict=False):
                part += embedding_bag(near, rows, per_sample_weights=attention[near].to(rows.dtype), mode="sum")
            return merged

        merged = merge(tokens.rows.to(working_dtype(tokens.rows)))
        return Selection(kept=kept, features=tokens.finish(merged), scores=given, merge=merge)

    def _kept(self, attention: Tensor, count: int) -> Tensor:
        """(count,) ascending indices."""
        n = attention.shape[0]
        quarters = torch.tensor([0.25, 0.75], dtype=attention.dtype, device=attention.device)
        q1, q3 = attention.quantile(quarters)
        outliers = (attention > q3 + 1.5 * (q3 - q1)).sum()
        ranked = attention.sort(descending=True, stable=True).indices
        if not self.upstream_exact:
            most = ranked[: min(count, max(1, int(outliers)))].tolist()  # waits for the device once a scope
            kept = ranked.new_tensor([*most, *_spaced(n, count - len(most), most)])
            return kept.sort().values
        # Its arithmetic to the letter: int(49 * (1 / 49)) is 0 in binary.
        outliers = (n * (outliers.double() / n)).floor().long()
        index = torch.arange(n, device=attention.device)
        rank = torch.empty_like(index)
        rank[ranked] = index
        spaced = index % max(1, n // count) == 0
        # The smallest of these come first: outliers by rank, then spaced ones by place, then the rest by rank. The
        # number of outliers stays on the device.
        turn = torch.where(rank < outliers.clamp(min=1), rank, torch.where(spaced, n + index, 2 * n + rank))
        return turn.argsort()[:count].sort().values


def _spaced(n: int, count: int, taken: list[int]) -> list[int]:
    """`count` of the indices below `n` that are not `taken`: floor((i + 0.5) * n / count), or the nearest free one.

    Of two that are equally near, the lower.
    """
    ideal = [(2 * i + 1) * n // (2 * count) for i in range(count)]
    used = set(taken)
    blocked = [i for i in ideal if i in used]
    chosen = [i for i in ideal if i not in used]
    used.update(chosen)
    for i in blocked:
        near = (j for distance in range(1, n) for j in (i - distance, i + distance))
        free = next(j for j in near if 0 <= j < n and j not in used)
        used.add(free)
        chosen.append(free)
    return chosen


def _nearest(unit: Tensor, block: Tensor, neighbours: int) -> Tensor:
    """(len(block), neighbours) indices of the rows most like those of `block`, itself left out; the lower of equals."""
    similarity = unit[block] @ unit.T
    similarity.scatter_(1, block[:, None], -torch.inf)
    # topk breaks ties as it likes: of those equal to the last one, up to rounding, the first are taken.
    last = similarity.topk(neighbours, dim=1).values[:, -1:]
    slack = 8 * torch.finfo(similarity.dtype).eps
    sure = similarity > last + slack
    equal = (similarity >= last - slack) & ~sure
    taken = sure | (equal & (equal.cumsum(dim=1) <= neighbours - sure.sum(dim=1, keepdim=True)))
    # Exactly `neighbours` in each row, so that their places can be had without waiting for the device.
    n = unit.shape[0]
    indices = torch.where(taken, n - torch.arange(n, dtype=torch.float32, device=unit.device), 0)
    return n - indices.topk(neighbours, dim=1).values.long()
