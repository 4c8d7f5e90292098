"""Training of the Dynamic-LLaVA predictor as pure functions: decisions, policy attention, loss (arXiv 2412.00876)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from visionselector_eval.baselines.contract.numerics import working_dtype

__all__ = ["keep_decisions", "mean_keep_loss", "policy_attention", "temperature"]


def temperature(step: int, total: int, start: float = 1.0, end: float = 0.1) -> float:
    """Tau after `step` of `total` optimiser steps: geometric from `start` to `end`, then constant."""
    return start * (end / start) ** min(step / max(total, 1), 1.0)


def keep_decisions(log_probabilities: Tensor, tau: float) -> Tensor:
    """Random 0/1 decisions to keep, with the gradient of their relaxation (straight-through Gumbel-softmax).

    Args:
        log_probabilities: (N, 2) of keep and drop.
        tau: temperature > 0.

    Returns:
        (N,) 1 for tokens that stay, float32 (float64 for float64).
    """
    logits = log_probabilities.to(working_dtype(log_probabilities))
    return F.gumbel_softmax(logits, tau=tau, hard=True, dim=-1)[..., 0]


def mean_keep_loss(keep: Sequence[Tensor], ratio: float, weight: float = 100.0, per_sample: bool = False) -> Tensor:
    """`weight * (mean(keep) - ratio)^2`; scalar.

    Args:
        keep: one (N_s,) of decisions a sample.
        per_sample: the square of each sample's own mean, averaged over samples (Dynamic-LLaVA), instead of the square
            of the mean over all tokens of the batch (Dynamic-Qwen).
    """
    means = torch.stack([row.mean() for row in keep]) if per_sample else torch.cat(list(keep)).mean()[None]
    return weight * (means - ratio).square().mean()


def policy_attention(
    logits: Tensor, policy: Tensor, allowed: Tensor, *, eps: float = 1e-6, upstream_exact: bool = False
) -> Tensor:
    """Attention weights in which a dropped token is not seen, differentiable in the decision to drop it.

    `a_ij = (exp(z_ij - max_i) p_ij + eps / n) / (sum_j exp(z_ij - max_i) p_ij + eps)` with p_ij = p_j, and 1 for i = j:
    a token sees itself whether it is kept or not.

    Args:
        logits: (..., S, S) scaled products of queries and keys.
        policy: (..., S) over keys, 1 for text.
        allowed: (..., S, S) bool, what a query may see at all (causal mask, padding, other samples).
        upstream_exact: spread eps over all n = S keys as published, so that forbidden ones get about eps / n.
            Canonically n counts what the query may see, and the rest gets exactly 0.

    Returns:
        (..., S, S) float32 (float64 for float64); rows sum to 1. A query that may see nothing sees itself.

        Source: Dynamic-LLaVA, arXiv 2412.00876.
    """
    dtype = working_dtype(logits)
    size = logits.shape[-1]
    itself = torch.eye(size, dtype=torch.bool, device=logits.device)
    allowed = allowed | itself
    z = logits.to(dtype).masked_fill(~allowed, -torch.inf)
    weights = (z - z.amax(-1, keepdim=True).detach()).exp()
    weights = weights * policy.to(dtype)[..., None, :].masked_fill(itself, 1.0)
    floor = eps / size if upstream_exact else allowed.to(dtype) * (eps / allowed.sum(-1, keepdim=True))
    return (weights + floor) / (weights.sum(-1, keepdim=True) + eps)
