"""Picking tokens one after the other."""

from __future__ import annotations

import torch
from torch import LongTensor, Tensor


class SimilarityRows:
    """Cosines of one token after the other to all tokens, for methods that pick tokens one by one.

    On a GPU a row is one product, and nothing is read back. On a CPU, whose memory is slow beside its arithmetic, a
    row costs a pass over all features, and 64 rows in one product little more: when a row is missing, those of the
    tokens that look likely to be picked soon come along. Which rows are guessed changes the time only; at most 512
    rows, and a quarter of N, are held.

    Args:
        unit: (N, D) rows of length 1, from `unit_rows`.
    """

    def __init__(self, unit: Tensor) -> None:
        self._unit = unit
        self._rows: dict[int, Tensor] = {}
        self._most = max(1, min(512, unit.shape[0] // 4))
        self._guess = min(64, self._most)

    def __call__(self, pick: Tensor, promise: Tensor) -> Tensor:
        """(N,) cosines of token `pick`, (1,), which is picked once; larger `promise`, (N,): likelier to come soon."""
        if self._unit.is_cuda:
            return torch.mv(self._unit, self._unit.index_select(0, pick)[0])
        wanted = int(pick)
        if wanted not in self._rows:
            likely = torch.topk(promise, self._guess).indices.tolist()
            fresh = [wanted, *(i for i in likely if i != wanted and i not in self._rows)][: self._most]
            if len(self._rows) + len(fresh) > self._most:
                self._rows.clear()
            self._rows.update(zip(fresh, self._unit[fresh] @ self._unit.T, strict=True))
        return self._rows.pop(wanted)


# Tokens whose similarities a GPU holds at once (256 MiB), and one block of threads their values in its registers.
_FUSED = 8192


def pick_all(
    unit: Tensor, start: Tensor | None, weight: float, count: int, *, fades: bool = False
) -> LongTensor | None:
    """Pick `count` tokens, each the first one whose value is the largest up to rounding (`first_largest`).

    After a pick p with similarities s a value becomes `start - weight * max(s of all picks)`; with `fades` it becomes
    `max(0, value - exp(-weight * (1 - s)^2) * value[p])`. What is picked is not picked again.

    Args:
        unit: (N, D) rows of length 1, or 0.
        count: 1 <= count <= N.
        start: (N,) the first values, same dtype; None: 0 for all, and the first pick is the token whose most similar
            other token is least similar.

    Returns:
        (count,) int64, or None where only the caller's own loop can do it: not on CUDA, not float32, more than 8192
        tokens, or no working Triton.
    """
    if not unit.is_cuda or unit.dtype != torch.float32 or unit.shape[0] > _FUSED:
        return None
    from visionselector_eval.baselines.contract import fused

    return fused.run(unit, start, weight, count, fades) if fused.works(unit.device) else None
