"""One profile from its spec: load, measure, report."""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
import yaml

from visionselector_eval.baselines.contract.errors import InputError
from visionselector_eval.harness.profiler import report
from visionselector_eval.harness.profiler.rounds import ProfilePlan, Progress, about, profile, run_environment
from visionselector_eval.harness.profiler.spec import ProfileSpec, profile_cells
from visionselector_eval.harness.profiler.store import ProfileFolder
from visionselector_eval.harness.profiler.workloads import QUESTION, Workload, check_length, documents, synthetic
from visionselector_eval.harness.sweep.spec import asked_media, asked_protocol
from visionselector_eval.models.loading import (
    checkpoint_family,
    choose_attention,
    choose_device,
    choose_dtype,
    load_backbone,
)
from visionselector_eval.models.tiny import TINY, thread_limit

if TYPE_CHECKING:
    from visionselector_eval.models.backbones.base import Backbone

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Done:
    """What a profile did: its folder, the report's text, and what could not be measured with the reasons."""

    folder: Path
    text: str
    failed: list[str]


def plan_of(spec: ProfileSpec) -> ProfilePlan:
    """How often everything is run."""
    return ProfilePlan(
        repeats=spec.repeats,
        warmup=spec.warmup,
        memory_rounds=spec.memory_rounds,
        energy_seconds=spec.energy_seconds,
        new_tokens=spec.max_new_tokens,
        seed=spec.seed,
    )


def run_profile(spec: ProfileSpec, *, overwrite: bool = False, progress: Progress | None = None) -> Done:
    """Measure every cell of `spec` that its folder does not hold yet, and write the report.

    Raises:
        InputError: a model, workload or device that can't be used, or a folder of other settings.
    """
    tiny_shape = spec.random_weights == "qwen2_5_vl_tiny"
    with thread_limit(TINY if tiny_shape else spec.pretrained, spec.threads):
        return _run(spec, overwrite, progress)


def _run(spec: ProfileSpec, overwrite: bool, progress: Progress | None) -> Done:
    device = choose_device(spec.device)
    dtype = choose_dtype(spec.dtype, device)
    attention = choose_attention(spec.attn_implementation, device, dtype)
    folder = ProfileFolder(spec.folder())
    with folder.run.lock():
        if overwrite:
            folder.forget()
        backbone = _backbone(spec, device, dtype, attention)
        workloads = _workloads(spec, backbone)
        plan = plan_of(spec)
        settings = {"question": QUESTION} if spec.synthetic else {}
        shared = folder.settle(about(backbone, plan, dtype, attention, **settings))
        folder.run.write_spec(yaml.safe_dump(spec.model_dump(exclude_none=True), sort_keys=False, allow_unicode=True))
        folder.run.write_environment(run_environment(shared))
        cells = profile_cells(spec)
        failed = profile(folder, backbone, workloads, cells, plan, attention=attention, progress=progress)
        folder.finish()
        titles = {cell.digest: cell.title for cell in cells}
        text = report.write(folder.folder)
    return Done(folder.folder, text, [f"{titles[cell]} on {name}: {why}" for (name, cell), why in failed.items()])


def _backbone(spec: ProfileSpec, device: str, dtype: torch.dtype, attention: str) -> Backbone:
    if spec.random_weights is None:
        return load_backbone(spec.pretrained, device, dtype, attention, revision=spec.revision)
    from visionselector_eval.harness.profiler.random_weights import build_random, processor, shape_config, shape_named

    # Too long prompts are refused before gigabytes are filled for nothing.
    shape = shape_named(spec.random_weights)
    front = processor(shape)
    config = shape_config(shape, front).get_text_config()
    for tokens in spec.synthetic:
        if tokens + spec.max_new_tokens > config.max_position_embeddings:
            raise InputError(
                f"--synthetic {tokens} is more than the {config.max_position_embeddings} positions of "
                f"{spec.random_weights}: give fewer visual tokens"
            )
        check_length(config, synthetic(front, tokens).items[0].make(), spec.max_new_tokens, f"--synthetic {tokens}")
    try:
        return build_random(spec.random_weights, device, dtype, attention, spec.seed)
    except torch.OutOfMemoryError as error:
        raise InputError(
            f"shape '{spec.random_weights}' in {dtype} does not fit on {device}: take a smaller shape, or bfloat16"
        ) from error


def _workloads(spec: ProfileSpec, backbone: Backbone) -> list[Workload]:
    most = getattr(backbone.model.config.get_text_config(), "max_position_embeddings", math.inf)
    for tokens in spec.synthetic:  # before an image of that size is painted
        if tokens + spec.max_new_tokens > most:
            raise InputError(
                f"--synthetic {tokens} is more than the {most} positions of {spec.backbone}: give fewer visual tokens"
            )
    workloads = [synthetic(backbone.processor, tokens, spec.seed) for tokens in spec.synthetic]
    if spec.task:
        from visionselector_eval.models.inputs import MediaSettings

        family = checkpoint_family(spec.pretrained, spec.revision).lmms_eval
        media = MediaSettings(**asked_media(spec, spec.pretrained, spec.revision))
        protocol = asked_protocol(spec, spec.pretrained, spec.revision)
        workloads.append(documents(spec.task, backbone, family, spec.limit, media, protocol, spec.data_root))
    return workloads
