"""`featurenorm`: the length of a token as its importance."""

from dataclasses import dataclass, field

from torch import Tensor

from visionselector_eval.baselines import InputError, ScoreCompressor, VisualTokens


@dataclass(frozen=True, kw_only=True)
class FeatureNorm(ScoreCompressor):
    """Keeps the tokens whose features have the largest norm, without attention, question or training."""

    name = "featurenorm"
    cost = "time O(N D), memory O(N)"

    power: float = field(default=2.0, metadata={"help": "which norm: 1 sums the channels' sizes, 2 is Euclidean"})

    def __post_init__(self) -> None:
        if not self.power > 0:
            raise InputError(f"invalid option power={self.power!r} of method 'featurenorm': expected more than 0")

    def score(self, tokens: VisualTokens) -> Tensor:
        """(N,) float32 norms of (N, D) features."""
        return tokens.features.float().norm(p=self.power, dim=-1)
