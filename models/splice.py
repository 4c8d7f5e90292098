"""From a compressor's selections to a shorter prompt: scopes, gathering, padding and positions, for any backbone.

This is where hand-made ports go wrong (text lost between two images, features on the wrong positions, batch 1 only), so
it is written once. Nothing here knows a model family: an adapter says where the visual tokens stand and which positions
they have, a compressor says which of them stay.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from typing import TYPE_CHECKING, Literal

import torch

from visionselector_eval.baselines.contract.base import Compressor, EncoderTrace, Selection, VisualTokens
from visionselector_eval.baselines.contract.budget import Budget, Share
from visionselector_eval.baselines.contract.decoder import DecoderCompressor
from visionselector_eval.baselines.contract.errors import InputError
from visionselector_eval.models.instrumentation import step
from visionselector_eval.models.planes import Planes

if TYPE_CHECKING:
    from collections.abc import Callable

    from torch import Tensor


@dataclass(eq=False)
class VisualItem:
    """One image or video of a prompt, encoded.

    Attributes:
        kind: "image" or "video".
        grid: merged (t, h, w); N = t*h*w.
        features: (N, D), raster order.
        make_trace: computes what the encoder knows about its own attention, at first use; None if it was not captured.
        project: see `VisualTokens.project`.
        planes: (N, D) each, what is added to these tokens behind the LLM's first layers (`models.planes`).
    """

    kind: Literal["image", "video"]
    grid: tuple[int, int, int]
    features: Tensor
    make_trace: Callable[[], EncoderTrace] | None = None
    project: Callable[[Tensor], Tensor] | None = None
    planes: tuple[Tensor, ...] = ()

    @cached_property
    def trace(self) -> EncoderTrace:
        """Computed once, whatever the number of methods and budgets that ask."""
        return self.make_trace() if self.make_trace is not None else EncoderTrace()


@dataclass(frozen=True)
class Encoded:
    """The vision features of a batch of prompts: for each prompt its images and videos in prompt order."""

    rows: Sequence[Sequence[VisualItem]]

    @property
    def planes(self) -> Planes:
        """The planes of all visual tokens, before any is dropped; none where no item has them."""
        shown = [item for items in self.rows for item in items]
        return tuple(
            tuple(
                torch.cat([item.planes[layer] for item in items]) if items else shown[0].planes[layer][:0]
                for items in self.rows
            )
            for layer in range(max((len(item.planes) for item in shown), default=0))
        )


@dataclass(frozen=True)
class Prompt:
    """A batch of full-length prompts, left-padded, as the LLM would see it without compression.

    Attributes:
        input_ids: (B, S) int64.
        embeds: (B, S, D) text embeddings; the rows of visual placeholders are overwritten.
        attention_mask: (B, S) int64, 0 on padding.
        position_ids: (P, B, S) int64, P = 3 for 3-D positions, 1 for 1-D.
        visual: (B, S) bool, placeholders of visual tokens.
        question: (B, S) bool, tokens of the question (for compressors that need the text).
        keys: a name for each prompt, for seeded methods.
    """

    input_ids: Tensor
    embeds: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    visual: Tensor
    question: Tensor
    keys: Sequence[str]


@dataclass(frozen=True)
class CompressedPrompt:
    """A batch of prompts without the dropped visual tokens, left-padded again, ready for the LLM.

    Attributes:
        input_ids, attention_mask: (B, S') int64.
        embeds: (B, S', D).
        position_ids: (P, B, S').
        kept: for each prompt the kept visual indices, ascending, on the CPU; 0 is the first visual token of that
            prompt.
        totals: for each prompt its visual tokens before compression.
        scores: for each prompt (N,) float or None.
        visual, question: (B, S') bool, positions of visual tokens and of the question's.
        items: for each prompt the sizes of its images and videos, in order: (before compression, kept).
        decoder: what is still to be dropped inside the LLM, a method and its budget; None for nothing. `kept` then
            holds what enters the LLM's first layer.
        planes: what is added to the kept tokens behind the LLM's first layers, the rows of each prompt by layer.
    """

    input_ids: Tensor
    embeds: Tensor
    attention_mask: Tensor
    position_ids: Tensor
    kept: list[Tensor]
    totals: list[int]
    scores: list[Tensor | None]
    visual: Tensor
    question: Tensor
    items: list[list[tuple[int, int]]]
    decoder: tuple[DecoderCompressor, Budget] | None = None
    planes: Planes = ()


def repad(keep: Tensor) -> tuple[Tensor, Tensor]:
    """Left-padding again after columns were dropped: the i-th kept token of a row of n goes to column S' - n + i.

    Args:
        keep: (B, S) bool.

    Returns:
        source: (B, S') int64, the column that each token comes from (0 on padding); mask: (B, S') bool, False on
        padding.
    """
    lengths = keep.sum(1)
    size = int(lengths.max())
    source = torch.zeros(keep.shape[0], size, dtype=torch.int64, device=keep.device)
    mask = torch.arange(size, device=keep.device)[None] >= (size - lengths)[:, None]
    source[mask] = keep.nonzero()[:, 1]
    return source, mask


def prompt_key(ids: Tensor) -> str:
    """A name for a prompt that nobody named: a hash of its token ids (without padding)."""
    return hashlib.sha256(ids.cpu().numpy().tobytes()).hexdigest()[:16]


def _cat_traces(traces: Sequence[EncoderTrace]) -> EncoderTrace:
    def cat(name: str) -> Tensor | None:
        parts = [t.get(name) for t in traces]
        told = [part for part in parts if part is not None]
        return torch.cat(told) if len(told) == len(parts) else None

    names = [field.name for field in fields(EncoderTrace) if field.name != "at_layers"]
    layers = {name: cat(name) for name in traces[0].at_layers or {}}
    return EncoderTrace(
        **{name: cat(name) for name in names},
        at_layers={name: value for name, value in layers.items() if value is not None} or None,
    )


def _scopes(items: Sequence[VisualItem], compressor: Compressor, text: Tensor | None, key: str) -> list[VisualTokens]:
    """The scopes that `compressor` sees of one prompt: each image or video, or everything together."""
    wants_trace = bool(compressor.needs - {"text"})
    groups = [[item] for item in items] if compressor.scope == "item" else [list(items)]
    scopes = []
    for number, group in enumerate(groups):
        features = group[0].features if len(group) == 1 else torch.cat([item.features for item in group])
        scopes.append(
            VisualTokens(
                features=features,
                grid=group[0].grid if len(group) == 1 else (1, 1, features.shape[0]),
                trace=_cat_traces([item.trace for item in group]) if wants_trace else None,
                text=text if "text" in compressor.needs else None,
                key=f"{key}/{number}",
                project=group[0].project if wants_trace else None,
            )
        )
    return scopes


def select(tokens: VisualTokens, compressor: Compressor, budget: Budget) -> Selection:
    """`compressor`'s selection of one scope, checked. A budget that keeps everything never reaches the compressor."""
    n = tokens.features.shape[0]
    count = n if budget == Share(1.0) else compressor.count(n, budget)
    if not 1 <= count <= n:
        raise InputError(f"method '{compressor.name}' asks for {count} of {n} tokens: its count() must give 1..{n}")
    if count == n:
        return Selection(kept=torch.arange(n, device=tokens.features.device))
    # Methods choose their own precision; a surrounding autocast would halve it behind their back.
    with torch.autocast(tokens.features.device.type, enabled=False):
        selection = compressor.compress(tokens, count)
    return selection.checked(compressor.name, count, tokens.features.shape[1])


def on_cpu(indices: Tensor, total: int, method: str) -> Tensor:
    """What a method keeps of `total` tokens, on the CPU.

    Raises:
        InputError: indices that are not ascending, unique and in range.
    """
    kept = indices.cpu()
    if len(kept) and (int(kept[0]) < 0 or int(kept[-1]) >= total or bool((kept.diff() <= 0).any())):
        raise InputError(f"method '{method}' returned indices that are not ascending, unique and in range")
    return kept


def _kept_plane(plane: Tensor, scopes: Sequence[VisualTokens], selections: Sequence[Selection], method: str) -> Tensor:
    """(K, D) of one plane, (N, D), for the tokens that a prompt's selections keep."""
    rows = plane.split([len(scope.features) for scope in scopes])
    return torch.cat([chosen.follow(part, method) for chosen, part in zip(selections, rows, strict=True)])


def _kept_rows(
    scopes: Sequence[VisualTokens], selections: Sequence[Selection], method: str, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """The kept visual indices of a prompt, on its device and on the CPU, and their features (K, D).

    Raises:
        InputError: indices that are not ascending, unique and in range.
    """
    offset, kept, features = 0, [], []
    for scope, selection in zip(scopes, selections, strict=True):
        chosen = selection.kept.to(device)
        kept.append(chosen + offset)
        features.append(scope.features[chosen] if selection.features is None else selection.features)
        offset += scope.features.shape[0]
    index = torch.cat(kept)
    return index, on_cpu(index, offset, method), torch.cat(features)


def splice(prompt: Prompt, encoded: Encoded, compressor: Compressor, budget: Budget) -> CompressedPrompt:
    """Drop the visual tokens that `compressor` does not keep; text is never dropped.

    Kept tokens keep their positions, except where the method asks for others (`Compressor.renumbers`). Long so that all
    that happens to a prompt stands in one place.

    Raises:
        InputError: where visual placeholders and encoded features do not match, or the compressor broke its contract.
    """
    device = prompt.embeds.device
    keep = prompt.attention_mask.bool() & ~prompt.visual
    embeds = prompt.embeds.clone()
    kept_rows: list[Tensor] = []
    totals: list[int] = []
    scores: list[Tensor | None] = []
    sizes: list[list[tuple[int, int]]] = []
    planes = [list(rows) for rows in encoded.planes]
    for row, items in enumerate(encoded.rows):
        total = sum(item.features.shape[0] for item in items)
        indices = prompt.visual[row].nonzero().squeeze(1)
        if len(indices) != total:
            raise InputError(f"prompt {row} has {len(indices)} visual placeholders but {total} visual features")
        totals.append(total)
        if not items:
            kept_rows.append(torch.empty(0, dtype=torch.int64))
            scores.append(None)
            sizes.append([])
            continue
        text = prompt.embeds[row][prompt.question[row]] if "text" in compressor.needs else None
        with step("compressor"):
            scopes = _scopes(items, compressor, text, prompt.keys[row])
            selections = [select(scope, compressor, budget) for scope in scopes]
            for plane in planes:
                plane[row] = _kept_plane(plane[row], scopes, selections, compressor.name)
        index, kept, features = _kept_rows(scopes, selections, compressor.name, device)
        keep[row, indices[index]] = True
        embeds[row, indices[index]] = features.to(embeds.dtype)
        kept_rows.append(kept)
        own = [item.features.shape[0] for item in items]
        owner = torch.bucketize(kept, torch.tensor(own).cumsum(0), right=True)
        sizes.append(list(zip(own, owner.bincount(minlength=len(own)).tolist(), strict=True)))
        has_scores = all(s.scores is not None for s in selections)
        scores.append(torch.cat([s.scores for s in selections if s.scores is not None]) if has_scores else None)

    source, mask = repad(keep)
    positions = prompt.position_ids
    if compressor.renumbers and compressor.upstream_exact and len(positions) == 1 and budget != Share(1.0):
        positions = (keep.cumsum(1) - 1).clamp_min(0)[None]

    def gather(tensor: Tensor) -> Tensor:
        return tensor.gather(1, source).masked_fill(~mask, 0)

    pad_ids = torch.where(mask, prompt.input_ids.gather(1, source), prompt.input_ids[:, :1])
    return CompressedPrompt(
        input_ids=pad_ids,
        embeds=embeds.gather(1, source[..., None].expand(-1, -1, embeds.shape[-1])).masked_fill(~mask[..., None], 0),
        attention_mask=mask.to(prompt.attention_mask.dtype),
        position_ids=torch.stack([gather(p) for p in positions]),
        kept=kept_rows,
        totals=totals,
        scores=scores,
        visual=prompt.visual.gather(1, source) & mask,
        question=prompt.question.gather(1, source) & mask,
        items=sizes,
        planes=tuple(tuple(plane) for plane in planes),
    )
