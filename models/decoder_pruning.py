"""Dropping visual tokens inside the LLM, by hooks that are gone afterwards, under the stock forward and `generate()`.

Forward pre-hooks on the decoder layers do all of it: at a stage's layer they drop tokens from the states, and from
there on they give every layer the rotary tables, positions and attention mask of the tokens that are left. The cache
then holds another number of tokens in each layer; transformers makes one mask from the first layer's length, so the
hooks replace it while decoding, too. Proved against an independent recomputation in tests/models/test_decoder.py.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from visionselector_eval.baselines.contract.base import Selection
from visionselector_eval.baselines.contract.errors import InputError
from visionselector_eval.models.instrumentation import step
from visionselector_eval.models.planes import cached_tokens
from visionselector_eval.models.splice import CompressedPrompt, on_cpu, repad

if TYPE_CHECKING:
    from torch import Tensor
from visionselector_eval.models.decoder_view import Entered, LayerAccess, PromptView

# Ways to generate that copy rows, replay tokens or need a cache of one length: the layers' own lengths rule them out.
_REFUSED = {
    "num_beams": (None, 1),
    "num_return_sequences": (None, 1),
    "use_cache": (None, True),
    "assistant_model": (None,),
    "prompt_lookup_num_tokens": (None,),
    "prefill_chunk_size": (None,),
    "cache_implementation": (None, "dynamic"),
}


def refuse_unusual_generation(method: str, generation: dict[str, Any], defaults: Any) -> None:
    """Check generation settings for a decoder-stage method.

    Args:
        defaults: the checkpoint's generation config, for what `generation` does not say.

    Raises:
        InputError: beam search and others that a cache of unequal lengths can't serve.
    """
    for name, usable in _REFUSED.items():
        value = generation.get(name, getattr(defaults, name, None))
        if value not in usable:
            raise InputError(
                f"{name}={value} can't be used with method '{method}', which drops tokens inside the LLM: "
                f"leave {name} out, or use a projector-stage method"
            )


@dataclass(frozen=True, eq=False)
class _Layout:
    """Which tokens are in a layer.

    Attributes:
        source: (B, S) int64, columns of the full-length prompt;
        valid: (B, S) bool, False on (left) padding.
        lengths: tokens of each prompt.
        alive: for each prompt its visual tokens, as indices among those of the first layer.
    """

    source: Tensor
    valid: Tensor
    lengths: list[int]
    alive: list[Tensor]

    @property
    def ragged(self) -> bool:
        return any(length != self.source.shape[1] for length in self.lengths)

    def tables(self, position_embeddings: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Rotary tables (B, S0, d) of the full-length prompt, for the tokens of this layout."""
        return tuple(t.gather(1, self.source[..., None].expand(-1, -1, t.shape[-1])) for t in position_embeddings)

    @property
    def positions(self) -> Tensor:
        """(B, S) plain counting positions. Not the prompt's: gaps would look like packed prompts to flash attention."""
        return (self.valid.long().cumsum(1) - 1).clamp_min(0)


@dataclass(eq=False)
class _Scope:
    """Tokens of one prompt that a method chooses among: one image or video, or all. `counts`: left after each stage."""

    present: int
    counts: tuple[int, ...]


