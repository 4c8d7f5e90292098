"""Checks that a method holds to what every built-in one promises: for methods of your own, on the embedded checkpoint.

`visionselector-eval check NAME` runs them; in a test of your own package::

    assert not check(Brightest())

What is done for every method alike (positions, padding, text, the cache while decoding) is not asked again here.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image

from visionselector_eval.baselines.contract.base import Compressor, VisualTokens, checked_compressor
from visionselector_eval.baselines.contract.budget import Tokens, parse_budget
from visionselector_eval.baselines.contract.decoder import DecoderCompressor
from visionselector_eval.baselines.contract.errors import InputError
from visionselector_eval.models.backbones.base import Backbone
from visionselector_eval.models.inputs import MediaSettings, build_inputs
from visionselector_eval.models.loading import load_backbone
from visionselector_eval.models.tiny import TINY

__all__ = ["PROPERTIES", "Problem", "check"]

log = logging.getLogger(__name__)

_GREEDY: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False}
_BUDGETS: tuple[Any, ...] = (0.01, 0.2, 0.5, 0.99, Tokens(7))


@dataclass(frozen=True)
class Problem:
    """A promise that a method does not keep.

    Attributes:
        promise: a key of `PROPERTIES`.
        prompt: what it was shown.
        found: one line.
    """

    promise: str
    prompt: str
    found: str

    def __str__(self) -> str:
        return f"{self.promise} ({self.prompt}): {self.found}"


def _image(height: int, width: int, seed: int) -> Image.Image:
    """Noise at two scales, so that tokens differ."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 255, (height // 28, width // 28, 3), dtype=np.uint8))
    fine = rng.integers(0, 60, (height, width, 3))
    return Image.fromarray((np.asarray(coarse.resize((width, height))) * 0.75 + fine).astype(np.uint8))


def _user(*parts: Any) -> list[dict[str, Any]]:
    kinds = {str: "text", Image.Image: "image", tuple: "video"}
    content = [{"type": kinds[type(part)], kinds[type(part)]: part} for part in parts]
    return [{"role": "user", "content": content}]


def _conversations() -> dict[str, list[list[dict[str, Any]]]]:
    large, small = _image(224, 280, 0), _image(140, 112, 1)
    frames = np.stack([np.asarray(_image(84, 112, seed)) for seed in range(4)])
    clip = (frames, {"fps": 2.0, "frames_indices": [0, 1, 2, 3], "total_num_frames": 4})
    one, two = _user(large, "What is it?"), _user(large, "and", small, "What are they?")
    video, words = _user(clip, "What moves?"), _user("Just text.")
    return {
        "one image": [one],
        "two images": [two],
        "video": [video],
        "text only": [words],
        "one of equal colour": [_user(Image.new("RGB", (224, 224), "teal"), "What is it?")],
        "batch": [two, video, words],
    }


class _Subject:
    """The method on one backbone, with prompts made once."""

    def __init__(self, method: Compressor, backbone: Backbone) -> None:
        self.method, self.backbone = method, backbone
        self.inputs = {
            name: build_inputs(backbone.processor, conversations, MediaSettings())
            for name, conversations in _conversations().items()
        }
        self.alone = [
            build_inputs(backbone.processor, [conversation], MediaSettings())
            for conversation in _conversations()["batch"]
        ]

    def wanted(self, prompt: str, budget: Any) -> list[int]:
        """Tokens that are to be left of each prompt, by the method's own rounding and scope."""
        inputs = self.backbone.to_device(self.inputs[prompt])
        share, counts = parse_budget(budget), []
        lengths = inputs["attention_mask"].sum(1).tolist()
        for row, length in zip(self.backbone.encode(inputs, frozenset()).rows, lengths, strict=True):
            sizes = [item.features.shape[0] for item in row]
            if self.method.scope == "prompt":
                sizes = [sum(sizes)] if sizes else []
            counts.append(sum(self._left(n, share, length) for n in sizes))
        return counts

    def _left(self, n: int, share: Any, length: int) -> int:
        method = self.backbone.bind(self.method)  # how it counts may depend on the backbone
        if isinstance(method, DecoderCompressor):
            return method.counts(n, share, self.backbone.depth, length)[-1]
        return method.count(n, share)


def _full_budget(subject: _Subject) -> Iterator[tuple[str, str]]:
    for prompt, inputs in subject.inputs.items():
        ours = subject.backbone.generate(inputs, subject.method, 1.0, **_GREEDY)
        stock = subject.backbone.model.generate(**subject.backbone.to_device(inputs), **_GREEDY)
        if not torch.equal(ours, stock[:, inputs["input_ids"].shape[1] :]):
            yield prompt, "the answer differs from the stock model's"


def _exact_count(subject: _Subject) -> Iterator[tuple[str, str]]:
    if subject.method.stage == "pixels":  # whole grids: what comes out is measured, not promised
        return
    for prompt, inputs in subject.inputs.items():
        for budget in _BUDGETS:
            out = subject.backbone.prefill(inputs, subject.method, budget)
            counts, expected = [len(kept) for kept in out.kept], subject.wanted(prompt, budget)
            if counts != expected:
                yield prompt, f"budget {budget}: {counts} tokens are left where {expected} were asked for"
            if not bool(torch.isfinite(out.logits).all()):
                yield prompt, f"budget {budget}: logits are not finite"


