"""The stages in which the backbone of the embedded checkpoint is trained, and what it is tested on."""

from __future__ import annotations

import functools
import json
import logging
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from visionselector_eval.baselines.contract.errors import InputError
from visionselector_eval.harness.training.tiny import network
from visionselector_eval.harness.training.tiny.batches import (
    CHECK_SEED,
    KINDS,
    PICTURES,
    TALL,
    TEXT,
    Batches,
    Packer,
    documents,
)
from visionselector_eval.harness.training.tiny.lessons import Lesson, lesson
from visionselector_eval.harness.training.tiny.optimiser import Muon

log = logging.getLogger(__name__)

RATE = {"vision": 6e-3, "language": 4e-3, "joint": 2.5e-3}
BATCH = {"vision": 16, "language": 10, "joint": 16}
GUIDE = 0.3  # weight of the losses that show some heads where to look


def _text(net: network.Network, batch: dict[str, Any], visual: Tensor, prefix: list[int], guided: bool = False) -> Any:
    """Final hidden states of the packed questions: (B, TEXT, WIDTH). `visual` holds the kept tokens.

    `guided` adds how far the guided heads are from looking at the tokens that tell the answer.
    """
    b, k, _ = visual.shape
    p = len(prefix)
    start = net.embed(torch.tensor(prefix)).expand(b, -1, -1)
    embeds = torch.cat([start, visual, net.embed(batch["ids"])], 1)
    positions = net.positions(batch["grid"], batch["keep"], batch["offsets"], p)
    segments = torch.cat([torch.zeros(b, p + k, dtype=torch.long), batch["segments"]], 1)
    if not guided:
        return net.language(embeds, positions, segments)[:, p + k :]
    nothing = torch.zeros(b, p + k + TEXT, p + k + TEXT, dtype=torch.bool)
    aims = {name: nothing.clone() for name in net.guided}
    where = (batch["aim"][:, :, None] == batch["shown"][:, None]) & (batch["aim"] >= 0)[..., None]
    aims["visual"][:, p + k :, p : p + k] = where
    for name, aim in batch["text_aims"].items():
        aims[name][:, p + k :, p + k :] = aim
    hidden, guides = net.language(embeds, positions, segments, aims)
    return hidden[:, p + k :], guides


def _take(features: Tensor, places: Tensor) -> Tensor:
    return features.gather(1, places[..., None].expand(-1, -1, features.shape[-1]))


def aux_loss(features: Tensor, batch: dict[str, Any], codes: Tensor) -> tuple[Tensor, dict[str, float]]:
    """How badly informative tokens say what they show: cross-entropy a slot, and distance to the sum of the codes."""
    shown = _take(features, batch["cells"])
    expected = batch["codes"]
    parts: list[Tensor] = []
    logged: dict[str, float] = {}
    for slot in range(4):
        logits = 12 * shown @ codes[slot].T
        there = expected[..., slot] >= 0
        if not bool(there.any()):
            continue
        parts.append(F.cross_entropy(logits[there], expected[..., slot][there]))
        with torch.no_grad():
            real = there & (expected[..., slot] != expected.new_tensor(_none()))
            if bool(real.any()):
                logged[f"slot{slot}"] = float((logits[real].argmax(-1) == expected[..., slot][real]).float().mean())
    whole = (expected >= 0).all(-1)
    loss = torch.stack(parts).mean()
    if bool(whole.any()):
        aim = sum(codes[s][expected[..., s].clamp_min(0)] for s in range(4))
        loss = loss + 0.25 * (shown - aim)[whole].square().sum(-1).mean()
    return loss, logged


@functools.cache
def _none() -> int:
    return int(network.tokenizer().pad_token_id)


def symbolic(batch: dict[str, Any], codes: Tensor, generator: torch.Generator) -> Tensor:
    """Visual tokens made of codes instead of pixels: (B, N, WIDTH); what is not informative is noise."""
    t, h, w = batch["grid"]
    b, width = len(batch["cells"]), codes.shape[-1]
    scale = 1.5 * torch.rand(b, 1, 1, generator=generator) / width**0.5
    features = torch.randn(b, t * h * w, width, generator=generator) * scale
    expected = batch["codes"]
    exact = torch.stack([codes[s][expected[..., s].clamp_min(0)] for s in range(4)]).sum(0)
    exact = exact + 0.4 / width**0.5 * torch.randn(exact.shape, generator=generator)
    real = expected[..., 0] >= 0
    for row, places, values, there in zip(features, batch["cells"], exact, real, strict=True):
        row[places[there]] = values[there]
    return features


def tally(hidden: Tensor, net: network.Network, batch: dict[str, Any]) -> dict[str, list[int]]:
    """Right and asked answers by kind: every token of the answer is the most likely one."""
    found: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    with torch.no_grad():
        answer = batch["target"] >= 0
        right = torch.ones_like(answer)
        right[answer] = net.logits(hidden[answer]).argmax(-1) == batch["target"][answer]
        for i, kinds in enumerate(batch["kinds"]):
            for number, kind in enumerate(kinds, 1):
                found[kind][0] += int(right[i][batch["segments"][i] == number].all())
                found[kind][1] += 1
    return found


