"""Training of LLaVA-STF's token fusion, in two stages: the fusion alone, then with it the whole LLM (arXiv 2506.07138).

The vision tower is frozen throughout. The fusion stands in the backbone where its projector stood, so that the forward
is the backbone's own.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from visionselector_eval.baselines.contract.errors import InputError
from visionselector_eval.models.backbones.llava import VICUNA_TEMPLATE, Llava
from visionselector_eval.models.backbones.token_fusion import LAYERS, FusedLlava, FusionConfig, TokenFusion
from visionselector_eval.models.loading import choose_dtype, load_backbone
from visionselector_eval.models.training.data import Conversations
from visionselector_eval.models.training.export import KINDS, load_fusion, read_config, save_learned, save_whole
from visionselector_eval.models.training.learners import Learner, Outcome, seeded
from visionselector_eval.models.training.spec import TokenFusionSpec

if TYPE_CHECKING:
    from visionselector_eval.models.backbones.base import Backbone

log = logging.getLogger(__name__)

KIND = KINDS[TokenFusionSpec.kind]


class TokenFusionLearner(Learner):
    """Trains the token fusion of a LLaVA; in stage 2 with it the LLM, its embeddings and its head.

    What is trained is float32 and computes in the spec's dtype (autocast).
    """

    spec: TokenFusionSpec
    learned: nn.ModuleDict
    backbone: Llava

    @classmethod
    def load(cls, spec: TokenFusionSpec, device: str) -> Backbone:
        """A LLaVA with token fusion: new, from `init`, from a first stage, or the checkpoint's own (stage 2).

        Raises:
            InputError: a checkpoint of another family; one with token fusion in stage 1, one without in stage 2; a
                fusion of another width or of other layers.
        """
        source, init = spec.pretrained, spec.init
        noted: str | None = None  # revision of the backbone that a first stage had
        if spec.stage == 2 and (Path(source).expanduser() / KIND.file).is_file():
            if init is not None:
                raise InputError(f"pretrained '{source}' has its token fusion already: leave init out")
            init, stored = source, read_config(Path(source).expanduser(), KIND).get("backbone", {})
            source, noted = stored.get("id"), stored.get("revision")
            if not source:
                raise InputError(
                    f"'{init}' does not say its backbone: give --pretrained PLAIN_LLAVA and --init {init} instead"
                )
        compute = choose_dtype(spec.dtype, device)
        # Weights that are trained are loaded as they are stored: rounded to bfloat16, small ones would begin elsewhere.
        loaded = torch.float32 if spec.stage == 2 else compute
        attention = spec.attn_implementation
        backbone = load_backbone(source, device, loaded, attention, revision=spec.revision)
        if not isinstance(backbone, Llava):
            raise InputError(
                f"token fusion is trained on LLaVA-1.5, but '{source}' is of family "
                f"'{backbone.model.config.model_type}': give --pretrained FOLDER_OR_ID of one"
            )
        if isinstance(backbone.model, FusedLlava):
            if spec.stage == 1:
                raise InputError(
                    f"stage 1 adds token fusion to a plain LLaVA-1.5, but '{source}' has it already: give a plain one, "
                    "or stage=2"
                )
            if init is not None:
                raise InputError(f"pretrained '{source}' has its token fusion already: leave init out")
            fusion = backbone.model.model.multi_modal_projector
            _agree(fusion, spec, source)
        else:
            if spec.stage == 2 and init is None:
                raise InputError(
                    f"stage 2 continues from token fusion that was trained, but '{source}' has none: give the result "
                    "folder of stage 1 as --pretrained"
                )
            fusion = _new(backbone, spec) if init is None else load_fusion(init)
            if init is not None:
                fusion.fit(backbone.model.config, init)
                _agree(fusion, spec, init)
                if noted is not None and noted != backbone.revision:
                    log.warning("'%s' has changed since '%s' was trained beside it", source, init)
            backbone = backbone.fused(fusion.to(backbone.device))
        backbone.model.model.vision_tower.to(compute)
        if spec.template == "vicuna":
            backbone.processor.chat_template = VICUNA_TEMPLATE
        return backbone

    @classmethod
    def build(cls, backbone: Backbone, spec: TokenFusionSpec) -> TokenFusionLearner:
        """For a backbone from `load`."""
        model = backbone.model
        parts: dict[str, nn.Module] = {"fusion": model.model.multi_modal_projector}
        if spec.stage == 2:
            parts["language_model"] = model.model.language_model
            if not model.config.tie_word_embeddings:  # else its weights are the embeddings'
                parts["lm_head"] = model.lm_head
        return cls(backbone, nn.ModuleDict(parts), spec)

    def check(self, data: Conversations) -> None:
        if "video" in data.kinds:
            raise InputError("token fusion learns from images, but the data has videos: LLaVA-1.5 takes none")
        if "image" not in data.kinds:
            raise InputError(f"token fusion learns from images, but none of the {len(data)} samples has one")

    def loss(self, batch: Mapping[str, Any], step: int, total: int) -> Outcome:
        device = self.backbone.device
        compute = choose_dtype(self.spec.dtype, str(device))
        inputs = self._inputs(batch)
        with torch.autocast(device.type, compute, enabled=compute != torch.float32):
            prompt = self.backbone.prompt(inputs, batch["places"])
            if (pixels := inputs.get("pixel_values")) is None:
                loss = self._language_loss(prompt, prompt.embeds, batch["labels"]) + self.nothing(device)
            else:
                features = list(self.backbone.features(pixels))
                loss = self._language_loss(prompt, self._joined(prompt, features), batch["labels"])
        return Outcome(loss, {"loss_language": loss.detach()}, {})

    def save(self, folder: Path, about: dict[str, Any]) -> None:
        """Stage 1: the fusion alone. Stage 2: a whole checkpoint, in the dtype of computation."""
        about = {**about, "stage": self.spec.stage}
        if self.spec.stage == 1:
            plain = {**about["backbone"], "revision": self.backbone.revision.partition("+")[0]}
            save_learned(folder, self.learned["fusion"], KIND, {**about, "backbone": plain})
            return
        dtype = choose_dtype(self.spec.dtype, str(self.backbone.device))
        save_whole(
            folder, self.backbone, KIND, {**about, "parameters": sum(p.numel() for p in self.parameters())}, dtype
        )


def _new(backbone: Llava, spec: TokenFusionSpec) -> TokenFusion:
    """Random weights, as torch's linear layers begin, in the spec's sizes."""
    config = backbone.model.config
    width = config.vision_config.hidden_size
    standard = FusionConfig.published(width, spec.layers or LAYERS)
    fusion = FusionConfig(
        standard.layers, spec.fusion_hidden or standard.fusion_hidden, spec.spatial_hidden or standard.spatial_hidden
    )
    with seeded(spec.seed):
        return TokenFusion(fusion, width, config.text_config.hidden_size)


def _agree(fusion: TokenFusion, spec: TokenFusionSpec, source: str) -> None:
    """Refuse sizes in the spec that the fusion at hand does not have."""
    config = fusion.config.as_dict()
    for name in ("layers", "fusion_hidden", "spatial_hidden"):
        if (asked := getattr(spec, name)) is not None and asked != config[name]:
            raise InputError(f"token fusion of '{source}' has {name}={config[name]}, but the spec says {asked}")
