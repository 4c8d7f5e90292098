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

import hashlib
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import LongTensor, Tensor
from torch.nn.functional import normalize

from .budget import Budget, Share, Tokens, parse_budget
from .errors import InputError, unknown

__all__ = [
    "Budget",
    "Compressor",
    "DecoderCompressor",
    "DecoderView",
    "EncoderTrace",
    "Host",
    "InputError",
    "PixelCompressor",
    "ScoreCompressor",
    "ScoreDecoder",
    "Selection",
    "Share",
    "SimilarityRows",
    "Tokens",
    "VisualTokens",
    "as_compressor",
    "check_schedule",
    "first_largest",
    "parse_budget",
    "rounded",
    "shrinking",
    "top_k",
    "traced",
    "unit_rows",
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
        order (VisionZip's ranking for encoders without a CLS token, arXiv 2412.04467).
    keys: (N, Dk) float32, that layer's keys after rotary embedding, mean over heads and merged patches, raster order.
    keys_concat: (N, H * Dk) float32, the same keys with their heads side by side instead of averaged.
    cls: (N,) float32, attention from the CLS token, mean over heads, for encoders that have one.
    cls_whole: (N,) float32, attention from the CLS token in the encoder's last block, its heads taken as a single one
        (LLaVA-PruMerge's ranking, arXiv 2403.15388). keys_whole: (N, H * Dk) float32, the keys of that block.
    patches: (N, Dp) the encoder's output before the projector, where one patch makes one token;
        `VisualTokens.project` takes such rows to the LLM's.
    """

    received: Tensor | None = None
    keys: Tensor | None = None
    keys_concat: Tensor | None = None
    cls: Tensor | None = None
    cls_whole: Tensor | None = None
    keys_whole: Tensor | None = None
    patches: Tensor | None = None


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
    project: takes rows like `trace.patches`, (M, Dp), to rows like `features`, (M, D); None where the encoder offers
        no patches.
    """

    features: Tensor
    grid: tuple[int, int, int]
    trace: EncoderTrace | None = None
    text: Tensor | None = None
    key: str = ""
    project: Callable[[Tensor], Tensor] | None = None

    @property
    def rows(self) -> Tensor:
        """(N, Dp) what tokens are compared and merged by: the patches where the trace has them, else the features."""
        patches = self.trace.patches if self.trace is not None and self.project is not None else None
        return self.features if patches is None else patches

    def finish(self, rows: Tensor) -> Tensor:
        """(M, D) for the LLM, in the features' dtype, from (M, Dp) merged `rows`."""
        if self.rows is self.features or self.project is None:
            return rows.to(self.features.dtype)
        return self.project(rows.to(self.rows.dtype)).to(self.features.dtype)


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
    depth: layers of the LLM; 0 where it is not known.
    traces: fields of `EncoderTrace` that the vision encoder can tell; "cls" where it has a CLS token.
    extra_weights: tensors of the checkpoint that the stock architecture has no place for, by their name in the file
        (a released VisionSelector checkpoint holds its scorer there).
    """

    id: str
    width: int
    extra_weights: Mapping[str, Tensor] = field(default_factory=dict)
    depth: int = 0
    traces: frozenset[str] = frozenset()


@dataclass(frozen=True, kw_only=True)
class Compressor(ABC):
    """A method that reduces visual tokens. Its options are the fields of a frozen, keyword-only dataclass.

    Class attributes
    ----------------
    name: as registered.
    stage: where it acts: `projector` (visual tokens on their way into the LLM) or `decoder` (inside the LLM);
        `pixels` only for the down-sampling control.
    needs: what `compress` reads beside the features: "text" and fields of `EncoderTrace`. "cls|received" asks for the
        first of the two that the encoder can tell.
    renumbers: whether it was published with positions counted anew over the shorter prompt: then it has these under
        `upstream_exact` on backbones whose positions are plain numbers. Else kept tokens keep their positions.
    trained: whether it has weights of its own.
    paper: name and arXiv id of its source.
    deviations: where it differs from that, beyond what holds for every method (docs/methods.md).
    cost: time, and memory beside the inputs, as orders in the letters of docs/methods.md.
    The last three are for the table of docs/methods.md; a method of your own may leave them out.
    """

    name: ClassVar[str]
    stage: ClassVar[Stage] = "projector"
    needs: ClassVar[frozenset[str]] = frozenset()
    renumbers: ClassVar[bool] = False
    trained: ClassVar[bool] = False
    paper: ClassVar[str] = ""
    deviations: ClassVar[str] = ""
    cost: ClassVar[str] = ""

    upstream_exact: bool = field(
        default=False,
        metadata={
            "help": "reproduce the published implementation's rounding and scope, not its bugs (docs/methods.md)"
        },
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

    def check_budget(self, budget: Budget) -> None:  # noqa: B027 - most methods take every budget
        """Refuse, before any document is read, a budget that contradicts this method's options.

        Raises
        ------
        InputError: for such a budget. Budget 1, the backbone itself, is always accepted.
        """

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

    @classmethod
    def defaults_for(cls, backbone: str) -> dict[str, Any]:
        """Options that have another default on this backbone (path or hub id), such as weights published for it."""
        return {}

    def fingerprint(self) -> str:
        """Hash of weights given to this method apart from the backbone's; empty for methods without any."""
        return ""

    @property
    def summary(self) -> str:
        """First line of the class's docstring."""
        return (type(self).__doc__ or "").strip().split("\n")[0]


@dataclass(frozen=True, kw_only=True)
class PixelCompressor(Compressor):
    """A control that lowers the pixels before the vision encoder, instead of choosing among its tokens."""

    stage: ClassVar[Stage] = "pixels"

    @abstractmethod
    def size(self, height: int, width: int, count: int) -> tuple[int, int]:
        """The lowered size of one frame, in tokens: (h, w), at least (1, 1).

        Parameters
        ----------
        height, width: tokens of the frame at full size. count: tokens that it may have, 1 <= count.
        """

    def compress(self, tokens: VisualTokens, count: int) -> Selection:
        raise InputError(
            f"{self.name} acts on pixels, before there are visual tokens: it can't be stacked or called here"
        )


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
    """Indices of the `count` largest scores, ascending; among equal scores the lower index wins.

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


def unit_rows(rows: Tensor) -> Tensor:
    """(N, D) rows divided by their norms, in `working_dtype`; rows of zeros, or with NaN or infinity, become zeros."""
    return normalize(rows.to(working_dtype(rows)), dim=-1, eps=1e-12).nan_to_num_()


def first_largest(values: Tensor, slack: Tensor | float | None = None) -> Tensor:
    """(1,) the first index whose value is the largest up to rounding; stays on the device.

    A matrix product sums a row in an order that depends on the row's place, so that equal tokens get similarities a
    few units of rounding apart; a plain argmax would let that noise break their tie.

    Parameters
    ----------
    values: (N,), cosines or other numbers of about that size.
    slack: how far below the largest a value may be, 8 units of rounding where not given; (N,) or one for all.
    """
    slack = 8 * torch.finfo(values.dtype).eps if slack is None else slack
    return (values + slack >= values.amax()).to(torch.uint8).argmax(dim=0, keepdim=True)


def rounded(similarities: Tensor) -> Tensor:
    """Cosines to 32 binary digits, so that a sort sees equal tokens as equal (see `first_largest`).

    Parameters
    ----------
    similarities: float64, of rows that were made unit rows in float64 (`unit_rows(rows.double())`). In float32 a step
        wide enough to hide the noise of a product, 2^-20, would also make equal what is not.

    Raises
    ------
    ValueError: for another dtype.
    """
    if similarities.dtype != torch.float64:
        raise ValueError(f"invalid dtype {similarities.dtype}: expected float64, from unit_rows(rows.double())")
    return similarities.mul(2.0**32).round_().div_(2.0**32)


class SimilarityRows:
    """Cosines of one token after the other to all tokens, for methods that pick tokens one by one.

    On a GPU a row is one product, and nothing is read back. On a CPU, whose memory is slow beside its arithmetic, a
    row costs a pass over all features, and 64 rows in one product little more: when a row is missing, those of the
    tokens that look likely to be picked soon come along. Which rows are guessed changes the time only; at most 512
    rows, and a quarter of N, are held.

    Parameters
    ----------
    unit: (N, D) rows of length 1, from `unit_rows`.
    """

    def __init__(self, unit: Tensor) -> None:
        self._unit = unit
        self._rows: dict[int, Tensor] = {}
        self._most = max(1, min(512, unit.shape[0] // 4))
        self._guess = min(64, self._most)

    def __call__(self, pick: Tensor, promise: Tensor) -> Tensor:
        """(N,) cosines of token `pick`, (1,), which is picked once; larger `promise`, (N,): likelier to come soon."""
        if self._unit.is_cuda:
            return torch.mv(self._unit, self._unit.index_select(0, pick)[0])
        wanted = int(pick)
        if wanted not in self._rows:
            likely = torch.topk(promise, self._guess).indices.tolist()
            fresh = [wanted, *(i for i in likely if i != wanted and i not in self._rows)][: self._most]
            if len(self._rows) + len(fresh) > self._most:
                self._rows.clear()
            self._rows.update(zip(fresh, self._unit[fresh] @ self._unit.T, strict=True))
        return self._rows.pop(wanted)


# Tokens whose similarities a GPU holds at once (256 MiB), and one block of threads their values in its registers.
_FUSED = 8192


def pick_all(
    unit: Tensor, start: Tensor | None, weight: float, count: int, *, fades: bool = False
) -> LongTensor | None:
    """Pick `count` tokens, each the first one whose value is the largest up to rounding (`first_largest`).

    After a pick p with similarities s a value becomes `start - weight * max(s of all picks)`; with `fades` it becomes
    `max(0, value - exp(-weight * (1 - s)^2) * value[p])`. What is picked is not picked again.

    Parameters
    ----------
    unit: (N, D) rows of length 1, or 0. count: 1 <= count <= N.
    start: (N,) the first values, same dtype; None: 0 for all, and the first pick is the token whose most similar other
        token is least similar.

    Returns
    -------
    (count,) int64, or None where only the caller's own loop can do it: not on CUDA, not float32, more than 8192
    tokens, or no working Triton.
    """
    if not unit.is_cuda or unit.dtype != torch.float32 or unit.shape[0] > _FUSED:
        return None
    from . import fused

    return fused.run(unit, start, weight, count, fades) if fused.works(unit.device) else None


def traced(tokens: VisualTokens, method: str, *names: str) -> list[Tensor]:
    """The fields `names` of the tokens' trace; of alternatives ("cls|received") the first that it holds.

    Raises
    ------
    InputError: where the encoder did not tell one of them.
    """
    values: dict[str, Tensor] = {}
    for name in names:
        told = (getattr(tokens.trace, field, None) for field in name.split("|"))
        values[name] = next((value for value in told if value is not None), None)  # type: ignore[assignment]
    if missing := [name.replace("|", "/") for name, value in values.items() if value is None]:
        raise InputError(
            f"{method} needs the encoder's {' and '.join(missing)}, which tokens.trace does not hold: use a backbone "
            "that traces its encoder's attention, or a method that reads features alone such as divprune"
        )
    return list(values.values())


def weights_digest(module: torch.nn.Module) -> str:
    """sha256 of a module's weights by name and value: a bfloat16 file and its float32 copy have the same."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        exact = tensor.detach().to("cpu", torch.float64).contiguous()
        digest.update(f"{name}{tuple(exact.shape)}".encode())
        digest.update(exact.numpy().tobytes())
    return digest.hexdigest()


class DecoderView(ABC):
    """What a decoder-stage method sees of one prompt at the input of one LLM layer, without padding.

    Attributes
    ----------
    layer, depth: the layer whose input this is, and the LLM's number of layers.
    hidden: (S, D) states of the tokens still there, in prompt order, the model's dtype.
    visual: (V,) int64, places of the visual tokens among the S, ascending.
    original: (V,) int64, their visual indices in the prompt (0 is its first visual token).
    item: (V,) int64, which image or video of the prompt each belongs to.
    text: (T,) int64, places of the question's tokens among the S; the last token of the prompt is at S - 1.
    total: tokens of the prompt before any compression.
    embeds: (S0, D) input embeddings of the whole prompt as it entered the LLM, (V0,) `first_visual` the visual
        tokens among them and (T,) `first_text` the question's.
    memory: kept from one layer of the same prompt to the next, for methods that decide something only once.
    """

    layer: int
    depth: int
    hidden: Tensor
    visual: Tensor
    original: Tensor
    item: Tensor
    text: Tensor
    total: int
    embeds: Tensor
    first_visual: Tensor
    first_text: Tensor
    memory: dict[Any, Any]

    @abstractmethod
    def received(self, layer: int, queries: Tensor | None = None) -> Tensor:
        """(S,) attention that each token receives: causal softmax rows, averaged over heads and queries.

        Parameters
        ----------
        layer: this view's layer (its input norm and projections applied to the states as they are now), or the one
            before it (the attention that really took place there; needs "previous").
        queries: (Q,) places of the query tokens among the S; all S where not given.

        Returns
        -------
        float32 (float64 for float64 states), summing to 1. Summed in chunks: never an S x S array.
        """

    @abstractmethod
    def keys(self, layer: int) -> Tensor:
        """(S, H * d) keys of `layer` after rotary embedding, heads side by side; `layer` as for `received`."""

    @abstractmethod
    def final_norm(self, states: Tensor) -> Tensor:
        """`states` through the norm that stands behind the LLM's last layer; same shape and dtype."""


@dataclass(frozen=True, kw_only=True)
class DecoderCompressor(Compressor):
    """A method that drops visual tokens inside the LLM, at the input of one layer or several.

    Text tokens are never dropped, positions stay those of the full prompt, and layers before the first stage see
    every token. Padding, masks, the cache of each layer and decoding are the engine's (`models/decoder_pruning.py`).
    `needs` may hold "previous": the view then answers for the layer before it, too.
    """

    stage: ClassVar[Stage] = "decoder"

    @abstractmethod
    def layers(self, depth: int) -> tuple[int, ...]:
        """Layers (0-based) at whose input tokens are dropped, ascending, 1 <= layer < depth."""

    @abstractmethod
    def keep(self, view: DecoderView, members: LongTensor, count: int) -> Selection:
        """Choose (and possibly merge) `count` of the M visual tokens of one scope; called where 1 <= count < M.

        Parameters
        ----------
        members: (M,) int64, the scope's tokens as indices into `view.visual`, ascending.

        Returns
        -------
        `kept` among 0..M-1; `features` are states at this layer, (count, D); `scores` (M,).
        """

    def counts(self, n: int, budget: Budget, depth: int, total: int) -> tuple[int, ...]:
        """Tokens of a scope of `n` that are left after each stage, one for each of `layers(depth)`.

        Parameters
        ----------
        total: tokens of the whole prompt before any compression, text included.
        """
        return (self.count(n, budget),) * len(self.layers(depth))

    @property
    def before(self) -> Compressor | None:
        """The projector-stage method that acts first on the same prompt; None for most."""
        return None

    def left_over(self, n: int, budget: Budget) -> Budget:
        """The budget for what `before` has left of a scope of `n`."""
        return budget

    def compress(self, tokens: VisualTokens, count: int) -> Selection:
        raise InputError(f"method '{self.name}' acts inside the LLM: run it with a backbone's prefill() or generate()")

    def bind(self, host: Host) -> Compressor:
        if host.depth:
            self.check_layers(host.depth)
        return self

    def check_layers(self, depth: int) -> tuple[int, ...]:
        """`layers(depth)`.

        Raises
        ------
        InputError: where they do not lie inside an LLM of `depth` layers.
        """
        layers = self.layers(depth)
        ascending = all(a < b for a, b in itertools.pairwise(layers))
        if not layers or not ascending or layers[0] < 1 or layers[-1] >= depth:
            raise InputError(
                f"method '{self.name}' would drop tokens at the input of layers {layers} of {depth}: "
                f"give layers from 1 to {depth - 1}"
            )
        return layers


@dataclass(frozen=True, kw_only=True)
class ScoreDecoder(DecoderCompressor):
    """A decoder-stage method that gives each visual token a score and keeps those with the largest."""

    @abstractmethod
    def score(self, view: DecoderView) -> Tensor:
        """(V,) scores in float32 or float64; larger is kept first, ties go to the lower index."""

    def keep(self, view: DecoderView, members: LongTensor, count: int) -> Selection:
        if ("scores", view.layer) not in view.memory:  # one pass serves all scopes of a prompt
            view.memory["scores", view.layer] = self.score(view)
        scores = view.memory["scores", view.layer][members]
        return Selection(kept=top_k(scores, count), scores=scores)


def check_schedule(method: str, schedule: str) -> None:
    """Refuse a `schedule` that is neither `geometric` nor `published`.

    Raises
    ------
    InputError: for such a value.
    """
    if schedule not in ("geometric", "published"):
        raise InputError(
            f"invalid option schedule={schedule!r} of method '{method}': expected geometric (any budget) or published"
        )


def shrinking(n: int, final: int, ratio: float, stages: int) -> tuple[int, ...]:
    """Tokens left after each of `stages` equal steps: shares r^(1/s), r^(2/s), ..., and exactly `final` at the end."""
    shares = [Share(ratio ** (stage / stages)).count(n) for stage in range(1, stages)]
    return (*(max(final, kept) for kept in shares), final)


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
