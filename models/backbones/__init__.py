"""Backbones: one adapter for each family of multimodal LLMs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """Checkpoints of one `config.model_type`.

    Attributes:
        adapter: "module:Class".
        lmms_eval: lmms-eval's name of the unmodified model, which chooses the wording of its prompts.
        protocol: how it is asked where nothing else is said (`models.protocols`), by every command.
    """

    adapter: str
    lmms_eval: str
    protocol: str


_LLAVA = Family("visionselector_eval.models.backbones.llava:Llava", "llava_hf", "llava_stf")

FAMILIES: dict[str, Family] = {
    "qwen2_5_vl": Family("visionselector_eval.models.backbones.qwen2_5_vl:Qwen2_5_VL", "qwen2_5_vl", "visionselector"),
    "llava": _LLAVA,
    "llava_llama": _LLAVA,  # as the original code's later checkpoints spell it
}
