"""`dart`: keeps a few pivots and the visual tokens least like them (DART, arXiv 2502.11494)."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from visionselector_eval.baselines.contract.base import Selection
from visionselector_eval.baselines.contract.decoder import DecoderCompressor, DecoderView
from visionselector_eval.baselines.contract.errors import InputError
from visionselector_eval.baselines.contract.numerics import rounded, unit_rows, working_dtype

_BLOCK = 1024  # states that are float64 at one time


@dataclass(frozen=True, kw_only=True)
class DART(DecoderCompressor):
    """Keeps a few visual pivots, and for each pivot the visual tokens that resemble it least.

    Pivots are the visual tokens, and the tokens after the last visual one, whose keys in the layer before have the
    largest L1 norm. Each pivot in turn takes its share of the tokens still free with the lowest cosine of their
    final-normed states to its own; text pivots stay text. Source: DART, arXiv 2502.11494. Canonically visual
    pivots come first, then text pivots, each by falling norm, and the total is exactly K, earlier pivots taking one
    token more where it does not divide; for K up to `image_pivots` the pivots are all that stays. `upstream_exact`
    keeps 4 + 8 * T tokens with T = max(1, int(r * N / 8)), and visits the pivots as upstream does: in the order in
    which CPython iterates over the set of their indices in the prompt.
    """

    name = "dart"
    needs = frozenset({"previous"})
    paper = "DART, arXiv 2502.11494"
    deviations = "pivots by falling norm, not in the order of a set of indices; exactly K"
    cost = "time O(S D Dk + 8 N D), memory O(S (D + Dk))"

    layer: int = field(default=2, metadata={"help": "tokens are dropped at the input of this layer (0-based)"})
    image_pivots: int = field(default=4, metadata={"help": "visual pivots, all of them kept"})
    text_pivots: int = field(default=4, metadata={"help": "pivots among the tokens after the last visual one"})

    def __post_init__(self) -> None:
        for option in ("layer", "image_pivots", "text_pivots"):
            value = getattr(self, option)
            if value < (option != "text_pivots"):
                raise InputError(f"option {option}={value} of method 'dart' is too small: the paper's is 2, 4 and 4")

    def layers(self, depth: int) -> tuple[int, ...]:
        return (self.layer,)

    def upstream_count(self, n: int, ratio: float) -> int:
        pivots = self.image_pivots + self.text_pivots
        return self.image_pivots + pivots * max(1, int(ratio * n / pivots))

    def keep(self, view: DecoderView, members: Tensor, count: int) -> Selection:
        if "dart" not in view.memory:  # one pass serves all scopes of a prompt
            keys = view.keys(view.layer - 1)
            norms = keys.to(working_dtype(keys)).abs().sum(1)
            view.memory["dart"] = norms, view.final_norm(view.hidden)
        norms, states = view.memory["dart"]
        indices = view.visual[members]
        after = torch.arange(int(view.visual[-1]) + 1, len(states), device=indices.device)
        kept = pick(
            norms, states, indices, after, count, self.image_pivots, self.text_pivots, set_order=self.upstream_exact
        )
        return Selection(kept=kept)


def pick(
    norms: Tensor,
    states: Tensor,
    image: Tensor,
    text: Tensor,
    count: int,
    image_pivots: int,
    text_pivots: int,
    *,
    set_order: bool = False,
) -> Tensor:
    """The `count` of N visual tokens that DART keeps.

    Args:
        norms: (S,) L1 norms of the keys.
        states: (S, D) normed states; their cosines are float64.
        image: (N,) positions of the visual tokens among the S, ascending;
        text: (T,) places of the text to take pivots from.
        set_order: visit pivots in the order of `list(set(places))` instead of visual and then text ones by falling
            norm.

    Returns:
        (count,) int64 among 0..N-1, ascending.
    """
    first = _largest(norms[image], min(image_pivots, count, len(image)))
    pivots = torch.cat([image[first], text[_largest(norms[text], min(text_pivots, len(text)))]])
    if set_order:
        # The hash of a small int is the int itself, so that CPython's order is the same in every process.
        pivots = pivots.new_tensor(list(set(pivots.tolist())))
    taken = torch.zeros(len(image), dtype=torch.bool, device=image.device).index_fill_(0, first, True)
    share, rest = divmod(count - len(first), len(pivots))
    towards = unit_rows(states[pivots].double()).T
    likeness = torch.cat([rounded(unit_rows(states[rows].double()) @ towards) for rows in image.split(_BLOCK)])
    for number in range(len(pivots)):
        free = likeness[:, number].masked_fill(taken, torch.inf)
        picks = free.sort(stable=True).indices[: share + (number < rest)]
        taken.index_fill_(0, picks, True)
    return torch.sort(taken.to(torch.uint8), descending=True, stable=True).indices[:count]


def _largest(norms: Tensor, count: int) -> Tensor:
    """Indices of the largest, largest first; the lower index among equals."""
    return norms.sort(descending=True, stable=True).indices[:count]
