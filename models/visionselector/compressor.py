"""`visionselector`: keeps the tokens that a trained scorer finds important (arXiv 2510.16598).

`ScorerCompressor` is what it shares with other methods that read the same scores.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from visionselector_eval.baselines.contract.base import ScoreCompressor, VisualTokens
from visionselector_eval.models.learned import LearnedCompressor, Weights
from visionselector_eval.models.visionselector.released import PUBLISHED
from visionselector_eval.models.visionselector.scorer import Scorer, load_scorer, scorer_keys


def _of_checkpoint(tensors: Mapping[str, Tensor], checkpoint: str) -> Scorer | None:
    return Scorer.from_state(tensors, checkpoint) if scorer_keys(tensors, checkpoint) else None


@dataclass(frozen=True, kw_only=True)
class ScorerCompressor(LearnedCompressor):
    """A method that reads the scores of a trained scorer: those given as `scorer`, else the backbone's own weights."""

    weights = Weights("scorer", Scorer, load_scorer, _of_checkpoint, "visual.importance_scorer.")

    scorer: str | Scorer | None = field(
        default=None,
        metadata={
            "help": "scorer weights: folder, .safetensors or .bin file, hub id, or `angelslim` (that of "
            "IDPruner's published table, by its hub id); default: those in the backbone's checkpoint"
        },
    )

    @classmethod
    def defaults_for(cls, backbone: str) -> dict[str, Any]:
        """The released scorer of a stock backbone."""
        return {"scorer": PUBLISHED[backbone]} if backbone in PUBLISHED else {}

    def score(self, tokens: VisualTokens) -> Tensor:
        """(N,) float32 scores (float64 for float64).

        Raises:
            InputError: no scorer, or features of another width.
        """
        with torch.no_grad():
            scores: Tensor = self.module_on(tokens.features.device)(tokens.features)
        return scores


@dataclass(frozen=True, kw_only=True)
class VisionSelector(ScorerCompressor, ScoreCompressor):
    """Keeps the tokens that a trained scorer finds important, without attention and without the question.

    The weights are those given as `scorer`, else those in the checkpoint of the backbone that it is bound to.
    Scores in float32 (float64 for float64) in O(N D). Source: VisionSelector, arXiv 2510.16598. The scorer
    compares each token with the mean of its scope: canonically one image or video, with `upstream_exact` all
    of a prompt's, where K = max(1, int(r * N)). Upstream scores in half precision through an N x N matrix.
    """

    name = "visionselector"
    paper = "VisionSelector, arXiv 2510.16598"
    deviations = "the same scores without the N x N matrix, in float32"
    cost = "time O(N D + D^2), memory O(N + D)"

    def upstream_count(self, n: int, ratio: float) -> int:
        return int(ratio * n)
