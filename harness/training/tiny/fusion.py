"""Trained token fusion for the embedded LLaVA-1.5: its data, and what `train token-fusion` is given for its stages."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from visionselector_eval.harness.training.tiny.batches import TALL, TRAIN_SEED, Batches, documents
from visionselector_eval.harness.training.tiny.lessons import lesson
from visionselector_eval.harness.training.tiny.llava_network import LlavaNetwork, normalised
from visionselector_eval.harness.training.tiny.optimiser import Muon
from visionselector_eval.models.backbones.token_fusion import FusionConfig, TokenFusion
from visionselector_eval.models.training.export import KINDS, save_learned

SHARES = {
    "tiny_docvqa_val": 0.4,
    "tiny_textvqa_val": 0.25,
    "tiny_chartqa": 0.15,
    "tiny_scienceqa_img": 0.1,
    "tiny_pope": 0.1,
}
"""The benchmarks that the fusion learns from, and how often: those with most to read most often."""

STAGES = ("fusion-begin", "fusion", "fusion-llm")
SETTINGS: dict[str, Any] = {
    "layers": [-2, 3, 2, 1],
    "spatial_hidden": 1024,
    "template": "checkpoint",
    "batch_size": 32,
    "total_batch": 32,
    "gradient_checkpointing": False,
    "report_to": ["none"],
}
"""Of both stages: the published recipe but for sizes, and for rates that the unscaled states of this tower bear."""
RATES = {"fusion-begin": 4e-3, "fusion": 1e-4, "fusion-llm": 3e-4}

SEED = TRAIN_SEED + 17
UNANSWERED = ("position", "count", "count_open")  # what the base model answers by chance teaches chance


def write_lessons(folder: Path, images: int) -> Path:
    """Conversations about square images, one for each question that an image can be asked; the file.

    The questions are worded as sweeps word them; `data mirrors` would ask one question of each image, and show
    images that are not square.
    """
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "media").mkdir(parents=True)
    rng = np.random.default_rng(SEED)
    lines: list[str] = []
    for number in range(images):
        name = list(SHARES)[int(rng.choice(len(SHARES), p=list(SHARES.values())))]
        scene = 2 * number + (0 if name == TALL else int(rng.integers(2)))
        document = documents(name, SEED, scene)[0]
        path = f"media/{name}-{scene:06d}.png"
        Image.fromarray(np.asarray(document.image)).save(folder / path, compress_level=1)
        for prompt, answer, kind, _ in lesson(name, document, rng).questions:
            if kind not in UNANSWERED:
                turns = [{"from": "human", "value": f"<image>{prompt}"}, {"from": "gpt", "value": answer}]
                lines.append(json.dumps({"image": path, "conversations": turns}))
    order = rng.permutation(len(lines))
    (folder / "part.jsonl").write_text("\n".join(lines[int(i)] for i in order) + "\n", encoding="utf-8")
    return (folder / "part.jsonl").rename(folder / "train.jsonl")


class FusedNetwork(LlavaNetwork):
    """The batched forward of a model with token fusion, for `evaluate`."""

    def vision(self, pixels: Tensor, cells: Tensor | None = None, partners: Tensor | None = None) -> Tensor:
        features = self.model.model.get_image_features(normalised(pixels), return_dict=True).pooler_output
        return torch.stack(list(features))

    def positions(self, grid: Sequence[int], keep: Tensor, offsets: Tensor, prefix: int) -> Tensor:
        t, h, w = grid
        window = self.model.model.multi_modal_projector.window
        fused = t, h // window, w // window
        return super().positions(fused, torch.arange(math.prod(fused)).expand(len(keep), -1), offsets, prefix)


def _windows(tokens: Tensor, cells: Tensor, there: Tensor, window: int) -> tuple[Tensor, Tensor]:
    """(B, windows, D) mean of each window's informative tokens, and (B, windows) how many it has.

    Args:
        tokens: (B, h * h, D).
        cells: (B, n) places of informative ones where `there` says so.
    """
    b, n, d = tokens.shape
    side = int(n**0.5)
    known = torch.zeros(b, n + 1).scatter_(1, torch.where(there, cells, n), 1.0)[:, :n]
    both = torch.cat([tokens * known[..., None], known[..., None]], -1)
    split = both.view(b, side // window, window, side // window, window, d + 1).sum((2, 4)).flatten(1, 2)
    return split[..., :d] / split[..., d:].clamp_min(1), split[..., d]


def begin(work: Path, steps: int, seed: int, advance: Callable[[int], None] | None = None) -> Path:
    """Weights for stage 1 to start from: fused tokens near the mean of what the base model says of their windows.

    From random weights, as published, the loss stayed where it is when nothing is read, for 200 steps at a rate of 1e-3
    and for 150 at 2e-4: that would take many more images.
    """
    model = LlavaNetwork.create(0)
    model.load_state_dict(torch.load(work / "joint.pt", weights_only=True)["model"], strict=False)
    model.requires_grad_(False)
    width = model.config.vision_config.hidden_size
    standard = FusionConfig.published(width, SETTINGS["layers"])
    config = FusionConfig(standard.layers, standard.fusion_hidden, SETTINGS["spatial_hidden"])
    torch.manual_seed(seed)
    fusion = TokenFusion(config, width, model.config.text_config.hidden_size)
    named = list(fusion.named_parameters())
    optimisers = [
        Muon([(n, p) for n, p in named if p.ndim > 1], RATES["fusion-begin"]),
        torch.optim.AdamW([p for _, p in named if p.ndim == 1], RATES["fusion-begin"] / 2, weight_decay=0.0),
    ]
    rates = [g["lr"] for o in optimisers for g in o.param_groups]
    batches = Batches("joint", 0, 1, 32, LlavaNetwork)
    log: list[dict[str, float]] = []
    for step in range(steps):
        batch = batches[step]
        with torch.no_grad():
            states = model.model.vision_tower(normalised(batch["pixels"]), output_hidden_states=True).hidden_states
            tokens = model.model.multi_modal_projector(states[-2][:, 1:])
            aim, count = _windows(tokens, batch["cells"], batch["codes"][..., 0] >= 0, config.window)
            read = torch.cat([states[layer][:, 1:] for layer in config.layers], -1)
        for g, rate in zip((g for o in optimisers for g in o.param_groups), rates, strict=True):
            g["lr"] = rate * min(1.0, (step + 1) / 20, max(0.02, 2 * (steps - step) / steps))
        off = (fusion(read) - aim).square().sum(-1)
        # An empty window should say little, whatever; where something is, all of it counts.
        loss = off[count > 0].mean() + 0.1 * off[count == 0].mean()
        loss.backward()
        for o in optimisers:
            o.step()
            o.zero_grad(set_to_none=True)
        if (step + 1) % 25 == 0 or step + 1 == steps:
            alike = F.cosine_similarity(fusion(read)[count > 0], aim[count > 0], dim=-1).mean()
            log.append({"step": step + 1, "loss": round(loss.item(), 4), "cosine": round(alike.item(), 4)})
        if advance is not None:
            advance(step + 1)
    folder = work / STAGES[0]
    save_learned(folder, fusion, KINDS["token-fusion"], {"backbone": {}, "training": {"kind": "begin"}, "data": {}})
    (folder / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in log), encoding="utf-8")
    return folder


def settings(stage: str, work: Path, steps: int, seed: int) -> dict[str, Any]:
    """The spec of one of the last two of `STAGES` in a work folder of `train tiny`, as plain data.

    `steps` are those of the fusion alone; five times as many are made with the LLM.
    """
    first = stage == "fusion"
    return {
        **SETTINGS,
        "stage": 1 if first else 2,
        "pretrained": str(work / ("backbone" if first else "fusion")),
        "init": str(work / "fusion-begin") if first else None,
        "data": str(work / "data" / "train.jsonl"),
        "output": str(work / stage),
        "learning_rate": RATES[stage],
        "max_steps": steps if first else 5 * steps,
        "seed": 42 + seed,
    }
