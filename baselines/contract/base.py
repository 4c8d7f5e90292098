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
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from visionselector_eval.baselines.contract.budget import Budget, Share
from visionselector_eval.baselines.contract.errors import InputError
from visionselector_eval.baselines.contract.numerics import top_k, working_dtype

Stage = Literal["pixels", "projector", "decoder"]


Scope = Literal["item", "prompt"]


@dataclass(frozen=True)
class EncoderTrace:
    """What the vision encoder can tell about its own attention; a field is None unless the compressor `needs` it.

    Attributes:
        received: (N,) float32, attention that each token received: softmax attention of the encoder's ranking layer,
            mean over heads, summed over the queries of its segment, averaged over the patches merged into one token, in
            raster order (VisionZip's ranking for encoders without a CLS token, arXiv 2412.04467).
        keys: (N, Dk) float32, that layer's keys after rotary embedding, mean over heads and merged patches, raster
            order.
        keys_concat: (N, H * Dk) float32, the same keys with their heads side by side instead of averaged.
        cls: (N,) float32, attention from the CLS token, mean over heads, for encoders that have one.
        cls_whole: (N,) float32, attention from the CLS token in the encoder's last block, its heads taken as a single
            one (LLaVA-PruMerge's ranking, arXiv 2403.15388).
        keys_whole: (N, H * Dk) float32, the keys of that block.
        patches: (N, Dp) the encoder's output before the projector, where one patch makes one token;
            `VisualTokens.project` takes such rows to the LLM's.
        at_layers: the first four of another layer of the encoder than its ranking layer, by the name asked for:
            "received@16" is that of block 16, counted from 0; "received@-1" of the last.
    """

    received: Tensor | None = None
    keys: Tensor | None = None
    keys_concat: Tensor | None = None
    cls: Tensor | None = None
    cls_whole: Tensor | None = None
    keys_whole: Tensor | None = None
    patches: Tensor | None = None
    at_layers: Mapping[str, Tensor] | None = None

    def get(self, name: str) -> Tensor | None:
        """What a name in `Compressor.needs` stands for; None where the encoder did not tell it."""
        return (self.at_layers or {}).get(name) if "@" in name else getattr(self, name, None)

    def map(self, change: Callable[[Tensor], Tensor]) -> EncoderTrace:
        """The same trace with every tensor changed, such as for some of the tokens."""
        told = {f.name: getattr(self, f.name) for f in fields(self) if f.name != "at_layers"}
        return EncoderTrace(
            **{name: None if value is None else change(value) for name, value in told.items()},
            at_layers=self.at_layers and {name: change(value) for name, value in self.at_layers.items()},
        )


@dataclass(frozen=True)
class VisualTokens:
    """The visual tokens of one scope: one image or video (canonical), or the whole prompt (`upstream_exact`).

    Attributes:
        features: (N, D) as the LLM would see them, raster order (time, row, column), the model's dtype.
        grid: merged (t, h, w) with t*h*w == N; (1, 1, N) for a scope that holds several images or videos.
        trace: what the compressor asked for in `needs`, else None.
        text: (T, D) embeddings of the question's tokens where "text" is in `needs`, else None.
        key: names the document (and the scope's place in it), so that seeded methods draw the same for the same
            document whatever the batch around it.
        project: takes rows like `trace.patches`, (M, Dp), to rows like `features`, (M, D); None where the encoder
            offers no patches.
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

    Attributes:
        kept: (K,) int64, ascending, unique, 0 <= kept < N. A merged token stands at its anchor's index.
        features: (K, D) where kept tokens were changed (merged), row p belongs to kept[p]; None means `features[kept]`.
        scores: (N,) for images, or None.
        merge: with `features`, the same merging for other rows: takes (N, E) floats to (K, E), each kept row the sum of
            rows with the weights that its features were made with. A backbone that adds features of the same tokens
            behind deeper layers of its LLM (DeepStack) needs it.
    """

    kept: Tensor
    features: Tensor | None = None
    scores: Tensor | None = None
    merge: Callable[[Tensor], Tensor] | None = None

    def checked(self, method: str, count: int, width: int) -> Selection:
        """This selection, if it has the form that the contract promises.

        Args:
            count: tokens to keep.
            width: D of the tokens.

        Raises:
            InputError: indices or features of another shape or type.
        """
        if self.kept.dtype != torch.int64 or self.kept.shape != (count,):
            raise InputError(
                f"method '{method}' returned {tuple(self.kept.shape)} indices of {self.kept.dtype}: "
                f"{count} ascending int64 indices are needed"
            )
        if self.features is not None and self.features.shape != (count, width):
            raise InputError(
                f"method '{method}' returned features of shape {tuple(self.features.shape)}: "
                f"one row for each of its {count} kept tokens is needed"
            )
        return self

    def follow(self, rows: Tensor, method: str) -> Tensor:
        """(K, E) what is kept of other rows of the same tokens, (N, E), merged as the features were.

        Raises:
            InputError: a method that merges and does not say how.
        """
        kept = self.kept.to(rows.device)
        if self.features is None:
            return rows[kept]
        if self.merge is None:
            raise InputError(
                f"method '{method}' merges tokens without saying how (Selection.merge), which a backbone needs that "
                "adds features at several layers of its LLM: use another method, other options, or another backbone"
            )
        return self.merge(rows.to(working_dtype(rows))).to(rows.dtype)