def evaluate(
    net: network.Network, n: int, seed: int = CHECK_SEED, size: int = 16, asked: bool = True
) -> dict[str, Any]:
    """Exact match on fresh documents with all visual tokens: the benchmark's own questions, by mirror."""
    packer = Packer(type(net))
    found: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    rng = np.random.default_rng(seed)
    for name in KINDS if net.clips else PICTURES:
        made: list[Lesson] = []
        scene = 0
        while len(made) < n:
            made += [lesson(name, d, rng) for d in documents(name, seed, scene)]
            scene += 2 if name == TALL and not net.clips else 1
        for shape in sorted({x.grid for x in made}):
            same = [x for x in made if x.grid == shape]
            for start in range(0, len(same), size):
                batch = packer.pack(same[start : start + size], rng, 1.0, only_asked=asked)
                with torch.no_grad():
                    hidden = _text(net, batch, net.vision(batch["pixels"]), packer.prefix)
                for kind, (right, total) in tally(hidden, net, batch).items():
                    found[kind][0] += right
                    found[kind][1] += total
    return {kind: round(100 * r / t, 1) for kind, (r, t) in sorted(found.items())}


def _loader(batches: Batches, start: int, steps: int) -> Iterator[dict[str, Any]]:
    return iter(
        torch.utils.data.DataLoader(
            batches, batch_size=None, sampler=range(start, steps), num_workers=1, prefetch_factor=4
        )
    )


def write(path: Path, value: Any) -> None:
    half = path.with_suffix(".part")
    torch.save(value, half)
    os.replace(half, path)


def _groups(model: Any, used: tuple[str, ...]) -> tuple[list[tuple[str, Tensor]], list[Tensor]]:
    """Matrices for Muon (with names) and the rest for Adam; only parameters whose names begin as `used` says."""
    named = [(n, p) for n, p in model.named_parameters() if n.startswith(used)]
    for n, p in model.named_parameters():
        p.requires_grad_(n.startswith(used))
    tables = ("embed_tokens.weight", "position_embedding.weight")
    matrices = [(n, p) for n, p in named if p.ndim > 1 and not n.endswith(tables)]
    ours = {id(p) for _, p in matrices}
    return matrices, [p for _, p in named if id(p) not in ours]


def _start_from_parts(model: Any, work: Path, family: type[network.Network]) -> None:
    """Give a model what the stages of its parts have learned."""
    for part, prefix in family.parts.items():
        if (work / f"{part}.pt").is_file():
            state = torch.load(work / f"{part}.pt", weights_only=True)["model"]
            model.load_state_dict({k: v for k, v in state.items() if k.startswith(prefix)}, strict=False)
            log.info("starts from the stage %s", part)


def _resume(save: Path, model: Any, optimisers: Sequence[torch.optim.Optimizer]) -> int:
    """Take a stage up from its last save; the steps made until then."""
    if not save.is_file():
        return 0
    state = torch.load(save, weights_only=True)
    model.load_state_dict(state["model"], strict=False)
    for optimiser, own in zip(optimisers, state["optimisers"], strict=True):
        optimiser.load_state_dict(own)
    log.info("%s resumes at step %d", save.stem, state["step"])
    return int(state["step"])


def _loss(
    stage: str,
    net: network.Network,
    batch: Any,
    codes: Any,
    prefix: Any,
    draw: int,
    slots: dict[str, list[float]],
    seen: dict[str, list[int]],
) -> Tensor:
    """The loss of one step; `slots` and `seen` get what the log says of it.

    Args:
        prefix: of every prompt, from the packer.
        draw: seed of the symbols that stand for images in stage language.
    """
    loss = torch.zeros(())
    kind = "clip" if batch["grid"][0] > 1 else ""

    def guided(loss: Tensor, guides: Mapping[str, Tensor]) -> Tensor:
        for name, guide in guides.items():
            loss = loss + GUIDE * guide
            if float(guide.detach()):
                slots[f"{name}_nll"].append(float(guide.detach()))
        return loss

    if stage == "language":
        features = symbolic(batch, codes, torch.Generator().manual_seed(draw))
    else:
        features, guides = net.shown(batch, codes)
        loss, logged = aux_loss(features, batch, codes)
        loss = guided(loss, guides)
        for name, value in logged.items():
            slots[name + kind].append(value)
    if stage == "vision":
        return loss
    if stage == "joint":
        loss = loss * 0.3
    hidden, guides = _text(net, batch, _take(features, batch["keep"]), prefix, guided=True)
    loss = guided(loss, guides)
    answer = batch["target"] >= 0
    loss = loss + F.cross_entropy(net.logits(hidden[answer]), batch["target"][answer])
    for name, (right, total) in tally(hidden, net, batch).items():
        seen[name][0] += right
        seen[name][1] += total
    return loss


