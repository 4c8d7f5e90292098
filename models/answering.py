"""Answer batches of requests under any number of (compressor, budget) settings from one vision pass."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from visionselector_eval.baselines.base import Budget, Compressor

from .backbones.base import Backbone
from .generation import cut, generation_arguments
from .inputs import MediaSettings, build_inputs
from .splice import CompressedPrompt, Encoded

if TYPE_CHECKING:
    from torch import LongTensor

    from .decoder_pruning import Entered


@dataclass(frozen=True)
class Request:
    """One question.

    Attributes
    ----------
    key: names the document, for seeded methods.
    messages: gives the conversation (see `build_inputs`) when needed, so that pictures are decoded batch by batch.
    generation: the task's generation settings.
    until: strings at which the answer ends.
    """

    key: str
    messages: Callable[[], Sequence[Mapping[str, Any]]]
    generation: Mapping[str, Any] = field(default_factory=dict)
    until: tuple[str, ...] = ()


@dataclass(frozen=True)
class Setting:
    """A compressor at a budget. `seed` is that of sampled answers; greedy ones do not depend on it."""

    compressor: Compressor
    budget: Budget
    seed: int = 0


@dataclass(frozen=True)
class Answer:
    """One answer with what it cost in tokens, measured.

    Attributes
    ----------
    text: decoded, cut at the first stop string.
    kept_tokens, total_tokens: visual tokens that reached the LLM's last layer, and before compression.
    prompt_tokens: all tokens that entered the LLM. new_tokens: generated, the end token included.
    layer_tokens: visual tokens averaged over the LLM's layers: kept_tokens where nothing is dropped inside the LLM.
    """

    text: str
    kept_tokens: int
    total_tokens: int
    prompt_tokens: int
    new_tokens: int
    layer_tokens: float = 0.0


@dataclass(frozen=True)
class PreparedBatch:
    """Requests decoded, preprocessed and encoded once."""

    requests: Sequence[Request]
    inputs: Mapping[str, Any]
    encoded: Encoded


class Answerer:
    """Answers requests with one backbone.

    Parameters
    ----------
    backbone: a loaded backbone.
    settings: pixels, frames and system prompt.
    """

    def __init__(self, backbone: Backbone, settings: MediaSettings | None = None) -> None:
        self.backbone = backbone
        self.settings = settings or MediaSettings()

    def prepare(self, requests: Sequence[Request], settings: Sequence[Setting]) -> PreparedBatch:
        """Decode, preprocess and encode a batch once for all `settings`."""
        inputs = self.inputs(requests)
        needs = frozenset().union(*(s.compressor.needs for s in settings))
        inputs = self.backbone.to_device(inputs)
        return PreparedBatch(requests, inputs, self.backbone.encode(inputs, needs))

    def inputs(self, requests: Sequence[Request]) -> dict[str, Any]:
        """Decode and preprocess a batch.

        Raises
        ------
        InputError: a picture or video that can't be read.
        """
        return build_inputs(self.backbone.processor, [r.messages() for r in requests], self.settings)

    def answer(self, batch: PreparedBatch, setting: Setting) -> list[Answer]:
        """Answers of a prepared batch under one setting. All requests of a batch share their generation settings."""
        first = batch.requests[0]
        keys = [r.key for r in batch.requests]
        compressed = self.backbone.compress(
            batch.inputs, setting.compressor, setting.budget, encoded=batch.encoded, keys=keys
        )
        arguments = generation_arguments(first.generation)
        if arguments["do_sample"]:
            name = f"{setting.seed}:{setting.compressor.name}:{setting.budget}:{'|'.join(keys)}"
            torch.manual_seed(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1)
        tokens, seen = self.backbone.run_generate(compressed, **arguments)
        return self._decode(batch.requests, compressed, seen, tokens)

    def _decode(
        self, requests: Sequence[Request], compressed: CompressedPrompt, seen: Entered, tokens: LongTensor
    ) -> list[Answer]:
        tokenizer = self.backbone.processor.tokenizer
        texts = tokenizer.batch_decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        ends = self.backbone.end_tokens
        prompt_lengths = compressed.attention_mask.sum(1).tolist()
        answers = []
        for i, (request, row) in enumerate(zip(requests, tokens.tolist(), strict=True)):
            length = next((n + 1 for n, token in enumerate(row) if token in ends), len(row))
            answers.append(
                Answer(
                    text=cut(texts[i], request.until),
                    kept_tokens=len(seen.kept[i]),
                    total_tokens=compressed.totals[i],
                    prompt_tokens=prompt_lengths[i],
                    new_tokens=length,
                    layer_tokens=seen.layer_tokens[i],
                )
            )
        return answers
