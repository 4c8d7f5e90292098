"""`pyramiddrop`: drops visual tokens in three steps through the LLM (arXiv 2410.17247)."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from visionselector_eval.baselines.contract.budget import Budget, Share
from visionselector_eval.baselines.contract.decoder import DecoderView, ScoreDecoder, check_schedule, shrinking
from visionselector_eval.baselines.contract.errors import InputError

_LAYERS, _RATIOS = (8, 16, 24), (0.5, 0.25, 0.125)  # as released, for LLMs of 32 and of 40 layers alike


@dataclass(frozen=True, kw_only=True)
class PyramidDrop(ScoreDecoder):
    """Drops visual tokens in three steps, at a quarter, half and three quarters of the LLM's depth.

    Score at each step: attention that a token receives from the prompt's last token by the projections of the very
    layer the tokens enter, mean over heads. Tokens left are r^(1/3), r^(2/3) and r of all: the published 0.5, 0.25
    and 0.125 at r = 0.125. Source: PyramidDrop, arXiv 2410.17247. Canonical K and scope are per image or video;
    `upstream_exact` ranks all of a prompt's together and counts int(N * ratio). Tokens keep the positions of the
    full prompt; upstream numbers them from scratch at each step. Compare it at its layer-averaged tokens, not at K.

    `schedule="published"` is the released schedule: int(0.5 * N), int(0.25 * N) and int(0.125 * N) tokens at layers 8,
    16 and 24, whatever the LLM's depth. It goes with budget 0.125 alone. At 32 layers it is what the default does there
    (288, 144 and 72 of 576 tokens, a mean of 270 over the layers), at 40 layers it drops earlier. The schedules behind
    the 192, 128 and 64 tokens of later papers' tables are not released.
    """

    name = "pyramiddrop"
    paper = "PyramidDrop, arXiv 2410.17247"
    deviations = "any budget beside the released schedule (option `schedule`); positions stay"
    cost = "time O(S D Dk + S H d) at each of 3 stages, memory O(S (D + Dk))"

    schedule: str = field(
        default="geometric",
        metadata={
            "help": "geometric: r^(1/3), r^(2/3), r for any budget; published: the released one, at budget 0.125"
        },
    )

    def __post_init__(self) -> None:
        check_schedule(self.name, self.schedule)

    def check_budget(self, budget: Budget) -> None:
        if self.schedule == "published" and budget not in (Share(_RATIOS[-1]), Share(1.0)):
            raise InputError(
                f"budget {budget} contradicts schedule=published of method 'pyramiddrop', which ends at 0.125 of the "
                "tokens: give budget 0.125, or leave schedule out"
            )

    def layers(self, depth: int) -> tuple[int, ...]:
        if self.schedule == "published":
            if depth <= _LAYERS[-1]:
                raise InputError(
                    f"schedule=published of method 'pyramiddrop' drops tokens at layers {_LAYERS}, but the LLM has "
                    f"{depth} layers: leave schedule out"
                )
            return _LAYERS
        return tuple(depth * quarter // 4 for quarter in (1, 2, 3))

    def upstream_count(self, n: int, ratio: float) -> int:
        return int(n * ratio)

    def counts(self, n: int, budget: Budget, depth: int, total: int) -> tuple[int, ...]:
        self.check_budget(budget)
        if self.schedule == "published" and budget != Share(1.0):
            return tuple(max(1, int(n * ratio)) for ratio in _RATIOS)
        final = self.count(n, budget)
        return shrinking(n, final, budget.ratio if isinstance(budget, Share) else final / n, 3)

    def score(self, view: DecoderView) -> Tensor:
        return view.received(view.layer, view.visual.new_tensor([len(view.hidden) - 1]))[view.visual]
