"""Answer batches of requests under any number of (compressor, budget) settings from one vision pass."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch.overrides import TorchFunctionMode

from visionselector_eval.baselines.contract.base import Compressor
from visionselector_eval.baselines.contract.budget import Budget
from visionselector_eval.baselines.contract.errors import InputError, one_line
from visionselector_eval.models.backbones.base import Backbone
from visionselector_eval.models.generation import cut, generation_arguments
from visionselector_eval.models.inputs import MediaSettings, build_inputs
from visionselector_eval.models.requests import Request
from visionselector_eval.models.splice import CompressedPrompt, Encoded

if TYPE_CHECKING:
    from torch import Tensor

    from visionselector_eval.models.decoder_view import Entered

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CompressorAtBudget:
    """A compressor at a budget. `seed`, document and repetition choose a sampled answer; greedy ones need none.

    Raises:
        InputError: a budget that contradicts the compressor's options.
    """

    compressor: Compressor
    budget: Budget
    seed: int = 0

    def __post_init__(self) -> None:
        self.compressor.check_budget(self.budget)


@dataclass(frozen=True)
class Answer:
    """One answer with what it cost in tokens, measured.

    Attributes:
        text: decoded, cut at the first stop string.
        kept_tokens, total_tokens: visual tokens that reached the LLM's last layer, and before compression.
        prompt_tokens: all tokens that entered the LLM.
        new_tokens: generated, the end token included.
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


def _sample_seed(seed: int, request: Request) -> int:
    """The seed of a sampled answer. Methods and budgets share it, so that their difference is not one of luck."""
    name = f"{seed}:{request.key}:{request.repetition}"
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") >> 1


class _RowDraws(TorchFunctionMode):
    """Each row of `torch.multinomial` from a generator of its own: what stands beside it in a batch has no influence.

    Args:
        seeds: one a row. Draws over another number of rows are left alone.
        device: where the probabilities are.
    """

    def __init__(self, seeds: Sequence[int], device: torch.device) -> None:
        super().__init__()
        self._generators = [torch.Generator(device).manual_seed(seed) for seed in seeds]

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        arguments = dict(kwargs or {})
        if func is torch.multinomial and "generator" not in arguments and len(args[0]) == len(self._generators):
            rows = zip(args[0], self._generators, strict=True)
            return torch.stack([func(row, *args[1:], generator=own, **arguments) for row, own in rows])
        return func(*args, **arguments)


@contextmanager
def _sampling(seeds: Sequence[int], device: torch.device) -> Iterator[None]:
    """Draws that depend on `seeds` alone; the random state outside stays as it was."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seeds[0])  # for draws that are not one a row
        with _RowDraws(seeds, device):
            yield


class Answerer:
    """Answers requests with one backbone.

    Args:
        backbone: a loaded backbone.
        settings: pixels, frames and system prompt.
    """

    def __init__(self, backbone: Backbone, settings: MediaSettings | None = None) -> None:
        self.backbone = backbone
        self.settings = settings or MediaSettings()

    def prepare(self, requests: Sequence[Request], settings: Sequence[CompressorAtBudget]) -> PreparedBatch:
        """Decode, preprocess and encode a batch once for all `settings`."""
        inputs = self.inputs(requests)
        needs = frozenset().union(*(s.compressor.needs for s in settings))
        inputs = self.backbone.to_device(inputs)
        return PreparedBatch(requests, inputs, self.backbone.encode(inputs, needs))

    def inputs(self, requests: Sequence[Request]) -> dict[str, Any]:
        """Decode and preprocess a batch.

        Raises:
            InputError: an image or video that can't be read, or anything that the processor does not take.
        """
        try:
            return build_inputs(self.backbone.processor, [r.messages() for r in requests], self.settings)
        except InputError:
            raise
        except Exception as error:  # processors refuse a document with whatever exception they meet
            log.debug("the processor refused a batch", exc_info=error)
            raise InputError(f"the checkpoint's processor refused the input ({one_line(error)})") from error

    def answer(self, batch: PreparedBatch, setting: CompressorAtBudget) -> list[Answer]:
        """Answers of a prepared batch under one setting. All requests of a batch share their generation settings."""
        first = batch.requests[0]
        keys = [r.key for r in batch.requests]
        compressed = self.backbone.compress(
            batch.inputs, setting.compressor, setting.budget, encoded=batch.encoded, keys=keys
        )
        arguments = generation_arguments(first.generation)
        if arguments["do_sample"]:
            seeds = [_sample_seed(setting.seed, r) for r in batch.requests]
            with _sampling(seeds, self.backbone.device):
                tokens, seen = self.backbone.run_generate(compressed, **arguments)
        else:
            tokens, seen = self.backbone.run_generate(compressed, **arguments)
        return self._decode(batch.requests, compressed, seen, tokens)

    def _decode(
        self, requests: Sequence[Request], compressed: CompressedPrompt, seen: Entered, tokens: Tensor
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
