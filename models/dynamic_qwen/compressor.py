"""`dynamic_qwen`: keeps the visual tokens that a trained predictor inside the LLM keeps."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from visionselector_eval.baselines.contract.base import Selection
from visionselector_eval.baselines.contract.budget import Budget, Share
from visionselector_eval.baselines.contract.decoder import DecoderCompressor, DecoderView
from visionselector_eval.baselines.contract.errors import InputError
from visionselector_eval.baselines.contract.numerics import top_k
from visionselector_eval.models.dynamic_qwen.predictor import MARK, Predictor, load_predictor
from visionselector_eval.models.learned import LearnedCompressor, Weights


def _of_checkpoint(tensors: Mapping[str, Tensor], checkpoint: str) -> Predictor | None:
    own = {name: tensor for name, tensor in tensors.items() if MARK in name}
    return Predictor.from_state(own, checkpoint) if own else None


@dataclass(frozen=True, kw_only=True)
class DynamicQwen(LearnedCompressor, DecoderCompressor):
    """Drops, two layers into the LLM, the visual tokens that a trained predictor does not want to keep.

    The predictor reads the visual tokens' hidden states at the input of layer `layer`; those with the largest
    log-probability of being kept stay, at their own positions. The weights are those given as `predictor`, else
    `*.image_score_predictor.*` in the checkpoint of the backbone that it is bound to; scores in float32. Source:
    Dynamic-LLaVA, arXiv 2412.00876. Canonically each image or video is judged alone and keeps exactly K.
    `upstream_exact`: all of a prompt's together, and int(r * S) with S the length of the whole prompt, text included,
    so that short images in long prompts keep everything. Upstream also takes the text between two images for visual
    tokens; here it does not.
    """

    name = "dynamic_qwen"
    weights = Weights("predictor", Predictor, load_predictor, _of_checkpoint, MARK)
    paper = "Dynamic-LLaVA, arXiv 2412.00876 (as Dynamic-Qwen)"
    deviations = "K of the visual tokens, not of the whole prompt; text between images is no visual token; any width"
    cost = "time O(N D M + N^2 M) with M channels inside, memory O(N (D + M))"

    predictor: str | Predictor | None = field(
        default=None,
        metadata={"help": "predictor weights: folder, .safetensors or .bin file, or hub id; default: the checkpoint's"},
    )
    layer: int = field(default=2, metadata={"help": "tokens are dropped at the input of this layer (0-based)"})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layer < 1:
            raise InputError(f"option layer={self.layer} of method 'dynamic_qwen': give 1 or more (the paper's is 2)")

    def layers(self, depth: int) -> tuple[int, ...]:
        return (self.layer,)

    def counts(self, n: int, budget: Budget, depth: int, total: int) -> tuple[int, ...]:
        if self.upstream_exact and isinstance(budget, Share):
            return (min(n, max(1, int(budget.ratio * total))),)
        return (self.count(n, budget),)

    def keep(self, view: DecoderView, members: Tensor, count: int) -> Selection:
        scores = self.score(view.hidden[view.visual[members]])
        return Selection(kept=top_k(scores, count), scores=scores)

    def score(self, states: Tensor) -> Tensor:
        """(N,) log-probability of being kept for the (N, D) states of one scope."""
        with torch.no_grad():
            judged: Tensor = self.module_on(states.device)(states)
        return judged[:, 0]
