"""`uniform`: a control that ignores what the tokens hold."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from visionselector_eval.baselines.contract.base import Compressor, Selection, VisualTokens


@dataclass(frozen=True, kw_only=True)
class Uniform(Compressor):
    """Keeps tokens at equal strides of the raster sequence: floor((i + 0.5) * N / K) for i < K.

    There is no upstream; `upstream_exact` only widens the scope to the whole prompt.
    """

    name = "uniform"
    paper = "none: a control"
    deviations = "none"
    cost = "time O(K), memory O(K)"

    def compress(self, tokens: VisualTokens, count: int) -> Selection:
        """Keep `count` of N tokens; kept: (count,) int64 on the features' device."""
        n = tokens.features.shape[0]
        step = torch.arange(count, device=tokens.features.device)
        # In integers: (i + 0.5) * n / count in floats can fall just short of a whole number.
        return Selection(kept=(2 * step + 1) * n // (2 * count))
