"""`tome`: pairs of similar tokens are merged, round after round (ToMe, arXiv 2210.09461)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from visionselector_eval.baselines.contract.base import Compressor, Selection, VisualTokens, traced
from visionselector_eval.baselines.contract.errors import InputError
from visionselector_eval.baselines.contract.numerics import rounded, unit_rows, working_dtype

_BLOCK = 512  # rows of similarities that exist at one time


@dataclass(frozen=True, kw_only=True)
class ToMe(Compressor):
    """Merges each of the most similar pairs of tokens into one, by bipartite matching.

    In a round the tokens at even places look for their most similar one among those at odd places, and the q best of
    these pairs merge into means weighted by size; rounds with q = min(N - K, N // 2) until K are left. A merged token
    stands at the place of its odd member. Source: ToMe, arXiv 2210.09461. Upstream leaves the tokens out of
    order and adds log(size) to the attention of a ViT, which has no counterpart before an LLM; `upstream_exact` only
    widens the scope to the whole prompt.
    """

    name = "tome"
    paper = "ToMe, arXiv 2210.09461"
    deviations = (
        "before the LLM instead of inside a ViT: no log(size) in the attention; raster order; rounds until K are left"
    )
    cost = "time O(N^2 D) over all rounds, memory O(N D)"

    metric: str = field(
        default="features",
        metadata={"help": "what similarity is measured on: features, or keys (of the vision encoder, as in the paper)"},
    )

    def __post_init__(self) -> None:
        if self.metric not in ("features", "keys"):
            raise InputError(f"option metric={self.metric!r} of method 'tome' is unknown: give features or keys")
        object.__setattr__(self, "needs", frozenset({"keys"} if self.metric == "keys" else ()))

    @torch.no_grad()
    def compress(self, tokens: VisualTokens, count: int) -> Selection:
        """Merge N tokens into `count`; features: (count, D), a token that was not merged unchanged.

        Raises:
            InputError: metric="keys" where the trace lacks `keys`.
        """
        return self.merge(tokens, count)[0]

    def merge(self, tokens: VisualTokens, count: int) -> tuple[Selection, Tensor]:
        """The selection, and how many of the N tokens are in each kept one: (count,), summing to N."""
        features = tokens.features
        x = features.to(working_dtype(features))
        metric = x
        if self.metric == "keys":
            (keys,) = traced(tokens, self.name, "keys")
            metric = keys.to(working_dtype(keys))
        place = torch.arange(x.shape[0], device=x.device)
        size = x.new_ones(x.shape[0])
        rounds: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        while (n := x.shape[0]) > count:
            merged = min(n - count, n // 2)
            best, closest = _most_similar(metric)
            ranked = closest.sort(descending=True, stable=True).indices
            sources = 2 * ranked[:merged]
            targets = 2 * best[ranked[:merged]] + 1
            on_features = metric is x
            x = _averaged(x, size, sources, targets)
            metric = x if on_features else _averaged(metric, size, sources, targets)
            before, size = size, _added(size, targets, size[sources])
            stays = (2 * ranked[merged:], torch.arange(1, n, 2, device=x.device))
            left = torch.cat(stays).sort().values  # places are ascending: so are they after this
            rounds.append((before, sources, targets, left))
            x, place, size = x[left], place[left], size[left]
            metric = x if on_features else metric[left]

        def merge(rows: Tensor) -> Tensor:
            for sizes, sources, targets, left in rounds:
                rows = _averaged(rows, sizes, sources, targets)[left]
            return rows

        return Selection(kept=place, features=x.to(features.dtype), merge=merge), size


def _most_similar(metric: Tensor) -> tuple[Tensor, Tensor]:
    """For each even row the number of its most similar odd row (the first of equals), and that cosine."""
    unit = unit_rows(metric.double())
    odd = unit[1::2].T
    best, closest = [], []
    for rows in unit[::2].split(_BLOCK):
        similarity = rounded(rows @ odd)
        values = similarity.amax(dim=1)
        closest.append(values)
        best.append((similarity == values[:, None]).to(torch.uint8).argmax(dim=1))
    return torch.cat(best), torch.cat(closest)


def _averaged(values: Tensor, size: Tensor, sources: Tensor, targets: Tensor) -> Tensor:
    """`values` where each target became the mean, by size, of itself and its sources; other rows are unchanged."""
    weighted = values * size.to(values.dtype)[:, None]
    sums = _added(weighted, targets, weighted[sources])
    sizes = _added(size, targets, size[sources]).to(values.dtype)
    result = values.clone()
    result[targets] = sums[targets] / sizes[targets][:, None]  # the same row for equal targets
    return result


def _added(values: Tensor, targets: Tensor, parts: Tensor) -> Tensor:
    """`values` with `parts` added to the rows `targets`, in a fixed order on every device (see visionzip)."""
    result = values.clone()
    if result.is_cuda:
        return result.index_put_((targets,), parts, accumulate=True)
    return result.index_add_(0, targets, parts)
