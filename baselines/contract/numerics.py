"""Arithmetic that methods share: unit rows, ties up to rounding, the largest scores."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import normalize


def top_k(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest scores, ascending; among equal scores the lower index wins.

    Args:
        scores: (N,) any float dtype. NaN counts as the smallest.

    Returns:
        (count,) int64.
    """
    ranked = torch.sort(torch.nan_to_num(scores, nan=-torch.inf), descending=True, stable=True).indices
    return ranked[:count].sort().values


def working_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype to score in: float64 stays float64 (tests), everything else becomes float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def unit_rows(rows: Tensor) -> Tensor:
    """(N, D) rows divided by their norms, in `working_dtype`; rows of zeros, or with NaN or infinity, become zeros."""
    return normalize(rows.to(working_dtype(rows)), dim=-1, eps=1e-12).nan_to_num_()


def first_largest(values: Tensor, slack: Tensor | float | None = None) -> Tensor:
    """(1,) the first index whose value is the largest up to rounding; stays on the device.

    A matrix product sums a row in an order that depends on the row's place, so that equal tokens get similarities a
    few units of rounding apart; a plain argmax would let that noise break their tie.

    Args:
        values: (N,), cosines or other numbers of about that size.
        slack: how far below the largest a value may be, 8 units of rounding where not given; (N,) or one for all.
    """
    slack = 8 * torch.finfo(values.dtype).eps if slack is None else slack
    return (values + slack >= values.amax()).to(torch.uint8).argmax(dim=0, keepdim=True)


def rounded(similarities: Tensor) -> Tensor:
    """Cosines to 32 binary digits, so that a sort sees equal tokens as equal (see `first_largest`).

    Args:
        similarities: float64, of rows that were made unit rows in float64 (`unit_rows(rows.double())`). In float32 a
            step wide enough to hide the noise of a product, 2^-20, would also make equal what is not.

    Raises:
        ValueError: for another dtype.
    """
    if similarities.dtype != torch.float64:
        raise ValueError(f"invalid dtype {similarities.dtype}: expected float64, from unit_rows(rows.double())")
    return similarities.mul(2.0**32).round_().div_(2.0**32)
