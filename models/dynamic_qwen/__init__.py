"""Dynamic-Qwen (after Dynamic-LLaVA, arXiv 2412.00876): a trained predictor drops visual tokens inside the LLM."""

from __future__ import annotations

from visionselector_eval.models.dynamic_qwen.compressor import DynamicQwen
from visionselector_eval.models.dynamic_qwen.predictor import Predictor, load_predictor

__all__ = ["DynamicQwen", "Predictor", "load_predictor"]