def _same_again(subject: _Subject) -> Iterator[tuple[str, str]]:
    for prompt, inputs in subject.inputs.items():
        first, again = (subject.backbone.prefill(inputs, subject.method, 0.3) for _ in range(2))
        if not all(torch.equal(a, b) for a, b in zip(first.kept, again.kept, strict=True)):
            yield prompt, "the same prompt twice keeps different tokens: seed by tokens.key, keep no state"


def _single_run(subject: _Subject) -> Iterator[tuple[str, str]]:
    together = subject.backbone.prefill(subject.inputs["batch"], subject.method, 0.3)
    for row, inputs in enumerate(subject.alone):
        alone = subject.backbone.prefill(inputs, subject.method, 0.3)
        if not torch.equal(together.kept[row], alone.kept[0]):
            yield "batch", f"row {row} keeps other tokens than when it runs alone"
        elif float((together.logits[row] - alone.logits[0]).abs().max()) > 1e-3:
            yield "batch", f"row {row} has other logits than when it runs alone"


def _nothing_left(subject: _Subject) -> Iterator[tuple[str, str]]:
    model, inputs = subject.backbone.model, subject.inputs["two images"]
    before = _digest(model)
    subject.backbone.generate(inputs, subject.method, 0.2, **_GREEDY)
    if any(m._forward_hooks or m._forward_pre_hooks for m in model.modules()):
        yield "two images", "hooks stay on the model"
    if _digest(model) != before:
        yield "two images", "the model's weights have changed"


def _digest(model: torch.nn.Module) -> str:
    digest = hashlib.sha256()
    for tensor in model.state_dict().values():
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _half_precision(subject: _Subject) -> Iterator[tuple[str, str]]:
    backbone = load_backbone(subject.backbone.id, dtype="bfloat16")
    out = backbone.prefill(subject.inputs["batch"], subject.method, 0.2)
    if out.hidden.dtype != torch.bfloat16 or not bool(torch.isfinite(out.logits).all()):
        yield "batch", f"hidden states are {out.hidden.dtype}, or logits are not finite"


def _odd_features(subject: _Subject) -> Iterator[tuple[str, str]]:
    """Few tokens, copies, zero rows: for methods that read the features alone, which can be called by hand."""
    method = subject.backbone.bind(subject.method)
    if method.stage != "projector" or method.needs:
        return
    noise = torch.randn(48, subject.backbone.width, generator=torch.Generator().manual_seed(0))
    odd = {
        "two tokens": noise[:2],
        "three tokens": noise[:3],
        "copies": noise[:4].repeat(12, 1),
        "zero rows": noise * (torch.arange(48) % 3 > 0)[:, None],
        "all zero": torch.zeros(48, noise.shape[1]),
    }
    for name, features in odd.items():
        n = len(features)
        for count in sorted({method.count(n, Tokens(k)) for k in (1, n // 2, n - 1)} - {n}):
            chosen = method.compress(VisualTokens(features=features, grid=(1, 1, n), key=name), count)
            kept = chosen.kept
            rising = len(kept) == count and bool((kept.diff() > 0).all())
            if kept.dtype != torch.int64 or not rising or int(kept[0]) < 0 or int(kept[-1]) >= n:
                shown = f"{kept.dtype} {kept.tolist()[:8]}{', ...' if len(kept) > 8 else ''}"
                yield name, f"{count} of {n}: {count} ascending int64 indices are needed, got {shown}"
            if chosen.features is not None and not bool(torch.isfinite(chosen.features).all()):
                yield name, f"{count} of {n}: merged features are not finite"


PROPERTIES: dict[str, Callable[[_Subject], Iterator[tuple[str, str]]]] = {
    "budget 1 is the stock model": _full_budget,
    "exactly K tokens are left": _exact_count,
    "the same prompt gives the same tokens": _same_again,
    "a batch row is its single run": _single_run,
    "nothing is left behind on the model": _nothing_left,
    "bfloat16 runs": _half_precision,
    "few, equal and empty tokens are survived": _odd_features,
}


def check(method: Any, backbone: Backbone | None = None) -> list[Problem]:
    """What a method breaks of the promises that every compressor makes; an empty list where all are kept.

    Args:
        method: what `build(...)` returned, or an instance of your class.
        backbone: where to run it; the embedded checkpoint where not given.

    Raises:
        InputError: what is no method, or one that has no weights on this backbone.
    """
    backbone = backbone or load_backbone(TINY)
    made = checked_compressor(method)
    backbone.bind(made)  # a method without its weights is the caller's mistake, not a broken promise
    subject, problems = _Subject(made, backbone), []
    for promise, test in PROPERTIES.items():
        try:
            problems += [Problem(promise, prompt, found) for prompt, found in test(subject)]
        except Exception as error:  # the method's own, whatever it raises
            log.debug("%s raised", made.name, exc_info=True)
            kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
            problems.append(Problem(promise, "any", f"{kind}{' '.join(str(error).split()) or 'no message'}"))
    return problems
