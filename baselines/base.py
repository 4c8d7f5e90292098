"""The compressor contract: what a method gets, what it gives back, and what it need not care about.

A method says only what is special about it. Placeholders, positions, masks, padding, several images, video, text-only
prompts, counting and gathering are handled once, centrally, by the backbone (`models/splice.py`).

The shortest method is a `ScoreCompressor` with one function::

    @dataclass(frozen=True, kw_only=True)
    class Brightest(ScoreCompressor):
        \"\"\"Keeps the tokens with the largest norm.\"\"\"

        name = "brightest"

        def score(self, tokens):
            return tokens.features.float().norm(dim=-1)
"""

from __future__ import annotations

import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import LongTensor, Tensor

from .budget import Budget, Share, Tokens, parse_budget
from .errors import InputError, unknown

__all__ = [
    "Budget",
    "Compressor",
    "EncoderTrace",
    "Host",
    "InputError",
    "ScoreCompressor",
    "Selection",
    "Share",
    "Tokens",
    "VisualTokens",
    "as_compressor",
    "parse_budget",
    "top_k",
    "unknown",
    "working_dtype",
]

Stage = Literal["pixels", "projector", "decoder"]
Scope = Literal["item", "prompt"]


@dataclass(frozen=True)
class EncoderTrace:
    """What the vision encoder can tell about its own attention; a field is None unless the compressor `needs` it.

    Attributes
    ----------
    received: (N,) float32, attention that each token received: softmax attention of the encoder's ranking layer, mean
        over heads, summed over the queries of its segment, averaged over the patches merged into one token, in raster
        order (METHODS 3.2).
    keys: (N, Dk) float32, that layer's keys after rotary embedding, mean over heads and merged patches, raster order.
    cls: (N,) float32, attention from the CLS token, mean over heads, for encoders that have one.
    """

    received: Tensor | None = None
    keys: Tensor | None = None
    cls: Tensor | None = None


@dataclass(frozen=True)
class VisualTokens:
    """The visual tokens of one scope: one image or video (canonical), or the whole prompt (`upstream_exact`).

    Attributes
    ----------
    features: (N, D) as the LLM would see them, raster order (time, row, column), the model's dtype.
    grid: merged (t, h, w) with t*h*w == N; (1, 1, N) for a scope that holds several images or videos.
    trace: what the compressor asked for in `needs`, else None.
    text: (T, D) embeddings of the question's tokens where "text" is in `needs`, else None.
    key: names the document (and the scope's place in it), so that seeded methods draw the same for the same document
        whatever the batch around it.
    """

    features: Tensor
    grid: tuple[int, int, int]
    trace: EncoderTrace | None = None
    text: Tensor | None = None
    key: str = ""


@dataclass(frozen=True)
class Selection:
    """What a compressor keeps of one scope.

    Attributes
    ----------
    kept: (K,) int64, ascending, unique, 0 <= kept < N. A merged token stands at its anchor's index.
    features: (K, D) where kept tokens were changed (merged), row p belongs to kept[p]; None means `features[kept]`.
    scores: (N,) for pictures, or None.
    """

    kept: LongTensor
    features: Tensor | None = None
    scores: Tensor | None = None


