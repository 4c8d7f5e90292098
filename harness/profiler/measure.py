"""Run cells over workloads in rounds, and write down what each answer cost.

A round runs every cell once on one prompt, in an order of its own, so that drift of clocks and temperatures meets all
cells alike and each can be compared with `full` in the same round. Time, memory, FLOPs and energy have rounds of their
own: nothing but the method runs while time is taken.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from visionselector_eval.baselines import build
from visionselector_eval.baselines.contract.base import Compressor
from visionselector_eval.baselines.contract.errors import InputError
from visionselector_eval.harness.profiler.flops import (
    FlopProbe,
    theoretical_clip,
    theoretical_decode,
    theoretical_output,
    theoretical_prefill,
    theoretical_projector,
    theoretical_vision,
)
from visionselector_eval.harness.profiler.memory import MemoryProbe, memory_probe
from visionselector_eval.harness.profiler.nvml import NvmlSampler
from visionselector_eval.harness.profiler.phases import FIRST_TOKEN, PHASES, Clock, PhaseRecorder, clock_for
from visionselector_eval.harness.profiler.spec import ProfileCell
from visionselector_eval.models.generation import generation_arguments

if TYPE_CHECKING:
    from visionselector_eval.models.backbones.base import Backbone


@dataclass(frozen=True)
class BoundCell:
    """A cell with its method, ready to run."""

    cell: ProfileCell
    compressor: Compressor


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

    def preprocess(self, make: Callable[[], Mapping[str, Any]]) -> tuple[dict[str, Any], float]:
        """Inputs on the device, and the seconds that took: decoding, resizing, tokenizing and the copy."""
        start = time.perf_counter()
        inputs = self.backbone.to_device(make())
        self.settle()
        return inputs, time.perf_counter() - start

    def answer(self, bound: BoundCell, inputs: Mapping[str, Any], key: str, recorder: PhaseRecorder | None) -> Any:
        """One answer; the recorder's phases are switched, its hooks are the caller's. Returns (compressed, entered)."""
        if recorder is not None:
            recorder.switch("prefill")
        compressed = self.backbone.compress(inputs, bound.compressor, bound.cell.budget, keys=[key])
        if recorder is not None:
            recorder.switch("setup")
        _, entered = self.backbone.run_generate(compressed, **self._generation)
        if recorder is not None:
            recorder.switch(None)
        return compressed, entered

    def timed(self, bound: BoundCell, inputs: Mapping[str, Any], key: str) -> dict[str, Any]:
        """Milliseconds of each phase, and what entered the LLM."""
        recorder = PhaseRecorder(self.clock)
        with recorder.watching(self.backbone):
            self.settle()
            compressed, entered = self.answer(bound, inputs, key, recorder)
        seconds = recorder.seconds()
        steps = recorder.forwards - 1
        before = sum(compressed.totals)
        return {
            **{f"{phase}_ms": 1000 * seconds[phase] for phase in PHASES if phase != "preprocess"},
            "ttft_ms": 1000 * sum(seconds[phase] for phase in FIRST_TOKEN),
            "latency_ms": 1000 * sum(seconds.values()),
            "decode_token_ms": 1000 * seconds["decode"] / steps if steps > 0 else math.nan,
            "new_tokens": recorder.forwards,
            "visual_before": before,
            "visual_after": sum(len(kept) for kept in entered.kept),
            "visual_layers": sum(entered.layer_tokens),
            "text_tokens": int(inputs["attention_mask"].sum()) - before,
            "layer_lengths": list(entered.layer_lengths),
        }

    def plain(self, bound: BoundCell, inputs: Mapping[str, Any], key: str) -> dict[str, Any]:
        """Milliseconds of the whole answer with no marks inside, for the profiler's own overhead."""
        self.settle()
        start = self.clock.mark(True)
        self.answer(bound, inputs, key, None)
        return {"latency_ms": 1000 * self.clock.seconds(start, self.clock.mark(True))}

    def published(self, bound: BoundCell, inputs: Mapping[str, Any], key: str) -> dict[str, Any]:
        """Milliseconds of prefill as the published harness takes it.

        Around one forward: token embeddings, vision encoder, compression, LLM, and logits of all positions.
        """
        head = self.backbone.model.get_output_embeddings()
        self.settle()
        with torch.no_grad():
            start = self.clock.mark(True)
            out = self.backbone.run_llm(self.backbone.compress(inputs, bound.compressor, bound.cell.budget, keys=[key]))
            head(out.hidden)
            return {"published_prefill_ms": 1000 * self.clock.seconds(start, self.clock.mark(True))}

    def memory(
        self,
        bound: BoundCell,
        inputs: Mapping[str, Any],
        key: str,
        probe: Callable[[torch.device], MemoryProbe] = memory_probe,
    ) -> dict[str, Any]:
        """Peak bytes of each phase above what stood before, and the cache after the prompt."""
        watch = probe(self.device)
        recorder = PhaseRecorder(None, [watch])
        try:
            with recorder.watching(self.backbone, cache=True):
                self.answer(bound, inputs, key, recorder)
                self.settle()
        finally:
            watch.close()
        cached = recorder.prompt_cache
        peaks = {
            f"{measure}_{phase}_bytes": value
            for measure, found in watch.peaks.items()
            for phase, value in found.items()
        }
        highest = {f"{measure}_bytes": max(found.values(), default=0) for measure, found in watch.peaks.items()}
        return {
            **peaks,
            **highest,
            "baseline_bytes": watch.baseline,
            "whole_bytes": watch.whole,
            "memory_method": watch.method,
            "kv_bytes": cached[0] if cached else None,
            "cache_lengths": cached[1] if cached else None,
        }

    def flops(self, bound: BoundCell, inputs: Mapping[str, Any], key: str) -> dict[str, Any]:
        """Counted operations of each phase, those that the shapes ask for, and the attention kernels that ran."""
        probe = FlopProbe()
        recorder = PhaseRecorder(None, [probe])
        with probe, recorder.watching(self.backbone):
            _, entered = self.answer(bound, inputs, key, recorder)
        whole = self.backbone.model.config
        config, lengths = whole.get_text_config(), entered.layer_lengths
        same_picture = bound.compressor.stage != "pixels"
        layers = theoretical_prefill(config, lengths)
        return {
            **{f"{phase}_flops": n for phase, n in probe.flops.items()},
            "layer_flops": layers,
            "theory_vision_flops": vision_flops(whole, inputs) if same_picture else None,
            "theory_prefill_flops": sum(layers) + theoretical_output(config),
            "theory_decode_flops": theoretical_decode(config, lengths, recorder.forwards),
            "attention_kernels": sorted(probe.kernels.get("prefill", ())),
        }

    def energy(self, bound: BoundCell, inputs: Mapping[str, Any], key: str, gpu: Any, seconds: float) -> dict[str, Any]:
        """Joules of one answer, from as many as fit into `seconds`."""
        answers, end = 0, time.perf_counter() + seconds
        self.settle()
        with NvmlSampler(gpu) as sampler:
            while answers == 0 or time.perf_counter() < end:
                self.answer(bound, inputs, key, None)
                self.settle()
                answers += 1
        reading = sampler.reading
        assert reading is not None
        return {
            "joules": reading.joules / answers,
            "watts": reading.watts,
            "device_bytes": reading.bytes,
            "energy_answers": answers,
            "energy_source": reading.source,
        }


def vision_flops(config: Any, inputs: Mapping[str, Any]) -> int | None:
    """FLOPs that the shape of the vision encoder asks for; None for families whose encoder is not described here."""
    vision = getattr(config, "vision_config", None)
    kind = getattr(vision, "model_type", None)
    if vision is not None and kind == "clip_vision_model" and inputs.get("pixel_values") is not None:
        pictures = len(inputs["pixel_values"])
        patches = pictures * (vision.image_size // vision.patch_size) ** 2
        return theoretical_clip(vision, pictures) + theoretical_projector(config, patches)
    if vision is None or not hasattr(vision, "fullatt_block_indexes"):
        return None
    grids = [g for name in ("image_grid_thw", "video_grid_thw") if inputs.get(name) is not None for g in inputs[name]]
    merge = vision.spatial_merge_size
    return sum(theoretical_vision(vision, (t, h // merge, w // merge)) for t, h, w in (g.tolist() for g in grids))


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
