"""Training of VisionSelector's scorer as pure functions: gates, masks, losses, curriculum.

Nothing here knows a trainer or a backbone: `selector_loss` takes the visual features and a function that gives the
language model's loss on gated features, and can be called on any tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from visionselector_eval.baselines.contract.budget import Budget, Share
from visionselector_eval.baselines.contract.errors import InputError
from visionselector_eval.baselines.contract.numerics import top_k
from visionselector_eval.models.visionselector.soft_topk import soft_topk

__all__ = [
    "Gates",
    "SelectorLoss",
    "curriculum",
    "gate",
    "hard_topk",
    "mask_bce",
    "mask_entropy",
    "selector_loss",
    "training_count",
]


@dataclass(frozen=True)
class Gates:
    """Soft and hard choices over the tokens of all scopes, one after another (T tokens in all).

    Attributes:
        features: the gated features `M_i * V_i`, one (N_s, D) a scope, in the dtype of the features given.
        scores: (T,) float32 (float64 for float64).
        mask: (T,) soft top-k, same dtype, differentiable.
        hard: (T,) 0 or 1, same dtype, without gradient: the top k of each scope.
    """

    features: list[Tensor]
    scores: Tensor
    mask: Tensor
    hard: Tensor


@dataclass(frozen=True)
class SelectorLoss:
    """The composite loss of one micro-batch; all scalars, float32 (float64 for float64).

    Attributes:
        total: task + weight * bce, to be minimised.
        task: the language model's loss.
        bce: of the soft against the hard mask, mean over tokens.
        entropy: mean entropy of the soft mask's entries in nats, without gradient.
        gates: the masks behind it.
    """

    total: Tensor
    task: Tensor
    bce: Tensor
    entropy: Tensor
    gates: Gates


def curriculum(step: int, total: int, start: float = 0.1, end: float = 2.0) -> float:
    """Weight of the mask loss after `step` of `total` optimiser steps: linear from `start` to `end`, then constant.

    The paper's ends are 0.1 and 2.0; its LLaVA-OneVision recipe ends at 3.0.
    """
    return start + (end - start) * min(step / max(total, 1), 1.0)


def training_count(n: int, budget: Budget, upstream_exact: bool = False) -> int:
    """K of a scope of `n` tokens: canonical K, or with `upstream_exact` int(r * n) without a floor.

    Raises:
        InputError: k = 0 or k = n, where there is nothing to choose.
    """
    k = int(budget.ratio * n) if upstream_exact and isinstance(budget, Share) else budget.count(n)
    if not 0 < k < n:
        raise InputError(
            f"budget {budget} keeps {k} of {n} visual tokens, and training needs 0 < k < N: "
            "give larger images (min_pixels) or another budget"
        )
    return k


def hard_topk(scores: Tensor, k: int) -> Tensor:
    """(N,) mask with 1 at the `k` largest scores, lower index first among equals, else 0; same dtype, no gradient."""
    mask = torch.zeros_like(scores, requires_grad=False)
    mask[top_k(scores.detach(), k)] = 1
    return mask


def mask_bce(mask: Tensor, hard: Tensor) -> Tensor:
    """Binary cross-entropy of a soft mask in (0, 1) against a hard one, mean over tokens; NaN where one is NaN."""
    with torch.autocast(mask.device.type, enabled=False):
        # torch asserts that entries lie in [0, 1]: on a GPU a NaN would end the process, not the training.
        return F.binary_cross_entropy(mask.nan_to_num(0.5), hard) + 0 * mask.sum()


def mask_entropy(mask: Tensor) -> Tensor:
    """Mean entropy of a mask's entries in nats, 0 (decided) to log 2; scalar without gradient."""
    p = mask.detach()
    return -(torch.xlogy(p, p) + torch.xlogy(1 - p, 1 - p)).mean()


def gate(
    features: Tensor | Sequence[Tensor], k: int | Sequence[int], scorer: Callable[[Tensor], Tensor] | nn.Module
) -> Gates:
    """Score each scope, and multiply its tokens by their soft top-k mask.

    Args:
        features: (N, D), or one (N_s, D) for each scope; scopes may differ in size and do not see each other.
        k: tokens to keep, one number for each scope, 0 < k < N_s.
        scorer: (N, D) -> (N,), as `Scorer`.

    Raises:
        InputError: k out of range.
    """
    scopes = [features] if isinstance(features, Tensor) else list(features)
    counts = [k] * len(scopes) if isinstance(k, int) else list(k)
    if len(counts) != len(scopes):
        raise InputError(f"gate: {len(counts)} numbers of tokens to keep for {len(scopes)} scopes")
    sizes = [len(scope) for scope in scopes]
    for n, count in zip(sizes, counts, strict=True):
        if not 0 < count < n:
            raise InputError(f"soft top-k needs 0 < k < N, got k={count} with N={n}")
    rows = [scorer(scope) for scope in scopes]
    scores = pad_sequence(rows, batch_first=True)
    # Sizes are known here, so that the device is not asked for them.
    valid = (torch.arange(max(sizes))[None] < torch.tensor(sizes)[:, None]).to(scores.device, non_blocking=True)
    padded = soft_topk(scores, torch.tensor(counts), None if len(set(sizes)) == 1 else valid)
    masks = [row[:n] for row, n in zip(padded, sizes, strict=True)]
    return Gates(
        features=[(mask[:, None] * scope).to(scope.dtype) for mask, scope in zip(masks, scopes, strict=True)],
        scores=torch.cat(rows),
        mask=torch.cat(masks),
        hard=torch.cat([hard_topk(row.to(padded.dtype), count) for row, count in zip(rows, counts, strict=True)]),
    )


def selector_loss(
    features: Tensor | Sequence[Tensor],
    k: int | Sequence[int],
    scorer: Callable[[Tensor], Tensor] | nn.Module,
    task_loss: Callable[[list[Tensor]], Tensor] | None = None,
    weight: float = 1.0,
) -> SelectorLoss:
    """`CE + weight * BCE(M, M_hard)` of one micro-batch.

    Args:
        features, k, scorer: as for `gate`. One scope is an image (canonical) or everything together (`upstream_exact`).
        task_loss: from the gated features, one (N_s, D) a scope, to the language model's scalar loss; 0 where not
            given.
        weight: lambda, see `curriculum`.

        Source: arXiv 2510.16598. All N tokens stay in the sequence; only their size changes.
    """
    gates = gate(features, k, scorer)
    bce = mask_bce(gates.mask, gates.hard)
    task = task_loss(gates.features) if task_loss is not None else torch.zeros_like(bce)
    return SelectorLoss(task + weight * bce, task, bce, mask_entropy(gates.mask), gates)
