"""`fusion2x2`: windows of 2 x 2 neighbours become one token, the most uniform windows first."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import normalize, pad

from visionselector_eval.baselines.contract.base import Compressor, Selection, VisualTokens
from visionselector_eval.baselines.contract.errors import InputError
from visionselector_eval.baselines.contract.numerics import rounded, unit_rows, working_dtype

_TEMPERATURE = 0.1  # of the weights "sim"


@dataclass(frozen=True, kw_only=True)
class Fusion2x2(Compressor):
    """Fuses windows of 2 x 2 neighbouring tokens, those whose tokens are most alike first.

    A fused token stands at its window's top left member. Windows are fused in the order of their mean pairwise cosine
    until K tokens are left; if K is below the number of windows, all of them are and the rest is done on the grid that
    results, and between frames once a frame is one token. So that exactly K remain, the last window fuses only as
    many members as needed, those most like its first. Our own training-free form;
    there is no upstream, and `upstream_exact` only widens the scope to the whole prompt, read as one long row.
    """

    name = "fusion2x2"
    paper = "none: our own"
    deviations = "none"
    cost = "time O(N D), memory O(N D)"

    weights: str = field(
        default="avg",
        metadata={"help": "avg: plain mean of a window; sim: members like the mean count more, softmax(cosine / 0.1)"},
    )
    restore_norm: bool = field(
        default=False,
        metadata={
            "help": "give a fused token the mean norm of its members: averaging shrinks norms (not for backbones that "
            "add features at several layers)"
        },
    )

    def __post_init__(self) -> None:
        if self.weights not in ("avg", "sim"):
            raise InputError(f"option weights={self.weights!r} of method 'fusion2x2' is unknown: give avg or sim")

    @torch.no_grad()
    def compress(self, tokens: VisualTokens, count: int) -> Selection:
        """Fuse N tokens into `count`; features: (count, D), a token that was not fused unchanged."""
        return self.fuse(tokens, count)[0]

    def fuse(self, tokens: VisualTokens, count: int) -> tuple[Selection, Tensor]:
        """The selection, and how many of the N tokens are in each kept one: (count,), summing to N."""
        features, grid = tokens.features, tokens.grid
        x = features.to(working_dtype(features))
        place = torch.arange(x.shape[0], device=x.device)
        size = x.new_ones(x.shape[0])
        rounds: list[tuple[tuple[int, int, int], Tensor, Tensor, Tensor]] = []
        while x.shape[0] > count:
            t, h, w = grid if grid[1] * grid[2] > 1 else (1, 1, grid[0])  # one token a frame: pairs of frames
            before, grid = (t, h, w), (t, -(-h // 2), -(-w // 2))
            windows = grid[0] * grid[1] * grid[2]
            rows, indices, sizes = (_windows(part, before) for part in (x, place, size))
            # (windows, 4): members that join the first one of their window.
            joined = sizes > 0
            joined[:, 0] = False
            if count > windows:
                joined &= _chosen(rows, sizes, x.shape[0] - count)
            mass = self._mass(rows, sizes * pad(joined[:, 1:], (1, 0), value=True))
            changed = joined.any(dim=1)[:, None]
            rows[:, 0] = torch.where(changed, self._fused(rows, mass), rows[:, 0])
            sizes[:, 0] += (sizes * joined).sum(dim=1)
            # What stays, in raster order; how many is known, so that nothing waits for the device.
            stays = (sizes > 0) & ~joined
            order = torch.where(stays, indices, features.shape[0]).flatten().argsort(stable=True)[: max(count, windows)]
            x, place, size = rows.flatten(0, 1)[order], indices.flatten()[order], sizes.flatten()[order]
            rounds.append((before, mass, changed, order))

        def merge(rows: Tensor) -> Tensor:
            for grid, mass, changed, order in rounds:
                windows = _windows(rows, grid)
                mean = (mass.to(rows.dtype)[:, :, None] * windows).sum(dim=1)
                windows[:, 0] = torch.where(changed, mean, windows[:, 0])
                rows = windows.flatten(0, 1)[order]
            return rows

        # A restored norm is no weighted sum, and what the norm of other rows should be nobody says.
        told = None if self.restore_norm else merge
        return Selection(kept=place, features=x.to(features.dtype), merge=told), size

    def _mass(self, rows: Tensor, mass: Tensor) -> Tensor:
        """(W, 4) weights of the members of each window, (W, 4, D), from their sizes; mass 0 counts nothing."""
        mass = mass / mass.sum(dim=1, keepdim=True)
        if self.weights == "sim":
            mean = (mass[:, :, None] * rows).sum(dim=1)
            alike = (unit_rows(rows.flatten(0, 1)).view_as(rows) * unit_rows(mean)[:, None]).sum(dim=2)
            mass = torch.softmax(alike / _TEMPERATURE + mass.log(), dim=1)  # log 0: no member, weight 0
        return mass

    def _fused(self, rows: Tensor, mass: Tensor) -> Tensor:
        """(W, D) the members of each window, (W, 4, D), averaged with weights (W, 4)."""
        mean = (mass[:, :, None] * rows).sum(dim=1)
        if self.restore_norm:
            mean = normalize(mean, dim=1, eps=1e-12) * (mass * rows.norm(dim=2)).sum(dim=1, keepdim=True)
        return mean


def _windows(values: Tensor, grid: tuple[int, int, int]) -> Tensor:
    """(T * H * W, ...) in raster order as (windows, 4, ...): top left and right, bottom left and right; 0 outside."""
    t, h, w = grid
    padded = pad(values.view(t, h, w, -1), (0, 0, 0, w % 2, 0, h % 2))
    split = padded.unflatten(2, (-1, 2)).unflatten(1, (-1, 2)).transpose(2, 3)
    return split.reshape(-1, 4, *values.shape[1:])


def _chosen(rows: Tensor, sizes: Tensor, surplus: int) -> Tensor:
    """(W, 4) bool: which members join their window's first so that exactly `surplus` tokens go."""
    unit = unit_rows(rows.flatten(0, 1).double()).view_as(rows)
    there = sizes > 0
    members = there.sum(dim=1)
    # sum over pairs of u_i . u_j = (|sum u|^2 - sum |u_i|^2) / 2
    pairs = (members * (members - 1)).clamp(min=1)
    alike = rounded((unit.sum(dim=1).square().sum(dim=1) - unit.square().sum(dim=(1, 2))) / pairs)
    order = alike.masked_fill(members < 2, -torch.inf).sort(descending=True, stable=True).indices
    saved = (members - 1)[order]
    room = torch.empty_like(saved)
    room[order] = surplus - (saved.cumsum(0) - saved)
    to_first = rounded((unit * unit[:, :1]).sum(dim=2)).masked_fill(~there, -torch.inf)
    to_first[:, 0] = torch.inf
    # 0 for the first, 1 for the member most like it, ...
    rank = to_first.sort(dim=1, descending=True, stable=True).indices.argsort(dim=1)
    return there & (rank <= room[:, None])
