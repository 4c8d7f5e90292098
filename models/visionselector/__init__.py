"""VisionSelector (arXiv 2510.16598): a trained scorer that tells important visual tokens from the rest."""

from __future__ import annotations

from .compressor import VisionSelector
from .idpruner import IDPruner
from .scorer import Scorer, load_scorer
from .soft_topk import soft_topk

__all__ = ["IDPruner", "Scorer", "VisionSelector", "load_scorer", "soft_topk"]
