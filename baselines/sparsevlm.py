"""`sparsevlm`: keeps the visual tokens that the question's words attend to, and merges others (SparseVLM)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from visionselector_eval.baselines.contract.base import Selection
from visionselector_eval.baselines.contract.budget import Budget, Share, Tokens
from visionselector_eval.baselines.contract.decoder import DecoderCompressor, DecoderView, check_schedule, shrinking
from visionselector_eval.baselines.contract.errors import InputError
from visionselector_eval.baselines.contract.numerics import working_dtype

# The published lists: tokens that survive each stage, without the merged ones, for 576 tokens and 32 layers.
_LISTS = {192: (300, 200, 110), 128: (303, 110, 36), 96: (238, 48, 26), 64: (66, 30, 17)}
_N, _DEPTH = 576, 32
_CHUNK = 1 << 22  # weights or distances held at once (float32: 16 MiB)


@dataclass(frozen=True, kw_only=True)
class SparseVLM(DecoderCompressor):
    """Keeps, in three steps, the visual tokens that visual words of the question attend to, and merges some others.

    Raters are the question's tokens that the visual tokens resemble more than average, found once on the input
    embeddings. After layers 2, 6 and 15 of 32 (in proportion for other depths) the raters' mean attention ranks the
    visual tokens. Of those that go, the better 30 % are merged by density peaks into about a tenth as many tokens.
    Source: SparseVLM, arXiv 2410.04417 (v1.5). Canonically the tokens left are r^(1/3), r^(2/3) and r of all,
    merged ones included (at most half of them), without upstream's random noise; a merged token stands at its
    centre's place and keeps its position. Upstream puts merged tokens behind the others and counts positions again.
    `upstream_exact` takes raters from all text behind the last visual token, what bids the model to answer included,
    ranks all images together, with int(N * ratio) tokens and the merged ones, however many, on top.

    `schedule="published"` takes the published lists, which exist for 576 tokens an image and 32 layers (LLaVA-1.5-7B)
    and are called by the budgets 192tok, 128tok, 96tok and 64tok; anything else is refused. None of these is the number
    of tokens left, which tables show as kept: with the merged ones 309, 204 and 113 are left after the three stages at
    192tok (a mean of 206 over the layers), 312, 117 and 39 at 128tok (145), 249, 55 and 27 at 96tok (114), 82, 32 and
    18 at 64tok (82).
    """

    name = "sparsevlm"
    needs = frozenset({"previous"})
    paper = "SparseVLM, arXiv 2410.04417"
    deviations = (
        "any budget beside the four lists (option `schedule`); raters from the question alone, not from all text "
        "behind the image; merged tokens count, are at most half, and keep their places and positions; no random noise"
    )
    cost = "time O(N T D) once, at each of 3 stages O(S D Dk + T S H d + N^2 D), memory O(S Dk + N D)"

    schedule: str = field(
        default="geometric",
        metadata={
            "help": "geometric: r^(1/3), r^(2/3), r for any budget; published: the lists called 192tok, 128tok, 96tok "
            "and 64tok, for 576 tokens and 32 layers"
        },
    )

    def __post_init__(self) -> None:
        check_schedule(self.name, self.schedule)

    def check_budget(self, budget: Budget) -> None:
        if self.schedule == "published" and budget != Share(1.0):
            self._published(budget)

    def _published(self, budget: Budget) -> tuple[int, ...]:
        """The published list that `budget` names: survivors of each stage."""
        if not isinstance(budget, Tokens) or budget.number not in _LISTS:
            *names, last = (f"{number}tok" for number in _LISTS)
            raise InputError(
                f"budget {budget} contradicts schedule=published of method 'sparsevlm', whose lists are called "
                f"{', '.join(names)} and {last}: give one of these, or leave schedule out"
            )
        return _LISTS[budget.number]

    def layers(self, depth: int) -> tuple[int, ...]:
        if self.schedule == "published" and depth != _DEPTH:
            raise InputError(
                f"schedule=published of method 'sparsevlm' is for an LLM of {_DEPTH} layers, but this one has "
                f"{depth}: leave schedule out"
            )
        layers: list[int] = []
        for layer in (3, 7, 16):  # tokens go at the input of the layer after the one that ranks them
            layers.append(max(layers[-1] + 1 if layers else 1, round(layer * depth / 32)))
        return tuple(layers)

    def upstream_count(self, n: int, ratio: float) -> int:
        return int(n * ratio)

    def count(self, n: int, budget: Budget) -> int:
        if self.schedule == "published" and budget != Share(1.0):
            return self.counts(n, budget, _DEPTH, 0)[-1]
        return super().count(n, budget)

    def counts(self, n: int, budget: Budget, depth: int, total: int) -> tuple[int, ...]:
        if self.schedule == "published" and budget != Share(1.0):
            if n != _N:
                scope = "all images of a prompt together" if self.upstream_exact else "an image or video"
                raise InputError(
                    f"schedule=published of method 'sparsevlm' is for {_N} visual tokens, but {scope} has "
                    f"{n}: leave schedule out"
                )
            steps = self._published(budget)
        else:
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

    def keep(self, view: DecoderView, members: Tensor, count: int) -> Selection:
        words, text = self._words(view)
        if "raters" not in view.memory:
            view.memory["raters"] = raters(view.embeds[view.first_visual], words) if len(words) else None
        if ("relation", view.layer) not in view.memory:
            chosen = view.memory["raters"]
            queries = text[chosen] if chosen is not None else view.visual.new_tensor([len(view.hidden) - 1])
            view.memory["relation", view.layer] = view.received(view.layer - 1, queries)[view.visual]
        relation = view.memory["relation", view.layer][members]
        states = view.hidden[view.visual[members]]
        size = len(members)

        # Merged tokens are part of the count: the fewer survive, the more go, and the more are merged. Where two
        # numbers of survivors add up to the same count, it is the larger; of the published lists none is such a case.
        most = count - 1 if self.upstream_exact else count // 2
        clusters, expected = 0, min(1, most)
        while expected > clusters:
            clusters, expected = expected, min(merged_into(size - count + expected), most)
        order = relation.sort(descending=True, stable=True).indices
        survivors = order[: count - clusters]
        if not clusters:
            return Selection(kept=survivors.sort().values, scores=relation)
        recycled = order[count - clusters :][: max(clusters, recycled_of(size - count + clusters))].sort().values
        centres, nearest = density_peaks(states[recycled], clusters)
        kept = torch.cat([survivors, recycled[centres]])
        place = kept.sort()

        def merge(rows: Tensor) -> Tensor:
            means = cluster_means(rows[recycled], nearest, clusters)
            return torch.cat([rows[survivors], means.to(rows.dtype)])[place.indices]

        return Selection(kept=place.values, features=merge(states), scores=relation, merge=merge)

    def _words(self, view: DecoderView) -> tuple[Tensor, Tensor]:
        """Text that may be raters: (T, D) input embeddings and (T,) places among the tokens still there."""
        if not self.upstream_exact:
            return view.embeds[view.first_text], view.text
        words = view.embeds[int(view.first_visual[-1]) + 1 :]
        size = len(view.hidden)  # text is never dropped: it still ends the prompt
        return words, torch.arange(size - len(words), size, device=words.device)


def recycled_of(dropped: int) -> int:
    """How many of `dropped` tokens are looked at for merging."""
    return min(dropped, int(0.3 * dropped) + 1)


def merged_into(dropped: int) -> int:
    """How many tokens they are merged into."""
    return int(recycled_of(dropped) / 10) + 1


def raters(visual: Tensor, text: Tensor) -> Tensor:
    """The text tokens that the visual tokens resemble more than average.

    Args:
        visual: (N, D), text: (T, D): input embeddings.

    Returns:
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
    return above.nonzero().squeeze(1)


def density_peaks(states: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """Clusters around tokens that are dense and far from denser ones; among equals the lower index comes first.

    Args:
        states: (M, D).
        clusters: C, 1 <= C <= M.

    Returns:
        centres: (C,) int64, best first; nearest: (M,) int64, the number of each token's nearest centre.
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
    return centres, nearest


def cluster_means(states: Tensor, nearest: Tensor, clusters: int) -> Tensor:
    """(C, D) plain means of each cluster's tokens, (M, D), in `working_dtype`."""
    x = states.to(working_dtype(states))
    sizes = nearest.bincount(minlength=clusters)
    return x.new_zeros(clusters, x.shape[1]).index_add_(0, nearest, x) / sizes[:, None]


def _near_and_far(distances: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    return distances.topk(clusters, largest=False).values, distances.amax()
