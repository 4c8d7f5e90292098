"""Picking tokens one by one on a GPU, all picks in one kernel (Triton).

A pick depends on the one before, so that a loop over torch's operations waits for some ten launches a pick. Here one
block of threads keeps all values in registers, and a pick costs it one row of the similarities and two reductions.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import TYPE_CHECKING

import torch

from visionselector_eval.baselines.contract.numerics import first_largest

if TYPE_CHECKING:
    from torch import LongTensor, Tensor

log = logging.getLogger(__name__)

_MIRRORED, _STRIPS = 2048, 8  # below so many rows the launches of several strips cost more than they save


def run(unit: Tensor, start: Tensor | None, weight: float, count: int, fades: bool) -> LongTensor:
    """`pick_all` of the contract, where `works`."""
    from visionselector_eval.baselines.contract.greedy_kernel import (
        picks,  # brings Triton along, which nothing but a GPU needs
    )

    n = unit.shape[0]
    similarity = cosines(unit).fill_diagonal_(-torch.inf)  # a picked token's own value is never looked at again
    if start is None:
        start = unit.new_zeros(n)
        first = first_largest(-similarity.amax(dim=1))
    else:
        first = first_largest(start)
    order = torch.empty(count, dtype=torch.int64, device=unit.device)
    block = max(32, 1 << (n - 1).bit_length())
    slack = 8 * torch.finfo(unit.dtype).eps
    with torch.cuda.device_of(unit):  # Triton launches on the current device, wherever the tensors are
        picks[(1,)](
            similarity,
            start,
            first,
            order,
            n,
            count,
            float(weight),
            slack,
            FADES=fades,
            BLOCK=block,
            num_warps=warps(block),
        )
    return order  # type: ignore[return-value]


def cosines(unit: Tensor) -> Tensor:
    """(N, N) products of (N, D) rows; of large ones each pair is computed once and mirrored, nearly half the work."""
    n = unit.shape[0]
    if n < _MIRRORED:
        return unit @ unit.T
    products = unit.new_empty(n, n)
    step = -(-n // _STRIPS)
    for begin in range(0, n, step):
        end = begin + step
        products[begin:end, begin:] = unit[begin:end] @ unit[begin:].T
        products[end:, begin:end] = products[begin:end, end:].T
    return products


def warps(block: int) -> int:
    """Eight values a thread and, beyond sixteen warps, more."""
    return min(16, max(1, block // 256))


@cache
def works(device: torch.device) -> bool:
    """Whether Triton can build and run a kernel here: it needs a C compiler, and not all machines have one."""
    try:
        unit = torch.eye(2, device=device)
        return run(unit, None, 1.0, 2, False).tolist() == [0, 1]
    except Exception as error:  # whatever it is (no Triton, no compiler): the other way gives the same picks
        log.warning("picking tokens step by step, since no Triton kernel can be run: %r", error)
        return False
