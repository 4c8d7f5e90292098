"""The kernel of `greedy_pick`, in a module of its own: it needs Triton, which not every platform has."""

import triton
import triton.language as tl


@triton.jit
def picks(similarity, start, first, order, n, count, weight, slack, FADES: tl.constexpr, BLOCK: tl.constexpr):
    """All picks by one block of threads; `similarity` (n, n), `start` (n,), `first` (1,), `order` (count,)."""
    at = tl.arange(0, BLOCK)
    inside = at < n
    begin = tl.load(start + at, mask=inside, other=0.0)
    value = begin
    closest = tl.full((BLOCK,), float("-inf"), tl.float32)
    open_ = inside
    pick = tl.load(first)
    step = 0
    while step < count:  # not range(): Triton's interpreter, which tests use, can't convert its bound
        tl.store(order + step, pick)
        chosen = at == pick
        open_ = open_ & (chosen == 0)
        row = tl.load(similarity + pick * n + at, mask=inside, other=0.0)
        if FADES:
            strength = tl.sum(tl.where(chosen, value, 0.0), axis=0)
            away = 1.0 - row
            value = tl.maximum(value - tl.exp(-weight * away * away) * strength, 0.0)
        else:
            closest = tl.maximum(closest, row)
            value = begin - weight * closest
        left = tl.where(open_, value, float("-inf"))
        largest = tl.max(left, axis=0)
        # NaN is no largest value: the last token then, twice, which is refused later on; never a row that is not there.
        pick = tl.min(tl.where(open_ & (left + slack >= largest), at, n - 1), axis=0).to(tl.int64)
        step += 1
