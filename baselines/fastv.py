"""`fastv`: keeps the visual tokens that the LLM's early attention looks at (arXiv 2403.06764)."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from visionselector_eval.baselines.contract.decoder import DecoderView, ScoreDecoder
from visionselector_eval.baselines.contract.errors import InputError


@dataclass(frozen=True, kw_only=True)
class FastV(ScoreDecoder):
    """Drops, at one layer, the visual tokens that the layer before it attended to least.

    Score: attention that a token receives in layer `layer - 1`, mean over heads, from the prompt's last token
    (`rows="last"`, the paper) or from all tokens (`rows="all"`, a later port; it favours early tokens, which more
    rows can see). One row or chunks of rows are computed, in float32, whatever the attention back-end; upstream keeps
    an L x L map. Source: FastV, arXiv 2403.06764. Canonical K and scope are per image or video;
    `upstream_exact` ranks all of a prompt's together, K = max(1, int(r * N)). Upstream's score span also takes in
    text between images; here text is never dropped.
    """

    name = "fastv"
    needs = frozenset({"previous"})
    paper = "FastV, arXiv 2403.06764"
    deviations = "positions stay; text is never ranked"
    cost = "time O(S D Dk) for keys and O(S H d) a row (`rows=all`: O(S^2 H d)), memory O(S Dk)"

    layer: int = field(default=2, metadata={"help": "tokens are dropped at the input of this layer (0-based)"})
    rows: str = field(default="last", metadata={"help": "whose attention counts: last (prompt token) or all"})

    def __post_init__(self) -> None:
        if self.layer < 1:
            raise InputError(f"option layer={self.layer} of method 'fastv': give 1 or more (the paper's is 2)")
        if self.rows not in ("last", "all"):
            raise InputError(f"option rows={self.rows!r} of method 'fastv': give 'last' or 'all'")

    def layers(self, depth: int) -> tuple[int, ...]:
        return (self.layer,)

    def upstream_count(self, n: int, ratio: float) -> int:
        return int(ratio * n)

    def score(self, view: DecoderView) -> Tensor:
        queries = view.visual.new_tensor([len(view.hidden) - 1]) if self.rows == "last" else None
        return view.received(view.layer - 1, queries)[view.visual]
