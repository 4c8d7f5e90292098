"""Two methods in a row with one budget for what is left at the end: `build("visionselector+fastv")`."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from torch import Tensor

from visionselector_eval.baselines.contract.base import Compressor, Host, Selection, VisualTokens
from visionselector_eval.baselines.contract.budget import Budget, Share, Tokens
from visionselector_eval.baselines.contract.decoder import DecoderCompressor, DecoderView
from visionselector_eval.baselines.contract.errors import InputError


@dataclass(frozen=True, kw_only=True)
class _First(Compressor):
    """The first of two methods, which leaves more than the budget."""

    name: ClassVar[str] = "first"

    part: Compressor
    split: float
    whole: Compressor

    def __post_init__(self) -> None:
        for attribute in ("name", "needs"):
            object.__setattr__(self, attribute, getattr(self.part, attribute))

    @property
    def scope(self) -> Any:
        return self.part.scope

    def count(self, n: int, budget: Budget) -> int:
        return between(n, self.whole.count(n, budget), budget, self.split)

    def compress(self, tokens: VisualTokens, count: int) -> Selection:
        return self.part.compress(tokens, count)


def between(n: int, final: int, budget: Budget, split: float) -> int:
    """Tokens of `n` that the first of two methods leaves when `final` stay: a share of r ** split."""
    ratio = budget.ratio if isinstance(budget, Share) else final / n
    return max(final, Share(ratio**split).count(n))


@dataclass(frozen=True, kw_only=True)
class _Chain:
    """What both kinds of chain have: two methods, and how they share the reduction."""

    first: Compressor
    second: Compressor
    split: float = field(
        default=0.5,
        metadata={"help": "the first method keeps r ** split of the tokens, the second what is left to do; 0.5: alike"},
    )

    def __post_init__(self) -> None:
        if not 0 < self.split < 1:
            raise InputError(f"option split={self.split} of {self.first.name}+{self.second.name}: give 0 < split < 1")
        object.__setattr__(self, "name", f"{self.first.name}+{self.second.name}")

    def fingerprint(self) -> str:
        prints = self.first.fingerprint(), self.second.fingerprint()
        return "+".join(prints) if any(prints) else ""

    def bound(self, host: Host) -> Any:
        return replace(self, first=self.first.bind(host), second=self.second.bind(host))


@dataclass(frozen=True, kw_only=True)
class IntoDecoder(_Chain, DecoderCompressor):
    """A projector-stage method, then a decoder-stage one on what it left.

    The budget is what reaches the last layer, counted as the second method counts. The first keeps r ** split of each
    image or video (the square root of r by default), the second goes from there to the budget, in its own stages.
    """

    name: ClassVar[str] = "chain"

    second: DecoderCompressor

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "needs", self.first.needs | self.second.needs)

    @property
    def scope(self) -> Any:
        return self.second.scope

    def check_budget(self, budget: Budget) -> None:
        self.second.check_budget(budget)

    @property
    def before(self) -> Compressor:
        return _First(part=self.first, split=self.split, whole=self)

    def bind(self, host: Host) -> Compressor:
        return self.bound(host)

    def count(self, n: int, budget: Budget) -> int:
        return self.second.count(n, budget)

    def left_over(self, n: int, budget: Budget) -> Budget:
        return Tokens(self.second.count(n, budget))

    def counts(self, n: int, budget: Budget, depth: int, total: int) -> tuple[int, ...]:
        return self.second.counts(n, budget, depth, total)

    def layers(self, depth: int) -> tuple[int, ...]:
        return self.second.layers(depth)

    def keep(self, view: DecoderView, members: Tensor, count: int) -> Selection:
        return self.second.keep(view, members, count)


@dataclass(frozen=True, kw_only=True)
class BeforeLLM(_Chain, Compressor):
    """A projector-stage method, then another on what it left.

    The budget is what enters the LLM. The first keeps r ** split of each image or video (the square root of r by
    default). The second sees the kept tokens, with the first's merged features and the encoder's trace of their
    places, as one row of tokens: methods that read the image's grid see none.
    """

    name: ClassVar[str] = "chain"

    def __post_init__(self) -> None:
        super().__post_init__()
        object.__setattr__(self, "needs", self.first.needs | self.second.needs)

    def bind(self, host: Host) -> Compressor:
        return self.bound(host)

    def count(self, n: int, budget: Budget) -> int:
        return self.second.count(n, budget)

    @property
    def scope(self) -> Any:
        return self.first.scope

    def compress(self, tokens: VisualTokens, count: int) -> Selection:
        some = between(len(tokens.features), count, Tokens(count), self.split)
        if some == len(tokens.features):
            return self.second.compress(tokens, count)
        first = self.first.compress(tokens, some)
        if some == count:
            return first
        features = tokens.features[first.kept] if first.features is None else first.features.to(tokens.features.dtype)
        trace = tokens.trace.map(lambda value: value[first.kept]) if tokens.trace is not None else None
        # Merged tokens are no longer the encoder's: the second method then works on features, as the LLM sees them.
        project = tokens.project if first.features is None else None
        left = replace(tokens, features=features, grid=(1, 1, some), trace=trace, project=project)
        second = self.second.compress(left, count)
        changed = features[second.kept] if second.features is None else second.features

        def merge(rows: Tensor) -> Tensor:
            return second.follow(first.follow(rows, self.first.name), self.second.name)

        return Selection(kept=first.kept[second.kept], features=changed, scores=first.scores, merge=merge)


def chain(first: Compressor, second: Compressor, split: float) -> Compressor:
    """Two methods in a row.

    Raises:
        InputError: for two that can't follow each other.
    """
    name = f"{first.name}+{second.name}"
    if first.stage != "projector":
        raise InputError(
            f"'{name}': the first method must act before the LLM, but {first.name} has stage '{first.stage}'"
            + (f": did you mean '{second.name}+{first.name}'?" if second.stage == "projector" else "")
        )
    if isinstance(second, DecoderCompressor):
        return IntoDecoder(first=first, second=second, split=split)
    if second.stage != "projector":
        raise InputError(f"'{name}': the second method has stage '{second.stage}', which can't follow another")
    if first.scope != second.scope:
        raise InputError(f"'{name}': give upstream_exact to both methods or to none")
    return BeforeLLM(first=first, second=second, split=split)
