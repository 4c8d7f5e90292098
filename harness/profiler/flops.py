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


def theoretical_vision(config: Any, grid: tuple[int, int, int]) -> int:
    """FLOPs of Qwen2.5-VL's vision encoder for one picture or video.

    Args:
        config: the vision config.
        grid: merged (t, h, w), N = t*h*w.
    """
    t, h, w = grid
    merge = config.spatial_merge_size
    patches, width = t * h * w * merge**2, config.hidden_size
    voxels = config.in_channels * config.temporal_patch_size * config.patch_size**2
    linear = 4 * width * width + 3 * width * config.intermediate_size
    out = width * merge**2
    merger = t * h * w * (out * out + out * config.out_hidden_size)
    side = config.window_size // merge // config.patch_size
    windows = [t * min(side, h - y) * min(side, w - x) * merge**2 for y in range(0, h, side) for x in range(0, w, side)]
    whole = len(config.fullatt_block_indexes)
    windowed = sum((n // t) ** 2 * t for n in windows)
    attention = 4 * width * ((config.depth - whole) * windowed + whole * t * (h * w * merge**2) ** 2)
    return 2 * patches * (voxels * width + config.depth * linear) + 2 * merger + attention


def theoretical_clip(config: Any, pictures: int) -> int:
    """FLOPs of a CLIP vision tower for `pictures` pictures of its size, projector not counted.

    Args:
        config: the vision config. All its blocks run, the last one included.
    """
    patches, width = (config.image_size // config.patch_size) ** 2, config.hidden_size
    n = patches + 1  # the CLS token
    linear = 4 * width * width + 2 * width * config.intermediate_size
    pixels = config.num_channels * config.patch_size**2
    block = 2 * n * linear + 4 * n * n * width
    return pictures * (2 * patches * pixels * width + config.num_hidden_layers * block)


def theoretical_projector(config: Any, patches: int) -> int:
    """FLOPs of LLaVA-1.5's projector, or of trained token fusion in its place, for `patches` patches.

    Args:
        config: the whole model's.
    """
    width, out = config.vision_config.hidden_size, config.text_config.hidden_size
    layers = config.vision_feature_layer
    seen = width * (len(layers) if isinstance(layers, list) else 1)
    fusion = getattr(config, "token_fusion", None)
    if fusion is None:
        return 2 * patches * (seen * out + out * out)
    inner, spatial, window = fusion["fusion_hidden"], fusion["spatial_hidden"], fusion["window"] ** 2
    blocks = patches * (seen * inner + inner * width)
    return 2 * (blocks + patches // window * (window * width * spatial + spatial * out))


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
