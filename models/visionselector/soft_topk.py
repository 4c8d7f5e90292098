"""Differentiable top-k: a mask whose rows sum to k (VisionSelector, arXiv 2510.16598)."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from visionselector_eval.baselines.contract.errors import InputError
from visionselector_eval.baselines.contract.numerics import working_dtype

__all__ = ["soft_topk"]

_STEPS = 64


def soft_topk(scores: Tensor, k: int | Tensor, valid: Tensor | None = None) -> Tensor:
    """Differentiable mask `sigmoid(scores + t)` with the t that makes each row sum to k.

    t comes from 64 bisections without gradient; the backward pass is exact all the same (implicit
    differentiation), and the gradient of each row sums to 0. No host synchronisation on an accelerator.

    Args:
        scores: (B, N) float. Computed in float64 for float64, in float32 for everything else.
        k: tokens a row, 0 < k < N: one int for all rows, or (B,) int64.
        valid: (B, N) bool, False where a ragged row is padded: such places get 0, take no part in the sum and pass no
            gradient. k must then be smaller than the row's number of valid places.

    Returns:
        (B, N) float32 (float64 for float64), in (0, 1), differentiable in `scores`.

    Raises:
        InputError: shapes that do not fit, or a k out of range where the host can tell (an int against N; everything
            that lies in CPU memory). An out-of-range k on an accelerator gives a mask of about 0 or about 1.

        Source: VisionSelector, arXiv 2510.16598. Upstream brackets t by the scores -10 and +10, which fails for shares
            under 4.5e-5; here the bracket widens by log N and always holds. The sum in the backward pass is clamped at
            1e-12.
    """
    if scores.dim() != 2 or not scores.is_floating_point():
        raise InputError(
            f"soft_topk takes float scores of shape (B, N), got {_described(scores)}: add a batch dimension"
        )
    if valid is not None and (valid.shape != scores.shape or valid.dtype != torch.bool):
        raise InputError(f"soft_topk: valid must be bool of shape {tuple(scores.shape)}, got {_described(valid)}")
    counts = _counts(scores, k, valid)
    return _SoftTopK.apply(scores.to(working_dtype(scores)), counts, valid)


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {tuple(tensor.shape)}"


def _counts(scores: Tensor, k: int | Tensor, valid: Tensor | None) -> Tensor:
    """(B, 1) `k` in the working dtype, checked as far as the host can without waiting for a device."""
    rows, n = scores.shape
    if isinstance(k, Tensor):
        if k.shape != (rows,) or k.dtype.is_floating_point or k.dtype == torch.bool:
            raise InputError(f"soft_topk: k must be an int or int64 of shape ({rows},), got {_described(k)}")
        visible = k.device.type == "cpu"
        low, high = (int(k.min()), int(k.max())) if visible and rows else (1, 1)
        counts = k.to(scores.device, non_blocking=True)
    elif isinstance(k, int) and not isinstance(k, bool):
        visible, low, high = True, k, k
        counts = torch.full((rows,), k, device=scores.device)
    else:
        raise InputError(f"soft_topk: k must be an int or int64 of shape ({rows},), got {k!r}")
    if visible and (low < 1 or high >= n):
        raise InputError(
            f"soft_topk needs 0 < k < N, got k from {low} to {high} with N={n}: keep rows with k >= N whole instead"
        )
    if visible and valid is not None and valid.device.type == "cpu":
        sizes = valid.sum(dim=1)
        if bool((counts.to("cpu") >= sizes).any()):
            raise InputError(
                f"soft_topk needs k smaller than each row's valid places, got k={counts.tolist()} with {sizes.tolist()}"
            )
    return counts.to(working_dtype(scores))[:, None]


class _SoftTopK(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: Tensor, counts: Tensor, valid: Tensor | None) -> Tensor:
        if valid is None:
            highest, lowest = scores.amax(dim=1, keepdim=True), scores.amin(dim=1, keepdim=True)
        else:
            highest = scores.masked_fill(~valid, -torch.inf).amax(dim=1, keepdim=True)
            lowest = scores.masked_fill(~valid, torch.inf).amin(dim=1, keepdim=True)
        # At `low` every sigmoid is below e^-10 / N and at `high` above 1 - e^-10 / N: the root lies between.
        margin = 10 + math.log(max(scores.shape[1], 1))
        low, high = -highest - margin, -lowest + margin
        for _ in range(_STEPS):
            middle = (low + high) / 2
            short = _gate(scores, middle, valid).sum(dim=1, keepdim=True) < counts
            low, high = torch.where(short, middle, low), torch.where(short, high, middle)
        mask = _gate(scores, (low + high) / 2, valid)
        ctx.save_for_backward(mask)
        return mask

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator, unused-ignore]
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor, None, None]:
        (mask,) = ctx.saved_tensors
        slope = mask * (1 - mask)
        # Padded places have slope 0 and pass nothing, not even a nan that some loss leaves there.
        weighted = torch.where(slope > 0, slope * upstream, 0)
        mean = weighted.sum(dim=1, keepdim=True) / slope.sum(dim=1, keepdim=True).clamp(min=1e-12)
        return weighted - slope * mean, None, None


def _gate(scores: Tensor, shift: Tensor, valid: Tensor | None) -> Tensor:
    gate = torch.sigmoid(scores + shift)
    return gate if valid is None else gate.masked_fill(~valid, 0)
