"""Backbones, the compressed prompt and the lmms-eval models. Importing this imports no torch and no lmms-eval."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from visionselector_eval.models.loading import load_backbone

__all__ = ["load_backbone", "manifests"]


def __getattr__(name: str) -> Any:
    # lmms-eval imports this module while it is itself half imported, and `list` should not wait for torch.
    if name == "load_backbone":
        from visionselector_eval.models.loading import load_backbone

        return load_backbone
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def manifests() -> list[Any]:
    """Entry point `lmms_eval.models`: the models that the stock lmms-eval command finds by id."""
    from lmms_eval.models.registry_v2 import ModelManifest

    from visionselector_eval.models.backbones import FAMILIES

    here = "visionselector_eval.models.lmms_eval_models"
    return [
        ModelManifest(model_id=family.model_id, chat_class_path=f"{here}.VisionSelector{family.class_name}")
        for family in FAMILIES.values()
    ]
