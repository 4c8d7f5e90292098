"""Picking tokens one after the other: `greedy_pick`, as a loop and as one kernel.

A pick depends on the one before. On a CPU a loop over torch's operations is bound by the rows of similarities. On a GPU
it would wait for some ten launches a pick; there one block of threads keeps all values in registers
(`greedy_kernel`, Triton), and a pick costs one row of the similarities and two reductions.
"""

from __future__ import annotations

import logging
from functools import cache

import torch
from torch import Tensor

from visionselector_eval.baselines.contract.numerics import first_largest

log = logging.getLogger(__name__)

_BLOCK = 256  # rows of similarities that exist at one time, and never more than a quarter of all
_MIRRORED, _STRIPS = 2048, 8  # below so many rows the launches of several strips cost more than they save
KERNEL_ROWS = 8192  # tokens whose similarities a GPU holds at once (256 MiB), and a block of threads their values


@torch.no_grad()
def greedy_pick(unit: Tensor, start: Tensor | None, weight: float, count: int, *, fades: bool = False) -> Tensor:
    """Pick `count` tokens, each the first one whose value is the largest up to rounding (`first_largest`).

    After a pick p with similarities s a value becomes `start - weight * max(s of all picks)`; with `fades` it becomes
    `max(0, value - exp(-weight * (1 - s)^2) * value[p])`. No token is picked twice. O(N D) a pick; on a CPU at
    most 512 rows of the similarities, and a quarter of them all, exist at a time. On CUDA in float32 up to 8192 tokens,
    where Triton works, all rows exist and one kernel picks.

    Args:
        unit: (N, D) rows of length 1, or 0, from `unit_rows`.
        start: (N,) the first values, same dtype; None: 0 for all, and the first pick is the token whose most similar
            other token is least similar (O(N^2 D) at most).
        weight: how much a similar pick takes away, at least 0.
        count: 1 <= count <= N.

    Returns:
        (count,) int64 on the device of `unit`, unique, in the order of picking.
    """
    in_reach = unit.is_cuda and unit.dtype == torch.float32 and unit.shape[0] <= KERNEL_ROWS
    pick = pick_by_kernel if in_reach and kernel_works(unit.device) else pick_by_loop
    return pick(unit, start, weight, count, fades)


def pick_by_loop(unit: Tensor, start: Tensor | None, weight: float, count: int, fades: bool) -> Tensor:
    pick = _least_similar(unit) if start is None else first_largest(start)
    start = unit.new_zeros(unit.shape[0]) if start is None else start
    order = torch.empty(count, dtype=torch.int64, device=unit.device)
    order[:1] = pick
    rows = SimilarityRows(unit)
    value = start
    closest = torch.full_like(start, -torch.inf)  # to any pick
    for step in range(1, count):
        row = rows(pick, value)
        if fades:
            fade = torch.exp(-weight * (1 - row).square()) * value[pick]
            # Picked ones stay at -inf, the others at 0 or more.
            value = torch.where(value < 0, value, (value - fade).clamp_(min=0)).index_fill_(0, pick, -torch.inf)
        else:
            torch.maximum(closest, row, out=closest)
            closest.index_fill_(0, pick, torch.inf)  # never again: +inf survives every later maximum
            value = torch.where(closest == torch.inf, -torch.inf, start - weight * closest)
        pick = first_largest(value)
        order[step : step + 1] = pick
    return order


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
        self._max_rows = max(1, min(512, unit.shape[0] // 4))
        self._guesses = min(64, self._max_rows)

    def __call__(self, pick: Tensor, promise: Tensor) -> Tensor:
        """(N,) cosines of token `pick`, (1,), which is picked once; larger `promise`, (N,): likelier to come soon."""
        if self._unit.is_cuda:
            return torch.mv(self._unit, self._unit.index_select(0, pick)[0])
        index = int(pick)
        if index not in self._rows:
            likely = torch.topk(promise, self._guesses).indices.tolist()
            fresh = [index, *(i for i in likely if i != index and i not in self._rows)][: self._max_rows]
            if len(self._rows) + len(fresh) > self._max_rows:
                self._rows.clear()
            self._rows.update(zip(fresh, self._unit[fresh] @ self._unit.T, strict=True))
        return self._rows.pop(index)


def _least_similar(unit: Tensor) -> Tensor:
    """(1,) the token whose most similar other token is least similar, of equals up to rounding the first.

    What a block of rows says about all columns is a bound for every token. Tokens whose bound is worse than the best
    token known so far need no rows of their own: on features without structure a quarter of the products is enough.
    Never more than half of them: similarity is symmetric, so that columns already asked as rows are left out.
    """
    n = unit.shape[0]
    slack = 8 * torch.finfo(unit.dtype).eps
    block = min(_BLOCK, -(-n // 4))
    closest = unit.new_full((n,), -torch.inf)
    known = torch.zeros(n, dtype=torch.bool, device=unit.device)
    remaining = torch.arange(n, device=unit.device)
    start = 0  # all before it are known
    while len(remaining):
        if 2 * len(remaining) > n - start:  # most of the rest: as it stands, so that columns fall away
            rows = torch.arange(start, min(n, start + block), device=unit.device)
            after = start + len(rows)
        else:
            rows, after = remaining[closest[remaining].argsort()[:block]], start
        similarity = unit[rows] @ unit[start:].T
        similarity.scatter_(1, (rows - start)[:, None], -torch.inf)
        torch.maximum(closest[start:], similarity.amax(dim=0), out=closest[start:])
        closest[rows] = torch.maximum(closest[rows], similarity.amax(dim=1))
        known[rows] = True
        start = after
        best = torch.where(known, closest, torch.inf).amin()
        remaining = (~known & (closest <= best + slack)).nonzero().squeeze(1)  # one wait for the device a block
    return first_largest(torch.where(known, -closest, -torch.inf))


def pick_by_kernel(unit: Tensor, start: Tensor | None, weight: float, count: int, fades: bool) -> Tensor:
    # Brings Triton along, which nothing but a GPU needs and not every platform has.
    from visionselector_eval.baselines.contract.greedy_kernel import picks

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
    arguments = (similarity, start, first, order, n, count, float(weight), slack)
    with torch.cuda.device_of(unit):  # Triton launches on the current device, wherever the tensors are
        picks[(1,)](*arguments, FADES=fades, BLOCK=block, numwarps=warps(block))
    return order


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
def kernel_works(device: torch.device) -> bool:
    """Whether Triton can build and run a kernel here: it needs a C compiler, and not all machines have one."""
    try:
        unit = torch.eye(2, device=device)
        return pick_by_kernel(unit, None, 1.0, 2, False).tolist() == [0, 1]
    except Exception as error:  # whatever it is (no Triton, no compiler): the loop gives the same picks
        log.warning("picking tokens step by step, since no Triton kernel can be run: %r", error)
        return False
