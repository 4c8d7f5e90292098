"""Weights that were published for backbones which have none of their own."""

from __future__ import annotations

# Checkpoints with a scorer for a stock backbone, which has none of its own: linked in the method's repository.
PUBLISHED = {
    "Qwen/Qwen2.5-VL-7B-Instruct": "JulietChoo/VisionSelector-Qwen2.5-VL-7B",
    "Qwen/Qwen2.5-VL-3B-Instruct": "JulietChoo/VisionSelector-Qwen2.5-VL-3B",
}

# Short names of released scorers, for the option `scorer`.
ALIASES = {"angelslim": "AngelSlim/Qwen2.5-VL-7B-Instruct-Selector"}  # that of IDPruner's table (arXiv 2602.13315)