def _average_gradients(parameters: Sequence[Tensor], world: int) -> None:
    """Give every process the mean of all processes' gradients."""
    flat = torch.cat([p.grad.reshape(-1) if p.grad is not None else p.new_zeros(p.numel()) for p in parameters])
    torch.distributed.all_reduce(flat)
    flat /= world
    for p, piece in zip(parameters, flat.split([p.numel() for p in parameters]), strict=True):
        p.grad = piece.view_as(p)


def _note(journal: TextIO, entry: Mapping[str, Any]) -> None:
    journal.write(json.dumps(entry) + "\n")
    journal.flush()


def train_stage(
    stage: str,
    work: Path,
    steps: int,
    seed: int = 0,
    *,
    save_every: int = 100,
    size: int = 0,
    check: int = 32,
    stop: int | None = None,
    advance: Callable[[int], None] | None = None,
    family: type[network.Network] = network.Network,
) -> list[float]:
    """One of the stages, from its last save in `work` up to `steps` (or to `stop`); the losses of the steps made.

    The learning rate rises for 40 steps, stays, and falls to 2 % over the last 45 %. Under torchrun each process takes
    its own scenes and gradients are averaged. Long because it is the training loop, whose parts are functions.

    Args:
        size: scenes a step (default: `BATCH`).
        check: documents a mirror that stage joint answers at every save.
        advance: told of the number of steps done.
        family: whose model it is.

    Raises:
        InputError: a loss that is no number; the last save is kept.
    """
    torch.set_num_threads(1)
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world > 1:
        torch.distributed.init_process_group("gloo")
    work.mkdir(parents=True, exist_ok=True)
    model = family.create(seed)
    packer = Packer(family)
    codes = network.codebook(len(packer.tokens))
    if stage == "joint":
        _start_from_parts(model, work, family)
    matrices, rest = _groups(model, family.parts.get(stage, ("",)))
    optimisers = [Muon(matrices, RATE[stage]), torch.optim.AdamW(rest, RATE[stage] / 2, (0.9, 0.98), weight_decay=0.0)]
    rates = [g["lr"] for o in optimisers for g in o.param_groups]
    save = work / f"{stage}.pt"
    start = _resume(save, model, optimisers)
    net = family(model)
    journal = (work / f"{stage}.jsonl").open("a", encoding="utf-8") if rank == 0 else None
    last = min(steps, stop or steps)
    losses: list[float] = []
    seen: dict[str, list[int]] = defaultdict(lambda: [0, 0])
    slots: dict[str, list[float]] = defaultdict(list)
    began = time.time()
    parameters = [p for _, p in matrices] + rest
    stream = _loader(Batches(stage, rank, world, size or BATCH[stage], family), start, last)
    for step in range(start, last):
        batch = next(stream)
        factor = min(1.0, (step + 1) / 40, max(0.02, (steps - step) / (0.45 * steps)))
        for g, rate in zip((g for o in optimisers for g in o.param_groups), rates, strict=True):
            g["lr"] = rate * factor
        loss = _loss(stage, net, batch, codes, packer.prefix, step * 64 + rank, slots, seen)
        loss.backward()
        if world > 1:
            _average_gradients(parameters, world)
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        for o in optimisers:
            o.step()
            o.zero_grad(set_to_none=True)
        losses.append(float(loss.detach()))
        if advance is not None:
            advance(step + 1)
        if not np.isfinite(losses[-1]):
            raise InputError(f"stage {stage}: the loss is {losses[-1]} at step {step}; the last save is kept in {work}")
        done = step + 1
        if journal and (done % 50 == 0 or done == last):
            entry: dict[str, Any] = {"step": done, "seconds": round(time.time() - began, 1)}
            entry["loss"] = round(float(np.mean(losses[-50:])), 4)
            entry |= {k: round(float(np.mean(v)), 3) for k, v in sorted(slots.items())}
            entry |= {k: round(100 * r / t, 1) for k, (r, t) in sorted(seen.items())}
            seen.clear()
            slots.clear()
            _note(journal, entry)
        if rank == 0 and (done % save_every == 0 or done == last):
            write(save, {"model": model.state_dict(), "optimisers": [o.state_dict() for o in optimisers], "step": done})
            if journal and stage == "joint" and check:
                _note(journal, {"step": done, "fresh": evaluate(net, check)})
    if world > 1:
        torch.distributed.destroy_process_group()
    if journal:
        journal.close()
    return losses


def trained(work: Path, seed: int = 0, family: type[network.Network] = network.Network) -> Any:
    """The model of the last save of `joint`, its weights rounded to bfloat16 as in the checkpoint."""
    model = family.create(seed)
    model.load_state_dict(torch.load(work / "joint.pt", weights_only=True)["model"], strict=False)
    return model.bfloat16().float().requires_grad_(False)
