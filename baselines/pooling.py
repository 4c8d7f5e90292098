"""`pooling`: a control that averages neighbours, whatever they hold."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from visionselector_eval.baselines.contract.base import Compressor, Selection, VisualTokens
from visionselector_eval.baselines.contract.numerics import working_dtype


@dataclass(frozen=True, kw_only=True)
class Pooling(Compressor):
    """Averages the tokens of each frame over a grid of K cells (2-D adaptive average pooling).

    A frame of h x w tokens becomes h' bands of rows, h' nearest to sqrt(K * h / w); where K is no multiple of h', some
    bands have one column more than others, so that there are exactly K cells. Frames share K evenly; with fewer tokens
    than frames, neighbouring frames are averaged too. A cell stands at its middle token. Source: the control
    of UniPruneBench, which pools to 4, 16 or 25 tokens, here the same numbers; `upstream_exact` only widens the scope
    to the whole prompt, read as one long row.
    """

    name = "pooling"
    paper = "the control of UniPruneBench"
    deviations = "exactly K cells for any K, and whole frames for video"
    cost = "time O(N D), memory O(N D)"

    @torch.no_grad()
    def compress(self, tokens: VisualTokens, count: int) -> Selection:
        """Average N tokens into `count`; features: (count, D), means in float32 (float64 for float64)."""
        features = tokens.features
        listed = _cells(tokens.grid, count)
        cells = torch.tensor(listed, device=features.device)  # (count, 3, [start, stop, middle])
        _, h, w = tokens.grid
        stride = torch.tensor([h * w, w, 1], device=features.device)
        kept = (cells[:, :, 2] * stride).sum(dim=1)
        # (count, members): the tokens of each cell, padded to the largest one with weight 0.
        index = torch.zeros(count, 1, dtype=torch.int64, device=features.device)
        inside = torch.ones(count, 1, dtype=torch.bool, device=features.device)
        for axis in range(3):
            longest = max(cell[axis][1] - cell[axis][0] for cell in listed)
            at = cells[:, axis, :1] + torch.arange(longest, device=features.device)
            stop = cells[:, axis, 1:2]
            index = (index[:, :, None] + (at.minimum(stop - 1) * stride[axis])[:, None]).flatten(1)
            inside = (inside[:, :, None] & (at < stop)[:, None]).flatten(1)
        rows = features.to(working_dtype(features))
        weights = inside.to(rows.dtype)
        weights /= weights.sum(dim=1, keepdim=True)

        def merge(rows: Tensor) -> Tensor:
            return embedding_bag(index, rows, per_sample_weights=weights.to(rows.dtype), mode="sum")

        return Selection(kept=kept, features=merge(rows).to(features.dtype), merge=merge)


Bin = tuple[int, int, int]  # start, stop, middle


def _cells(grid: tuple[int, int, int], count: int) -> list[tuple[Bin, Bin, Bin]]:
    """For each of `count` cells, in raster order, its extent in time, rows and columns."""
    t, h, w = grid
    cells = []
    frames = min(t, count)
    for frame, share in zip(_bins(t, frames), _shares(count, frames), strict=True):
        bands = round(math.sqrt(share * h / w))
        bands = min(max(bands, 1, -(-share // w)), h, share)
        for band, columns in zip(_bins(h, bands), _shares(share, bands), strict=True):
            cells += [(frame, band, column) for column in _bins(w, columns)]
    return cells


def _bins(size: int, bins: int) -> list[Bin]:
    """Adaptive pooling's bins: from floor(i * size / bins) to ceil((i + 1) * size / bins), and their middles."""
    return [(i * size // bins, -(-(i + 1) * size // bins), (2 * i + 1) * size // (2 * bins)) for i in range(bins)]


def _shares(count: int, parts: int) -> list[int]:
    """`count` in `parts` whole shares that differ by at most one."""
    return [(i + 1) * count // parts - i * count // parts for i in range(parts)]
