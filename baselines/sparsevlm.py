"""`sparsevlm`: keeps the visual tokens that the question's words attend to, and merges others (SparseVLM)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import LongTensor, Tensor

from .base import Budget, DecoderCompressor, DecoderView, Selection, Share, shrinking, working_dtype

_CHUNK = 1 << 22  # weights or distances held at once (float32: 16 MiB)


@dataclass(frozen=True, kw_only=True)
class SparseVLM(DecoderCompressor):
    """Keeps, in three steps, the visual tokens that visual words of the question attend to, and merges some others.

    Raters are the question's tokens that the visual tokens resemble more than average, found once on the input
    embeddings. After layers 2, 6 and 15 of 32 (in proportion for other depths) the raters' mean attention ranks the
    visual tokens. Of those that go, the better 30 % are merged by density peaks into about a tenth as many tokens.
    Source: SparseVLM, arXiv 2410.04417 (v1.5). Canonically the tokens left are r^(1/3), r^(2/3) and r of all,
    merged ones included (at most half of them), without upstream's random noise; a merged token stands at its
    centre's place and keeps its position. Upstream has fixed lists for four budgets at 576 tokens, puts merged tokens
    behind the others and numbers positions anew; `upstream_exact` ranks all images together, with int(N * ratio)
    tokens and the merged ones on top.
    """

    name = "sparsevlm"
    needs = frozenset({"previous"})
    paper = "SparseVLM, arXiv 2410.04417"
    deviations = (
        "any budget instead of four lists; merged tokens count, and keep their places and positions; no random noise"
    )
    cost = "time O(N T D) once, at each of 3 stages O(S D Dk + T S H d + N^2 D), memory O(S Dk + N D)"

    def layers(self, depth: int) -> tuple[int, ...]:
        layers: list[int] = []
        for layer in (3, 7, 16):  # tokens go at the input of the layer after the one that ranks them
            layers.append(max(layers[-1] + 1 if layers else 1, round(layer * depth / 32)))
        return tuple(layers)

    def upstream_count(self, n: int, ratio: float) -> int:
        return int(n * ratio)

    def counts(self, n: int, budget: Budget, depth: int, total: int) -> tuple[int, ...]:
        final = self.count(n, budget)
        steps = shrinking(n, final, budget.ratio if isinstance(budget, Share) else final / n, 3)
        if not (self.upstream_exact and isinstance(budget, Share)):
            return steps
        left, counts = n, []
        for step in steps:
            survivors = min(step, left - 1) if left > 1 else left
            left = min(left, survivors + merged_into(left - survivors))
            counts.append(left)
        return tuple(counts)

    def keep(self, view: DecoderView, members: LongTensor, count: int) -> Selection:
        if "raters" not in view.memory:
            text = view.embeds[view.first_text]
            view.memory["raters"] = raters(view.embeds[view.first_visual], text) if len(text) else None
        if ("relation", view.layer) not in view.memory:
            chosen = view.memory["raters"]
            queries = view.text[chosen] if chosen is not None else view.visual.new_tensor([len(view.hidden) - 1])
            view.memory["relation", view.layer] = view.received(view.layer - 1, queries)[view.visual]
        relation = view.memory["relation", view.layer][members]
        states = view.hidden[view.visual[members]]
        size = len(members)

        # Merged tokens are part of the count: the fewer survive, the more go, and the more are merged.
        clusters, wanted = 0, min(1, count // 2)
        while wanted > clusters:
            clusters, wanted = wanted, min(merged_into(size - count + wanted), count // 2)
        order = relation.sort(descending=True, stable=True).indices
        survivors = order[: count - clusters]
        if not clusters:
            return Selection(kept=survivors.sort().values, scores=relation)
        recycled = order[count - clusters :][: max(clusters, recycled_of(size - count + clusters))].sort().values
        centres, merged = density_peaks(states[recycled], clusters)
        kept = torch.cat([survivors, recycled[centres]])
        features = torch.cat([states[survivors], merged.to(states.dtype)])
        place = kept.sort()
        return Selection(kept=place.values, features=features[place.indices], scores=relation)  # type: ignore[arg-type]


def recycled_of(dropped: int) -> int:
    """How many of `dropped` tokens are looked at for merging."""
    return min(dropped, int(0.3 * dropped) + 1)


def merged_into(dropped: int) -> int:
    """How many tokens they are merged into."""
    return int(recycled_of(dropped) / 10) + 1


def raters(visual: Tensor, text: Tensor) -> LongTensor:
    """The text tokens that the visual tokens resemble more than average.

    Parameters
    ----------
    visual: (N, D), text: (T, D): input embeddings.

    Returns
    -------
    (R,) int64, ascending, 1 <= R <= T; all T where none is above the mean.
    """
    dtype = working_dtype(visual)
    words = text.to(dtype)
    total = words.new_zeros(len(words))
    for rows in visual.split(max(1, _CHUNK // len(words))):
        total += (rows.to(dtype) @ words.T).softmax(-1).sum(0)
    mean = total / len(visual)
    above = mean > mean.mean()
    above |= ~above.any()
    return above.nonzero().squeeze(1)  # type: ignore[return-value]


def density_peaks(states: Tensor, clusters: int) -> tuple[LongTensor, Tensor]:
    """Clusters around tokens that are dense and far from denser ones; among equals the lower index comes first.

    Parameters
    ----------
    states: (M, D). clusters: C, 1 <= C <= M.

    Returns
    -------
    centres: (C,) int64, best first; merged: (C, D) plain means of each centre's nearest tokens, in `working_dtype`.
    """
    x = states.to(working_dtype(states))
    n, width = x.shape
    rows = torch.arange(n, device=x.device).split(max(1, _CHUNK // n))

    def distances(chunk: Tensor, others: Tensor) -> Tensor:
        # Not by one matrix product: its rounding would part equal tokens.
        return torch.cdist(x[chunk], others, compute_mode="donot_use_mm_for_euclid_dist") / width**0.5

    near, far = zip(*(_near_and_far(distances(r, x), clusters) for r in rows), strict=True)
    density = (-torch.cat(near).square().mean(1)).exp()
    delta = torch.cat([distances(r, x).masked_fill(density <= density[r, None], torch.inf).amin(1) for r in rows])
    delta = torch.where(delta.isinf(), torch.stack(far).amax(), delta)
    centres = (density * delta).sort(descending=True, stable=True).indices[:clusters]
    nearest = torch.cat([distances(r, x[centres]).argmin(1) for r in rows])
    nearest[centres] = torch.arange(clusters, device=x.device)  # also where two centres are equal
    sizes = nearest.bincount(minlength=clusters)
    merged = x.new_zeros(clusters, width).index_add_(0, nearest, x) / sizes[:, None]
    return centres, merged  # type: ignore[return-value]


def _near_and_far(distances: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    return distances.topk(clusters, largest=False).values, distances.amax()
