"""VisionSelector (arXiv 2510.16598): a trained scorer that tells important visual tokens from the rest."""

from __future__ import annotations

from visionselector_eval.models.visionselector.compressor import VisionSelector
from visionselector_eval.models.visionselector.idpruner import IDPruner
from visionselector_eval.models.visionselector.scorer import Scorer, load_scorer
from visionselector_eval.models.visionselector.soft_topk import soft_topk

__all__ = ["IDPruner", "Scorer", "VisionSelector", "load_scorer", "soft_topk"]
