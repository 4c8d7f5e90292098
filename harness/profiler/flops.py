"""Floating-point operations: counted while a model runs, computed from its shape, and the most a device can do."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

_ATEN = torch.ops.aten
# torch counts fused attention on CUDA alone, and only where queries and keys have as many heads.
_ATTENTION = (
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
)


def _attention_flops(query: Sequence[int], key: Sequence[int], value: Sequence[int], *_: Any, **__: Any) -> int:
    batch, heads, queries, width = query
    return 2 * batch * heads * queries * key[2] * (width + value[3])


class FlopProbe:
    """A probe for `PhaseRecorder` that counts FLOPs phase by phase; a block of `with` around the recording.

    Causal attention counts as the whole square, as in `theoretical_prefill`. Kernels that torch does not know
    (flash-attn's own) count nothing: `kernels` then names no attention.

    Attributes:
        flops: {phase: operations}. kernels: {phase: names of the fused attention kernels that ran}.
    """

    def __init__(self) -> None:
        known = [getattr(_ATEN, name) for name in _ATTENTION if hasattr(_ATEN, name)]
        self.mode = FlopCounterMode(display=False, custom_mapping=dict.fromkeys(known, _attention_flops))
        self.flops: dict[str, int] = {}
        self.kernels: dict[str, set[str]] = {}
        self._before: dict[str, int] = {}

    def __enter__(self) -> FlopProbe:
        self.mode.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self.mode.__exit__(*error)

    def _counts(self) -> dict[str, int]:
        return {str(name): int(n) for name, n in self.mode.get_flop_counts().get("Global", {}).items()}

    def begin(self, phase: str) -> None:
        self._before = self._counts()

    def end(self, phase: str) -> None:
        new = {name: n - self._before.get(name, 0) for name, n in self._counts().items()}
        self.flops[phase] = self.flops.get(phase, 0) + sum(new.values())
        ran = {name for name, n in new.items() if n and "scaled_dot_product" in name}
        self.kernels.setdefault(phase, set()).update(ran)


def theoretical_prefill(config: Any, lengths: Sequence[int]) -> list[int]:
    """FLOPs of each LLM layer over a prompt of `lengths[l]` tokens: projections, MLP and attention.

    A multiplication and an addition count as two; softmax, norms and activations as nothing; causal attention as the
    whole square.

    Args:
        config: the LLM's config: hidden_size, intermediate_size, num_attention_heads, num_key_value_heads.
    """
    width, inner = config.hidden_size, config.intermediate_size
    head = getattr(config, "head_dim", None) or width // config.num_attention_heads
    queries, keys = head * config.num_attention_heads, head * config.num_key_value_heads
    weights = width * queries + 2 * width * keys + queries * width + 3 * width * inner
    return [2 * n * weights + 4 * n * n * queries for n in lengths]


def theoretical_decode(config: Any, lengths: Sequence[int], new_tokens: int) -> int:
    """FLOPs of the LLM for the tokens after the first; layer l holds `lengths[l]` tokens of the prompt."""
    width = config.hidden_size
    head = getattr(config, "head_dim", None) or width // config.num_attention_heads
    queries = head * config.num_attention_heads
    projections = sum(theoretical_prefill(config, [1] * len(lengths))) - 4 * queries * len(lengths)
    total = 0
    for step in range(1, new_tokens):
        total += projections + sum(4 * queries * (n + step) for n in lengths) + 2 * width * config.vocab_size
    return total


def theoretical_output(config: Any) -> int:
    """FLOPs of the logits at one position."""
    return 2 * config.hidden_size * config.vocab_size


def matmul_ceiling(device: torch.device, dtype: torch.dtype, seconds: float = 0.3) -> float:
    """FLOP/s of the fastest square product that was seen: what the device really gives at this precision.

    Args:
        seconds: time to spend on each size.
    """
    best = 0.0
    for size in (4096, 8192) if device.type == "cuda" else (512, 1024, 2048):
        a = torch.randn(size, size, device=device, dtype=dtype)
        b = torch.randn(size, size, device=device, dtype=dtype)
        times: list[float] = []
        end = time.perf_counter() + seconds
        while len(times) < 3 or time.perf_counter() < end:
            start = time.perf_counter()
            torch.mm(a, b)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            times.append(time.perf_counter() - start)
        best = max(best, 2 * size**3 / min(times))
    return best
