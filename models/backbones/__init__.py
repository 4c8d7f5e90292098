"""Backbones: one adapter for each family of multimodal LLMs."""

from __future__ import annotations

ADAPTERS: dict[str, str] = {
    # config.model_type -> "module:Class"
    "qwen2_5_vl": "visionselector_eval.models.backbones.qwen2_5_vl:Qwen2_5_VL",
}
