"""The contract of methods that drop visual tokens inside the LLM."""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from visionselector_eval.baselines.contract.base import Compressor, Host, Selection, Stage, VisualTokens
from visionselector_eval.baselines.contract.budget import Budget, Share
from visionselector_eval.baselines.contract.errors import InputError
from visionselector_eval.baselines.contract.numerics import top_k


class DecoderView(ABC):
    """What a decoder-stage method sees of one prompt at the input of one LLM layer, without padding.

    Attributes:
        layer, depth: the layer whose input this is, and the LLM's number of layers.
        hidden: (S, D) states of the tokens still there, in prompt order, the model's dtype.
        visual: (V,) int64, positions of the visual tokens among the S, ascending.
        original: (V,) int64, their visual indices in the prompt (0 is its first visual token).
        item: (V,) int64, which image or video of the prompt each belongs to.
        text: (T,) int64, positions of the question's tokens among the S; the last token of the prompt is at S - 1.
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

        Args:
            layer: this view's layer (its input norm and projections applied to the states as they are now), or the one
                before it (the attention that really took place there; needs "previous").
            queries: (Q,) positions of the query tokens among the S; all S where not given.

        Returns:
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
    def keep(self, view: DecoderView, members: Tensor, count: int) -> Selection:
        """Choose (and possibly merge) `count` of the M visual tokens of one scope; called where 1 <= count < M.

        Args:
            members: (M,) int64, the scope's tokens as indices into `view.visual`, ascending.

        Returns:
            `kept` among 0..M-1; `features` are states at this layer, (count, D); `scores` (M,).
        """

    def counts(self, n: int, budget: Budget, depth: int, total: int) -> tuple[int, ...]:
        """Tokens of a scope of `n` that are left after each stage, one for each of `layers(depth)`.

        Args:
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

        Raises:
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

    def keep(self, view: DecoderView, members: Tensor, count: int) -> Selection:
        if ("scores", view.layer) not in view.memory:  # one pass serves all scopes of a prompt
            view.memory["scores", view.layer] = self.score(view)
        scores = view.memory["scores", view.layer][members]
        return Selection(kept=top_k(scores, count), scores=scores)


def check_schedule(method: str, schedule: str) -> None:
    """Refuse a `schedule` that is neither `geometric` nor `published`.

    Raises:
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
