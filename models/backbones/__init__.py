"""Backbones: an adapter for each family of multimodal LLMs, a row of `FAMILIES` for each adapter. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class Family:
    """One family of multimodal LLMs.

    Attributes:
        model_types: `config.model_type` of its checkpoints; the first names the family.
        about: what people call it.
        adapter: "module:Class".
        lmms_eval: lmms-eval's name of the unmodified model, which chooses the wording of its prompts.
        pretrained: the checkpoint that our model of lmms-eval's command loads where none is named.
        protocol: how it is asked where nothing else is said (`models.protocols`), by every command.
    """

    model_types: tuple[str, ...]
    about: str
    adapter: str
    lmms_eval: str
    pretrained: str
    protocol: str

    @property
    def name(self) -> str:
        """What code and tables call it."""
        return self.model_types[0]

    @property
    def model_id(self) -> str:
        """Our model's name for lmms-eval's command."""
        return f"visionselector_{self.name}"

    @property
    def class_name(self) -> str:
        """The adapter's class."""
        return self.adapter.partition(":")[2]

    def load_adapter(self) -> Any:
        """The adapter's class; imports torch."""
        return getattr(import_module(self.adapter.partition(":")[0]), self.class_name)


_HERE = "visionselector_eval.models.backbones"

FAMILIES: dict[str, Family] = {
    family.name: family
    for family in (
        Family(
            model_types=("qwen2_5_vl",),
            about="Qwen2.5-VL",
            adapter=f"{_HERE}.qwen2_5_vl:Qwen2_5_VL",
            lmms_eval="qwen2_5_vl",
            pretrained="Qwen/Qwen2.5-VL-3B-Instruct",
            protocol="visionselector",
        ),
        Family(
            model_types=("qwen2_vl",),
            about="Qwen2-VL",
            adapter=f"{_HERE}.qwen2_vl:Qwen2_VL",
            lmms_eval="qwen2_vl",
            pretrained="Qwen/Qwen2-VL-7B-Instruct",
            protocol="checkpoint",
        ),
        Family(
            model_types=("qwen3_vl",),
            about="Qwen3-VL",
            adapter=f"{_HERE}.qwen3_vl:Qwen3_VL",
            lmms_eval="qwen3_vl",
            pretrained="Qwen/Qwen3-VL-8B-Instruct",
            protocol="checkpoint",
        ),
        Family(
            model_types=("llava", "llava_llama"),  # the second as the original code's later checkpoints spell it
            about="LLaVA-1.5",
            adapter=f"{_HERE}.llava:Llava",
            lmms_eval="llava_hf",
            pretrained="llava-hf/llava-1.5-7b-hf",
            protocol="llava_stf",
        ),
    )
}
"""All families, by name."""


def family_of(model_type: str) -> Family | None:
    """The family of a checkpoint with this `config.model_type`; None where there is no adapter."""
    return next((family for family in FAMILIES.values() if model_type in family.model_types), None)