@dataclass(frozen=True)
class Host:
    """What a compressor may know of the backbone it is bound to.

    Attributes:
        id: path or hub id of the backbone.
        width: D, the size of the LLM's embeddings.
        depth: layers of the LLM; 0 where it is not known.
        encoder_depth: blocks of the vision encoder; 0 where it is not known.
        traces: fields of `EncoderTrace` that the vision encoder can tell; "cls" where it has a CLS token.
        extra_weights: tensors of the checkpoint that the stock architecture has no place for, by their name in the file
            (a released VisionSelector checkpoint holds its scorer there).
    """

    id: str
    width: int
    extra_weights: Mapping[str, Tensor] = field(default_factory=dict)
    depth: int = 0
    traces: frozenset[str] = frozenset()
    encoder_depth: int = 0


@dataclass(frozen=True, kw_only=True)
class Compressor(ABC):
    """A method that reduces visual tokens. Its options are the fields of a frozen, keyword-only dataclass.

    Attributes:
        name: as registered.
        stage: where it acts: `projector` (visual tokens on their way into the LLM) or `decoder` (inside the LLM);
            `pixels` only for the down-sampling control.
        needs: what `compress` reads beside the features: "text" and fields of `EncoderTrace`. "cls|received" asks for
            the first of the two that the encoder can tell, "received@16" for that of the encoder's block 16.
        renumbers: whether it was published with positions counted over the shorter prompt: then it has these under
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

        Raises:
            InputError: for such a budget. Budget 1, the backbone itself, is always accepted.
        """

    @abstractmethod
    def compress(self, tokens: VisualTokens, count: int) -> Selection:
        """Choose (and possibly merge) `count` of the scope's N tokens; called only where 1 <= count < N."""

    def bind(self, host: Host) -> Compressor:
        """This method made ready for one backbone; learned methods take their weights from `host` here.

        Raises:
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

        Args:
            height, width: tokens of the frame at full size.
            count: tokens that it may have, 1 <= count.
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


def traced(tokens: VisualTokens, method: str, *names: str) -> list[Tensor]:
    """The fields `names` of the tokens' trace; of alternatives ("cls|received") the first that it holds.

    Raises:
        InputError: where the encoder did not tell one of them.
    """
    values: list[Tensor] = []
    missing: list[str] = []
    for name in names:
        held = (tokens.trace.get(field) for field in name.split("|")) if tokens.trace is not None else iter(())
        value: Tensor | None = next((value for value in held if value is not None), None)
        if value is None:
            missing.append(name.replace("|", "/"))
        else:
            values.append(value)
    if missing:
        raise InputError(
            f"{method} needs the encoder's {' and '.join(missing)}, which tokens.trace does not hold: use a backbone "
            "that traces its encoder's attention, or a method that reads features alone such as divprune"
        )
    return values


def weights_digest(module: torch.nn.Module) -> str:
    """sha256 of a module's weights by name and value: a bfloat16 file and its float32 copy have the same."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        exact = tensor.detach().to("cpu", torch.float64).contiguous()
        digest.update(f"{name}{tuple(exact.shape)}".encode())
        digest.update(exact.numpy().tobytes())
    return digest.hexdigest()


def checked_compressor(value: Any) -> Compressor:
    """`value`, if it is a `Compressor`.

    Raises:
        InputError: where it is anything else, such as a class or an object that only looks like one.
    """
    if isinstance(value, Compressor):
        return value
    raise InputError(
        f"{value!r} is not a compressor: expected what build('NAME') returns, or an instance of a subclass of "
        "ScoreCompressor or Compressor (visionselector_eval.baselines)"
    )
