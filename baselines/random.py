"""`random`: a control that any method has to beat."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import torch

from visionselector_eval.baselines.contract.base import Compressor, Selection, VisualTokens


@dataclass(frozen=True, kw_only=True)
class Random(Compressor):
    """Keeps tokens drawn at random, the same ones for the same document and seed.

    The first K of a permutation seeded by (`tokens.key`, `seed`): a smaller budget keeps a subset of a larger
    one. Report three seeds or more. There is no upstream; `upstream_exact` only widens the scope to the whole
    prompt.
    """

    name = "random"
    paper = "none: a control"
    deviations = "none"
    cost = "time O(N), memory O(N)"

    seed: int = field(default=0, metadata={"help": "another draw; report three or more"})

    def compress(self, tokens: VisualTokens, count: int) -> Selection:
        """Draw `count` of N tokens; kept: (count,) int64 on the features' device."""
        features = tokens.features
        # Python's own hash() differs from process to process, so that a resumed sweep would draw others.
        digest = hashlib.sha256(f"{self.seed}\n{tokens.key}".encode()).digest()
        # Drawn on the CPU whatever the features' device: generators of other devices give other numbers.
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)
        kept = torch.randperm(features.shape[0], generator=generator)[:count].sort().values
        return Selection(kept=kept.to(features.device, non_blocking=True))