class DecoderPruning:
    """One run of the LLM over a batch of prompts, with tokens dropped on the way.

    Use `installed()` around the forward or `generate()`, then `outcome()`.

    Args:
        access: the LLM.
        compressed: a prompt whose `decoder` says what is to be dropped.
    """

    def __init__(self, access: LayerAccess, compressed: CompressedPrompt) -> None:
        assert compressed.decoder is not None
        self.access, self.prompt = access, compressed
        self.method, self.budget = compressed.decoder
        self.depth = len(access.layers)
        self.stages = self.method.check_layers(self.depth)
        self._lengths = compressed.attention_mask.sum(1).tolist()
        self._scopes = [self._plan(row) for row in range(len(self._lengths))]
        self._reset()

    def _plan(self, row: int) -> list[_Scope]:
        items = self.prompt.items[row]
        total = self._lengths[row] + self.prompt.totals[row] - len(self.prompt.kept[row])
        if self.method.scope == "prompt" and items:
            items = [(sum(n for n, _ in items), sum(kept for _, kept in items))]
        scopes = []
        for n, present in items:
            if not present:
                continue
            counts = self.method.counts(present, self.method.left_over(n, self.budget), self.depth, total)
            falling = all(b <= a for a, b in itertools.pairwise((present, *counts)))
            if len(counts) != len(self.stages) or not falling or counts[-1] < 1:
                raise InputError(
                    f"method '{self.method.name}' wants {counts} of {present} tokens left after its stages at layers "
                    f"{self.stages}: a number for each stage is needed, at least 1 and never growing"
                )
            scopes.append(_Scope(present, counts))
        return scopes

    def _reset(self) -> None:
        prompt = self.prompt
        columns = torch.arange(prompt.embeds.shape[1], device=prompt.embeds.device).expand(len(self._lengths), -1)
        self._first = _Layout(
            columns,
            prompt.attention_mask.bool(),
            list(self._lengths),
            [torch.arange(len(kept), device=prompt.embeds.device) for kept in prompt.kept],
        )
        self._at = [self._first] * self.depth
        self._previous: Tensor | None = None
        self._memory: list[dict[Any, Any]] = [{} for _ in self._lengths]
        self._scores: list[Tensor | None] = list(prompt.scores)
        self._planes = [list(rows) for rows in prompt.planes]
        # Masks and tables are the same for all layers between two stages: the last ones made are kept.
        self._shared: dict[str, tuple[Any, Any]] = {}

    @contextmanager
    def installed(self) -> Iterator[None]:
        """The hooks, for as long as the block runs."""
        handles = []
        try:
            for number in range(self.stages[0], self.depth):
                layer = self.access.layers[number]
                handles.append(layer.register_forward_pre_hook(self._hook(number), with_kwargs=True))
            if "previous" in self.method.needs:
                for number in self.stages:
                    attention = self.access.layers[number - 1].self_attn
                    hook = self._capture(number - 1)
                    handles.append(attention.register_forward_pre_hook(hook, with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._previous = None
            self._shared.clear()

    def planes_at(self, layer: int) -> tuple[Tensor, list[Tensor]]:
        """Where visual tokens stand in a layer's states, (B, S) bool, and what is added to each prompt's behind it."""
        layout = self._at[layer]
        return self.prompt.visual.gather(1, layout.source) & layout.valid, self._planes[layer]

    def outcome(self) -> Entered:
        """What entered the layers; after the run."""
        last, prompt = self._at[-1], self.prompt
        visual = torch.tensor(
            [[len(alive) for alive in layout.alive] for layout in self._at], dtype=torch.float64
        )  # (depth, B)
        real = last.valid
        gathered = [p.gather(1, last.source).masked_fill(~real, 0) for p in prompt.position_ids]
        return Entered(
            kept=[kept[alive.cpu()] for kept, alive in zip(prompt.kept, last.alive, strict=True)],
            scores=self._scores,
            position_ids=torch.stack(gathered),
            attention_mask=real.to(prompt.attention_mask.dtype),
            layer_lengths=[layout.source.shape[1] for layout in self._at],
            layer_tokens=visual.mean(0).tolist(),
        )

    # Hooks ------------------------------------------------------------------------------------------------------------

    def _capture(self, number: int) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            if not cached_tokens(kwargs, number):
                self._previous = args[0] if args else kwargs["hidden_states"]

        return hook

    def _hook(self, number: int) -> Callable[..., tuple[tuple[Any, ...], dict[str, Any]]]:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
            kwargs = dict(kwargs)
            hidden = args[0] if args else kwargs.pop("hidden_states")
            cached = cached_tokens(kwargs, number)
            if not cached:
                hidden = self._read_prompt(number, hidden, kwargs)
            layout, received = self._at[number], kwargs.get("attention_mask")
            if layout is not self._first:
                if cached:
                    kwargs["attention_mask"] = self._decode_mask(layout, cached, hidden, received)
                else:
                    kwargs["attention_mask"] = self._prompt_mask(layout, hidden, received)
            return (hidden, *args[1:]), kwargs

        return hook

    def _read_prompt(self, number: int, hidden: Tensor, kwargs: dict[str, Any]) -> Tensor:
        """The states that layer `number` is to see of the prompt; its tables and positions are put into `kwargs`."""
        if number == self.stages[0]:
            self._memory, self._shared = [{} for _ in self._lengths], {}
        before = self._at[number - 1]
        if hidden.shape[:2] != before.source.shape:
            # Without this a prompt given in pieces would be pruned piece by piece.
            raise InputError(
                f"layer {number} got {tuple(hidden.shape[:2])} tokens where {tuple(before.source.shape)} were "
                "prepared: run the prompt that compress() gave, whole and once"
            )
        tables = kwargs["position_embeddings"]
        if number in self.stages:
            hidden, after = self._drop(number, hidden, before, tables)
            self._at[number:] = [after] * (self.depth - number)
        layout = self._at[number]
        if layout is not self._first:
            kwargs["position_embeddings"] = self._once("tables", layout, lambda: layout.tables(tables))
            if kwargs.get("position_ids") is not None:
                kwargs["position_ids"] = self._once("positions", layout, lambda: layout.positions)
        return hidden

    def _once(self, name: str, key: Any, make: Callable[[], Any]) -> Any:
        if name not in self._shared or self._shared[name][0] != key:
            self._shared[name] = key, make()
        return self._shared[name][1]

    def _kind(self, received: Tensor | None) -> str:
        """What the attention back-end takes: `flat` (B, keys), `bool` or `float` (B, 1, queries, keys)."""
        if received is not None:
            return "flat" if received.ndim == 2 else "bool" if received.dtype == torch.bool else "float"
        name = str(self.access.config._attn_implementation)
        return "flat" if "flash" in name else "bool" if "sdpa" in name else "float"

    def _prompt_mask(self, layout: _Layout, hidden: Tensor, received: Tensor | None) -> Tensor | None:
        kind = self._kind(received)
        if not layout.ragged and (received is None or kind == "flat"):
            return None  # nothing to hide but what is to come, which every back-end does by itself

        def make() -> Tensor:
            if kind == "flat":
                return layout.valid.long()
            size = hidden.shape[1]
            causal = torch.ones(size, size, dtype=torch.bool, device=hidden.device).tril()
            itself = torch.eye(size, dtype=torch.bool, device=hidden.device)  # padding, too, must see something
            return _as_kind(((layout.valid[:, None] & causal) | itself)[:, None], kind, received, hidden)

        return self._once("mask", layout, make)

    def _decode_mask(self, layout: _Layout, cached: int, hidden: Tensor, received: Tensor | None) -> Tensor | None:
        kind, new = self._kind(received), hidden.shape[1]
        if not layout.ragged and (received is None or kind == "flat"):
            return None

        def make() -> Tensor:
            rows, size = layout.valid.shape
            seen = torch.cat([layout.valid, layout.valid.new_ones(rows, cached - size)], 1)
            if kind == "flat":
                return torch.cat([seen, seen.new_ones(rows, new)], 1).long()
            fresh = torch.ones(new, new, dtype=torch.bool, device=hidden.device).tril().expand(rows, -1, -1)
            allowed = torch.cat([seen[:, None].expand(-1, new, -1), fresh], 2)[:, None]
            return _as_kind(allowed, kind, received, hidden)

        return self._once("mask", (layout, cached, new), make)

    # Stages -----------------------------------------------------------------------------------------------------------

    def _drop(self, number: int, hidden: Tensor, layout: _Layout, tables: tuple[Tensor, ...]) -> tuple[Tensor, _Layout]:
        """States and layout after the stage at the input of layer `number`."""
        stage = self.stages.index(number)
        keep, alive, lengths = layout.valid.clone(), list(layout.alive), list(layout.lengths)
        merged = []
        for row, scopes in enumerate(self._scopes):
            sizes = [(s.counts[stage - 1] if stage else s.present, s.counts[stage]) for s in scopes]
            if all(present == count for present, count in sizes):  # also a prompt without visual tokens
                continue
            view = self._view(number, row, hidden, layout, tables)
            indices = view.visual + hidden.shape[1] - lengths[row]
            start, chosen, scores, selections = 0, [], [], []
            for present, count in sizes:
                members = torch.arange(start, start + present, device=hidden.device)
                with step("compressor"):
                    selection = self._select(view, members, count)
                kept = members[selection.kept.to(members.device)]
                chosen.append(kept)
                selections.append((members, selection))
                scores.append(selection.scores)
                if selection.features is not None:
                    merged.append((row, indices[kept], selection.features.to(hidden.dtype)))
                start += present
            index = torch.cat(chosen)
            on_cpu(index, start, self.method.name)
            for plane in self._planes[number:]:
                rows = [one.follow(plane[row][members], self.method.name) for members, one in selections]
                plane[row] = torch.cat(rows)
            keep[row, indices] = False
            keep[row, indices[index]] = True
            alive[row] = layout.alive[row][index]
            lengths[row] -= start - len(index)
            known = [s for s in scores if s is not None]
            if self._scores[row] is None and stage == 0 and len(known) == len(scores):
                self._scores[row] = self._over_all(row, torch.cat(known))
        self._previous = None
        if lengths == layout.lengths:
            return hidden, layout
        if merged:
            hidden = hidden.clone()
            for row, at, features in merged:
                hidden[row, at] = features
        local, valid = repad(keep)
        hidden = hidden.gather(1, local[..., None].expand(-1, -1, hidden.shape[-1])).masked_fill(~valid[..., None], 0)
        return hidden, _Layout(layout.source.gather(1, local), valid, lengths, alive)

    def _view(self, number: int, row: int, hidden: Tensor, layout: _Layout, tables: tuple[Tensor, ...]) -> PromptView:
        """Row `row` of the batch, from where its padding ends."""
        prompt, device = self.prompt, hidden.device
        tail = hidden.shape[1] - layout.lengths[row]
        columns = layout.source[row, tail:]
        whole = slice(prompt.embeds.shape[1] - self._lengths[row], None)
        original = prompt.kept[row].to(device)[layout.alive[row]]
        ends = torch.tensor([n for n, _ in prompt.items[row]], device=device).cumsum(0)
        cos, sin = (table[row, columns] for table in tables)
        return PromptView(
            layer=number,
            depth=self.depth,
            hidden=hidden[row, tail:],
            visual=_indices(prompt.visual[row, columns]),
            original=original,
            item=torch.bucketize(original, ends, right=True),
            text=_indices(prompt.question[row, columns]),
            total=self._lengths[row] + prompt.totals[row] - len(prompt.kept[row]),
            embeds=prompt.embeds[row, whole],
            first_visual=_indices(prompt.visual[row, whole]),
            first_text=_indices(prompt.question[row, whole]),
            memory=self._memory[row],
            access=self.access,
            tables=(cos, sin),
            previous=None if self._previous is None else self._previous[row, tail:],
        )

    def _over_all(self, row: int, scores: Tensor) -> Tensor:
        """(N,) scores over all visual tokens of the prompt; NaN for those that a projector stage had dropped before."""
        kept, total = self.prompt.kept[row], self.prompt.totals[row]
        return scores.new_full((total,), torch.nan).index_copy_(0, kept.to(scores.device), scores)

    def _select(self, view: PromptView, members: Tensor, count: int) -> Selection:
        """The method's choice among `members`, checked. The prompt's last token stays even where it is visual."""
        if count == len(members):
            return Selection(kept=torch.arange(count, device=members.device))
        ends_visually = bool(view.visual[members[-1]] == len(view.hidden) - 1)
        if ends_visually:
            members, count = members[:-1], count - 1
        selection = Selection(kept=members[:0])
        if count:
            with torch.autocast(view.hidden.device.type, enabled=False):
                selection = self.method.keep(view, members, count)
        selection = selection.checked(self.method.name, count, view.hidden.shape[1])
        if ends_visually:
            last = selection.kept.new_tensor([len(members)])
            kept = torch.cat([selection.kept, last])
            if selection.features is None:
                return Selection(kept=kept)
            features = torch.cat([selection.features, view.hidden[-1:].to(selection.features.dtype)])
            merge = selection.merge
            if merge is None:
                return Selection(kept=kept, features=features)
            return Selection(kept=kept, features=features, merge=lambda rows: torch.cat([merge(rows[:-1]), rows[-1:]]))
        return selection


def _indices(mask: Tensor) -> Tensor:
    return mask.nonzero().squeeze(1)


def _as_kind(allowed: Tensor, kind: str, received: Tensor | None, hidden: Tensor) -> Tensor:
    if kind == "bool":
        return allowed
    dtype = received.dtype if received is not None else hidden.dtype
    zeros = torch.zeros(allowed.shape, dtype=dtype, device=allowed.device)
    return zeros.masked_fill_(~allowed, torch.finfo(dtype).min)
