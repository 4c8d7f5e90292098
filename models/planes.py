"""Visual features that enter an LLM behind several of its layers (DeepStack), by hooks that are gone afterwards.

A plane is what is added to the states of the visual tokens behind one layer: plane p behind layer p. Stock models add
the planes of the full prompt; here those of the tokens that are still there are added, so that a model's own forward
and `generate()` run on a shorter prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.functional import pad

from visionselector_eval.baselines.contract.errors import InputError
from visionselector_eval.models.generation import kv_cache

if TYPE_CHECKING:
    from torch import Tensor

Planes = tuple[tuple["Tensor", ...], ...]
"""Rows to be added behind layer p to the visual tokens of prompt b, (K, D), by `planes[p][b]`."""

Placed = Callable[[int], tuple["Tensor", Sequence["Tensor"]]]
"""For a layer: where visual tokens stand in its states, (B, S) bool, and the rows of each prompt."""


@contextmanager
def added(layers: Sequence[Any], number: int, placed: Placed) -> Iterator[None]:
    """Add planes while the prompt is read, for as long as the block runs.

    Args:
        layers: of the LLM.
        number: planes, behind the first layers, one each.
        placed: asked when a layer has read the prompt.
    """
    cached: dict[int, bool] = {}

    def before(layer: int) -> Callable[..., None]:
        def hook(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            cached[layer] = cached_tokens(kwargs, layer) > 0

        return hook

    def behind(layer: int) -> Callable[..., Any]:
        def hook(module: Any, args: tuple[Any, ...], output: Any) -> Any:
            if cached[layer]:  # a new token: the prompt's planes are in the cache
                return output
            states = output[0] if isinstance(output, tuple) else output
            where, rows = placed(layer)
            beams, new = states.shape[0] // where.shape[0], states.shape[1] - where.shape[1]
            if new < 0:
                raise InputError(
                    f"layer {layer} got {states.shape[1]} of a prompt's {where.shape[1]} tokens, but features are "
                    "added behind it: run the prompt that compress() gave, whole and once"
                )
            # Without a cache the prompt is read again with every new token, which stands behind it.
            index = pad(where, (0, new)).repeat_interleave(beams, 0)
            states = states.clone()
            states[index] += torch.cat([part for part in rows for _ in range(beams)]).to(states.dtype)
            return (states, *output[1:]) if isinstance(output, tuple) else states

        return hook

    handles = []
    try:
        for layer in range(number):
            handles.append(layers[layer].register_forward_pre_hook(before(layer), with_kwargs=True))
            handles.append(layers[layer].register_forward_hook(behind(layer)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def cached_tokens(kwargs: dict[str, Any], layer: int) -> int:
    """Tokens of a layer in the cache that its call is given: 0 while the prompt is read, and without a cache."""
    cache = kv_cache(kwargs)
    return cache.get_seq_length(layer) if cache is not None else 0
