"""What a method inside the LLM sees of a prompt: one layer's inputs, its attention, the positions of its tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from visionselector_eval.baselines.contract.decoder import DecoderView
from visionselector_eval.baselines.contract.errors import InputError
from visionselector_eval.baselines.contract.numerics import working_dtype
from visionselector_eval.models.splice import CompressedPrompt

if TYPE_CHECKING:
    from torch import Tensor


# Largest number of attention weights held at once while attention is averaged over many queries (float32: 64 MiB).
_CHUNK_WEIGHTS = 1 << 24


class LayerAccess:
    """The parts of a Llama-like decoder that ranking reads: norms, projections and rotary embedding.

    Args:
        language_model: has `layers` (with `input_layernorm` and `self_attn.{q_proj,k_proj,head_dim,scaling}`, and
            perhaps `self_attn.{q_norm,k_norm}`) and
            `norm`.
        rotate: the family's `apply_rotary_pos_emb(q, k, cos, sin)`.
    """

    def __init__(self, language_model: Any, rotate: Callable[..., tuple[Tensor, Tensor]]) -> None:
        self.layers: Sequence[Any] = language_model.layers
        self.norm: Callable[[Tensor], Tensor] = language_model.norm
        self.config = language_model.config
        self._rotate = rotate

    def attention_input(self, layer: int, states: Tensor) -> Tensor:
        """(S, D) what the layer's attention sees of its input `states`."""
        return self.layers[layer].input_layernorm(states)

    def queries(self, layer: int, normed: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(Q, H, d) after rotary embedding."""
        q = self._heads(layer, "q", normed)
        return self._rotate(q, q, cos, sin)[0]

    def keys(self, layer: int, normed: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(S, H', d) after rotary embedding, H' <= H heads."""
        k = self._heads(layer, "k", normed)
        return self._rotate(k, k, cos, sin)[1]

    def _heads(self, layer: int, which: str, normed: Tensor) -> Tensor:
        """(S, heads, d) queries ("q") or keys ("k") before rotary embedding.

        Through the layer's own norm of them where it has one: of each head (Qwen3), or of all heads side by side.
        """
        attention = self.layers[layer].self_attn
        projected = getattr(attention, f"{which}_proj")(normed)
        norm = getattr(attention, f"{which}_norm", None)
        if norm is not None and norm.weight.shape[0] == projected.shape[-1] != attention.head_dim:
            projected, norm = norm(projected), None
        heads = projected.view(len(normed), -1, attention.head_dim)
        return heads if norm is None else norm(heads)

    def scale(self, layer: int) -> float:
        """What the products of queries and keys are multiplied with."""
        return self.layers[layer].self_attn.scaling


@dataclass(eq=False)
class PromptView(DecoderView):
    """One prompt at one stage; see `DecoderView`."""

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
    access: LayerAccess
    tables: tuple[Tensor, Tensor]
    previous: Tensor | None
    _sources: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)

    def _source(self, layer: int) -> tuple[Tensor, Tensor]:
        """The attention input of `layer` (S, D) and its keys (S, H', d), computed once a view."""
        if layer not in self._sources:
            if layer == self.layer:
                normed = self.access.attention_input(layer, self.hidden)
            elif layer == self.layer - 1 and self.previous is not None:
                normed = self.previous
            else:
                raise InputError(
                    f"layer {layer} can't be read at the input of layer {self.layer}: ask for this layer, or with "
                    "'previous' in `needs` for the one before it"
                )
            self._sources[layer] = normed, self.access.keys(layer, normed, *self.tables)
        return self._sources[layer]

    def received(self, layer: int, queries: Tensor | None = None) -> Tensor:
        normed, keys = self._source(layer)
        dtype = working_dtype(normed)
        size, groups, _ = keys.shape
        indices = torch.arange(size, device=normed.device) if queries is None else queries.to(normed.device)
        columns = torch.arange(size, device=normed.device)
        k = keys.to(dtype).permute(1, 2, 0)[:, None]  # (H', 1, d, S)
        total = torch.zeros(size, dtype=dtype, device=normed.device)
        cos, sin = self.tables
        heads = self.access.config.num_attention_heads
        for rows in indices.split(max(1, _CHUNK_WEIGHTS // (heads * size))):
            q = self.access.queries(layer, normed[rows], cos[rows], sin[rows]).to(dtype) * self.access.scale(layer)
            # Query head h reads key head h // (H / H'), as in transformers' repeat_kv.
            q = q.view(len(rows), groups, -1, q.shape[-1]).permute(1, 2, 0, 3)
            later = columns > rows[:, None]
            total += (q @ k).masked_fill_(later, -torch.inf).softmax(-1).sum((0, 1, 2))
        return total / (heads * len(indices))

    def keys(self, layer: int) -> Tensor:
        return self._source(layer)[1].flatten(1)

    def final_norm(self, states: Tensor) -> Tensor:
        return self.access.norm(states)


@dataclass(frozen=True)
class Entered:
    """What really entered the LLM's layers.

    Attributes:
        kept: for each prompt the visual indices that reached the last layer, ascending, CPU.
        scores: for each prompt (N,) float or None: those of the first stage, for images.
        position_ids: (P, B, S');
        attention_mask: (B, S'): of the last layer.
        layer_lengths: tokens entering each layer, the largest of the batch.
        layer_tokens: for each prompt its visual tokens, averaged over the layers, the cost to compare.
    """

    kept: list[Tensor]
    scores: list[Tensor | None]
    position_ids: Tensor
    attention_mask: Tensor
    layer_lengths: list[int]
    layer_tokens: list[float]


def entered(compressed: CompressedPrompt, depth: int) -> Entered:
    """For a prompt of which nothing is dropped inside the LLM."""
    return Entered(
        kept=compressed.kept,
        scores=compressed.scores,
        position_ids=compressed.position_ids,
        attention_mask=compressed.attention_mask,
        layer_lengths=[compressed.embeds.shape[1]] * depth,
        layer_tokens=[float(len(kept)) for kept in compressed.kept],
    )
