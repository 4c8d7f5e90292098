"""One answer of one cell on one prompt, as every metric takes it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from visionselector_eval.baselines import build
from visionselector_eval.baselines.contract.base import Compressor
from visionselector_eval.baselines.contract.errors import InputError
from visionselector_eval.harness.profiler.phases import Clock, PhaseRecorder, clock_for
from visionselector_eval.harness.profiler.spec import ProfileCell
from visionselector_eval.models.generation import generation_arguments

if TYPE_CHECKING:
    from visionselector_eval.models.backbones.base import Backbone
    from visionselector_eval.models.decoder_view import Entered
    from visionselector_eval.models.splice import CompressedPrompt


@dataclass(frozen=True)
class BoundCell:
    """A cell with its method, ready to run."""

    cell: ProfileCell
    compressor: Compressor


@dataclass(frozen=True)
class Prompt:
    """One prompt on the device.

    Attributes:
        key: names it, for seeded methods.
        inputs: what the processor gave.
        seconds: what it took to make them.
    """

    key: str
    inputs: Mapping[str, Any]
    seconds: float = 0.0


class Profiler:
    """Measures answers of one backbone.

    Args:
        backbone: loaded.
        new_tokens: forced length of every answer.
        clock: for time; the device's own by default.
    """

    def __init__(self, backbone: Backbone, new_tokens: int, clock: Clock | None = None) -> None:
        self.backbone = backbone
        self.device = backbone.device
        self.clock = clock or clock_for(self.device)
        self._generation = generation_arguments({"max_new_tokens": new_tokens, "min_new_tokens": new_tokens})

    def settle(self) -> None:
        """Wait until the device is idle."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def preprocess(self, make: Callable[[], Mapping[str, Any]], key: str) -> Prompt:
        """A prompt on the device, with the seconds that took: decoding, resizing, tokenizing and the copy."""
        start = time.perf_counter()
        inputs = self.backbone.to_device(make())
        self.settle()
        return Prompt(key, inputs, time.perf_counter() - start)

    def compress(self, bound: BoundCell, prompt: Prompt) -> CompressedPrompt:
        """The prompt after the vision encoder and the cell's method."""
        return self.backbone.compress(prompt.inputs, bound.compressor, bound.cell.budget, keys=[prompt.key])

    def answer(
        self, bound: BoundCell, prompt: Prompt, recorder: PhaseRecorder | None
    ) -> tuple[CompressedPrompt, Entered]:
        """One answer; the recorder's phases are switched, its hooks are the caller's."""
        if recorder is not None:
            recorder.switch("prefill")
        compressed = self.compress(bound, prompt)
        if recorder is not None:
            recorder.switch("setup")
        _, entered = self.backbone.run_generate(compressed, **self._generation)
        if recorder is not None:
            recorder.switch(None)
        return compressed, entered


def bind_cells(
    backbone: Backbone, cells: Sequence[ProfileCell]
) -> tuple[list[BoundCell], dict[str, tuple[ProfileCell, str]]]:
    """Cells with their methods fitted to the backbone, and those that do not fit, with the reason."""
    bound, failed = [], {}
    for cell in cells:
        try:
            method = backbone.bind(build(cell.method, **cell.options))
            method.check_budget(cell.budget)
            bound.append(BoundCell(cell, method))
        except InputError as error:
            failed[cell.digest] = (cell, str(error))
    return bound, failed


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, on a GPU or on the host."""
    texts = ("out of memory", "can't allocate memory", "not enough memory")
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or (
        isinstance(error, RuntimeError) and any(text in str(error).lower() for text in texts)
    )