@dataclass(frozen=True)
class Host:
    """What a compressor may know of the backbone it is bound to.

    Attributes
    ----------
    id: path or hub id of the backbone.
    width: D, the size of the LLM's embeddings.
    extra_weights: tensors of the checkpoint that the stock architecture has no place for, by their name in the file
        (a released VisionSelector checkpoint holds its scorer there).
    """

    id: str
    width: int
    extra_weights: Mapping[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Compressor(ABC):
    """A method that reduces visual tokens. Its options are the fields of a frozen, keyword-only dataclass.

    Class attributes
    ----------------
    name: as registered.
    stage: where it acts: `projector` (visual tokens on their way into the LLM) or `decoder` (inside the LLM);
        `pixels` only for the down-sampling control.
    needs: subset of {"received", "keys", "cls", "text"}: what `compress` reads beside the features.
    """

    name: ClassVar[str]
    stage: ClassVar[Stage] = "projector"
    needs: ClassVar[frozenset[str]] = frozenset()

    upstream_exact: bool = field(
        default=False,
        metadata={"help": "reproduce the published implementation's rounding and scope (METHODS; not its bugs)"},
    )

    @property
    def scope(self) -> Scope:
        """`item`: each image or video on its own (canonical). `prompt`: all of a prompt's visual tokens at once."""
        return "prompt" if self.upstream_exact else "item"

    def count(self, n: int, budget: Budget) -> int:
        """Tokens to keep of `n`, 1 <= K <= n. Absolute budgets mean the same in both rule sets."""
        if self.upstream_exact and isinstance(budget, Share) and budget.ratio < 1:
            return min(n, max(1, self.upstream_count(n, budget.ratio)))
        return budget.count(n)

    def upstream_count(self, n: int, ratio: float) -> int:
        """The published implementation's rounding; the default is the canonical one."""
        return Share(ratio).count(n)

    @abstractmethod
    def compress(self, tokens: VisualTokens, count: int) -> Selection:
        """Choose (and possibly merge) `count` of the scope's N tokens; called only where 1 <= count < N."""

    def bind(self, host: Host) -> Compressor:
        """This method made ready for one backbone; learned methods take their weights from `host` here.

        Raises
        ------
        InputError: where the backbone does not fit (no weights, another width).
        """
        return self

    def fingerprint(self) -> str:
        """Hash of weights given to this method apart from the backbone's; empty for methods without any."""
        return ""

    @property
    def summary(self) -> str:
        """First line of the class's docstring."""
        return (type(self).__doc__ or "").strip().split("\n")[0]


@dataclass(frozen=True, kw_only=True)
class ScoreCompressor(Compressor):
    """A method that gives each token a score and keeps those with the largest."""

    @abstractmethod
    def score(self, tokens: VisualTokens) -> Tensor:
        """(N,) scores in float32 or float64; larger is kept first, ties go to the lower index."""

    def compress(self, tokens: VisualTokens, count: int) -> Selection:
        scores = self.score(tokens)
        return Selection(kept=top_k(scores, count), scores=scores)


def top_k(scores: Tensor, count: int) -> LongTensor:
    """Indices of the `count` largest scores, ascending; among equal scores the lower index wins (METHODS 0).

    Parameters
    ----------
    scores: (N,) any float dtype. NaN counts as the smallest.

    Returns
    -------
    (count,) int64.
    """
    ranked = torch.sort(torch.nan_to_num(scores, nan=-torch.inf), descending=True, stable=True).indices
    return ranked[:count].sort().values  # type: ignore[return-value]


def working_dtype(tensor: Tensor) -> torch.dtype:
    """The dtype to score in: float64 stays float64 (tests), everything else becomes float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


@dataclass(frozen=True, kw_only=True)
class _Adapted(Compressor):
    """A third party's object that has `name`, `compress` and perhaps `stage` and `needs`, but another base class."""

    wrapped: Any

    def __post_init__(self) -> None:
        for attribute, default in (("name", None), ("stage", "projector"), ("needs", frozenset())):
            object.__setattr__(self, attribute, getattr(self.wrapped, attribute, default))

    @property
    def summary(self) -> str:
        return (type(self.wrapped).__doc__ or "").strip().split("\n")[0]

    def count(self, n: int, budget: Budget) -> int:
        own = getattr(self.wrapped, "count", None)
        return own(n, budget) if callable(own) else super().count(n, budget)

    def compress(self, tokens: VisualTokens, count: int) -> Selection:
        return self.wrapped.compress(tokens, count)

    def bind(self, host: Host) -> Compressor:
        own = getattr(self.wrapped, "bind", None)
        return as_compressor(own(host)) if callable(own) else self

    def fingerprint(self) -> str:
        own = getattr(self.wrapped, "fingerprint", None)
        return str(own()) if callable(own) else ""


def as_compressor(value: Any) -> Compressor:
    """`value` itself if it is a `Compressor`, else an adapter around an object with `name` and `compress`.

    Raises
    ------
    InputError: where `value` is neither.
    """
    if isinstance(value, Compressor):
        return value
    looks_right = callable(getattr(value, "compress", None)) and isinstance(getattr(value, "name", None), str)
    if looks_right and not isinstance(value, type):  # a class: its compress would lack the instance
        return _Adapted(wrapped=value)
    raise InputError(
        f"{value!r} is not a compressor: give what build('NAME') returns, or an object with a `name` and a "
        "`compress(tokens, count)` method"
    )


def option_defaults(compressor: Compressor) -> dict[str, Any]:
    """Every option of `compressor` with its value, as plain data for digests and tables."""
    return {f.name: getattr(compressor, f.name) for f in dataclasses.fields(compressor)}
