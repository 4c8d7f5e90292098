"""What adapters compute of a vision tower's attention."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor

# Largest number of attention weights held at once while attention is summed by columns (float32: 64 MiB).
_CHUNK_WEIGHTS = 1 << 24


def received_attention(queries: Tensor, keys: Tensor, lengths: Sequence[int], scale: float) -> Tensor:
    """Attention that each key receives: softmax over keys, mean over heads, summed over the queries of its segment.

    Exact and without an N x N array: whole rows of a few queries at a time are normalised and added up.

    Args:
        queries, keys: (P, H, d), after rotary embedding.
        lengths: sizes of the segments, in order, summing to P; attention does not cross them.
        scale: factor of the logits, usually d ** -0.5.

    Returns:
        (P,) float32 (float64 for float64 input); each segment sums to its length.

        Source: VisionZip's ranking in its Qwen2.5-VL form, arXiv 2412.04467.
    """
    dtype = torch.float64 if queries.dtype == torch.float64 else torch.float32
    received = []
    start, heads = 0, queries.shape[1]
    for length in lengths:
        q = queries[start : start + length].to(dtype).transpose(0, 1) * scale  # (H, n, d)
        k = keys[start : start + length].to(dtype).permute(1, 2, 0)  # (H, d, n)
        total = torch.zeros(length, dtype=dtype, device=queries.device)
        for rows in q.split(max(1, _CHUNK_WEIGHTS // (heads * length)), dim=1):
            total += (rows @ k).softmax(-1).sum((0, 1))
        received.append(total / heads)
        start += length
    return torch.cat(received)
