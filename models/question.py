"""Where the question stands in a prompt: for methods that read the text."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor


class Question:
    """Finds the tokens of the user's question, whatever the chat template.

    Args:
        processor: the backbone's.
    """

    def __init__(self, processor: Any) -> None:
        self.processor = processor

    def __call__(self, ids: Tensor, mask: Tensor, visual: Tensor, markers: Sequence[int] = ()) -> Tensor:
        """(B, S) bool: plain text of the user's turn, from its last image up to the turn's end; else all plain text.

        Args:
            ids, mask, visual: (B, S) token ids, attention mask and placeholders.
            markers: ids that close an image.
        """
        special = torch.tensor(sorted(self.processor.tokenizer.all_special_ids), device=ids.device)
        plain = mask.bool() & ~visual & ~torch.isin(ids, special)
        boundary = visual | torch.isin(ids, torch.tensor(markers, dtype=ids.dtype, device=ids.device))
        columns = torch.arange(ids.shape[1], device=ids.device)
        last = torch.where(boundary, columns, -1).amax(1, keepdim=True)
        # The turn ends with the first special token behind the last image, or where the template asks to answer.
        closing = torch.isin(ids, special) & (columns > last)
        tail = torch.tensor(self._invitation, dtype=ids.dtype, device=ids.device)
        if 0 < len(tail) <= ids.shape[1]:
            closing[:, -len(tail)] |= (ids[:, -len(tail) :] == tail).all(1)
        end = torch.where(closing, columns, ids.shape[1]).amin(1, keepdim=True)
        question = plain & (columns > last) & (columns < end)
        return torch.where(question.any(1, keepdim=True), question, plain)

    @cached_property
    def _invitation(self) -> list[int]:
        """The tokens with which the chat template asks the model to answer; none where there is no template."""
        messages = [{"role": "user", "content": [{"type": "text", "text": "x"}]}]
        try:
            without, whole_text = (
                self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=asked)
                for asked in (False, True)
            )
        except ValueError:  # no template
            return []
        before, whole = (self.processor.tokenizer(text)["input_ids"] for text in (without, whole_text))
        same = next((i for i, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b), len(before))
        return whole[same:]
