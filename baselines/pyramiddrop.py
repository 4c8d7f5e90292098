"""`pyramiddrop`: drops visual tokens in three steps through the LLM (arXiv 2410.17247)."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from .base import Budget, DecoderView, ScoreDecoder, Share, shrinking


@dataclass(frozen=True, kw_only=True)
class PyramidDrop(ScoreDecoder):
    """Drops visual tokens in three steps, at a quarter, half and three quarters of the LLM's depth.

    Score at each step: attention that a token receives from the prompt's last token by the projections of the very
    layer the tokens enter, mean over heads. Tokens left are r^(1/3), r^(2/3) and r of all: the published 0.5, 0.25
    and 0.125 at r = 0.125. Source: PyramidDrop, arXiv 2410.17247. Canonical K and scope are per image or video;
    `upstream_exact` ranks all of a prompt's together and counts int(N * ratio). Tokens keep the positions of the
    full prompt; upstream numbers them anew at each step. Compare it at its layer-averaged tokens, not at K.
    """

    name = "pyramiddrop"
    paper = "PyramidDrop, arXiv 2410.17247"
    deviations = "any budget; positions stay"
    cost = "time O(S D Dk + S H d) at each of 3 stages, memory O(S (D + Dk))"

    def layers(self, depth: int) -> tuple[int, ...]:
        return tuple(depth * quarter // 4 for quarter in (1, 2, 3))

    def upstream_count(self, n: int, ratio: float) -> int:
        return int(n * ratio)

    def counts(self, n: int, budget: Budget, depth: int, total: int) -> tuple[int, ...]:
        final = self.count(n, budget)
        return shrinking(n, final, budget.ratio if isinstance(budget, Share) else final / n, 3)

    def score(self, view: DecoderView) -> Tensor:
        return view.received(view.layer, view.visual.new_tensor([len(view.hidden) - 1]))[view.visual]
