"""`visionselector`: keeps the tokens that a trained scorer finds important (arXiv 2510.16598).

`ScorerCompressor` is what it shares with other methods that read the same scores.
"""

from __future__ import annotations

import dataclasses
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from os import PathLike, fspath
from typing import Any

import torch
from torch import Tensor

from visionselector_eval.baselines.contract.base import Compressor, Host, ScoreCompressor, VisualTokens, weights_digest
from visionselector_eval.baselines.contract.errors import InputError
from visionselector_eval.models.visionselector.released import PUBLISHED
from visionselector_eval.models.visionselector.scorer import Scorer, load_scorer, scorer_keys


@dataclass(frozen=True, kw_only=True)
class ScorerCompressor(Compressor):
    """A method that reads the scores of a trained scorer: those given as `scorer`, else the backbone's own weights."""

    trained = True

    scorer: str | Scorer | None = field(
        default=None,
        metadata={
            "help": "scorer weights: folder, .safetensors or .bin file, hub id, or `angelslim` (that of "
            "IDPruner's published table, by its hub id); default: those in the backbone's checkpoint"
        },
    )

    def __post_init__(self) -> None:
        if isinstance(self.scorer, PathLike):
            object.__setattr__(self, "scorer", fspath(self.scorer))
        if not (
            self.scorer is None or isinstance(self.scorer, Scorer) or (isinstance(self.scorer, str) and self.scorer)
        ):
            raise InputError(
                f"invalid option scorer={self.scorer!r} of method '{self.name}': expected a folder, "
                "a .safetensors or .bin file, or a hub id (in Python also a Scorer)"
            )

    @classmethod
    def defaults_for(cls, backbone: str) -> dict[str, Any]:
        """The released scorer of a stock backbone."""
        return {"scorer": PUBLISHED[backbone]} if backbone in PUBLISHED else {}

    def bind(self, host: Host) -> ScorerCompressor:
        """A copy that holds its scorer, checked against the backbone's width.

        Raises:
            InputError: no scorer given nor in the backbone's checkpoint, one of another width, or one that cannot be
                read.
        """
        if self.scorer is not None:
            source, module = self._source, self._module
        else:
            source = f"of checkpoint {host.id}"
            if not scorer_keys(host.extra_weights, host.id):
                raise InputError(
                    f"{self.name} needs scorer weights: checkpoint {host.id} has no "
                    "visual.importance_scorer.*; give scorer=FOLDER_OR_ID"
                )
            module = Scorer.from_state(host.extra_weights, host.id)
        if module.width != host.width:
            raise InputError(
                f"scorer {source} has width {module.width} but backbone {host.id} has {host.width}: "
                "give one trained for it"
            )
        bound = dataclasses.replace(self)
        vars(bound)["_module"] = module  # seeds the cached property; no field, since it is no option
        return bound

    def score(self, tokens: VisualTokens) -> Tensor:
        """(N,) float32 scores (float64 for float64).

        Raises:
            InputError: no scorer, or features of another width.
        """
        with torch.no_grad():
            return self._on(tokens.features.device)(tokens.features)

    def fingerprint(self) -> str:
        """sha256 of a given scorer's weights by value (see `weights_digest`).

        Empty where the weights come from the backbone, whose id and revision tell them already.
        """
        if self.scorer is None:
            return ""
        return weights_digest(self._module)

    @property
    def _source(self) -> str:
        return self.scorer if isinstance(self.scorer, str) else "given as a module"

    @cached_property
    def _module(self) -> Scorer:
        """The scorer, read at its first use (`bind` puts it here for a bound one)."""
        if isinstance(self.scorer, Scorer):
            return self.scorer
        if self.scorer is None:
            raise InputError(
                f"{self.name} needs scorer weights: give scorer=FOLDER_OR_ID, or bind it to a backbone "
                "whose checkpoint has visual.importance_scorer.*"
            )
        return load_scorer(self.scorer)

    @cached_property
    def _copies(self) -> dict[torch.device, tuple[tuple[int, ...], Scorer]]:
        return {}

    def _on(self, device: torch.device) -> Scorer:
        """The scorer on `device`, copied there once, and again after its weights have changed."""
        module = self._module
        if module.q_proj.weight.device == device:
            return module
        # Weights made in inference mode count no versions and are not trained either.
        versions = tuple(0 if p.is_inference() else p._version for p in module.parameters())
        if device not in self._copies or self._copies[device][0] != versions:
            self._copies[device] = versions, deepcopy(module).to(device)
        return self._copies[device][1]


@dataclass(frozen=True, kw_only=True)
class VisionSelector(ScorerCompressor, ScoreCompressor):
    """Keeps the tokens that a trained scorer finds important, without attention and without the question.

    The weights are those given as `scorer`, else those in the checkpoint of the backbone that it is bound to.
    Scores in float32 (float64 for float64) in O(N D). Source: VisionSelector, arXiv 2510.16598. The scorer
    compares each token with the mean of its scope: canonically one image or video, with `upstream_exact` all
    of a prompt's, where K = max(1, int(r * N)). Upstream scores in half precision through an N x N matrix.
    """

    name = "visionselector"
    paper = "VisionSelector, arXiv 2510.16598"
    deviations = "the same scores without the N x N matrix, in float32"
    cost = "time O(N D + D^2), memory O(N + D)"

    def upstream_count(self, n: int, ratio: float) -> int:
        return int(ratio * n)
