"""The same answers on a GPU as on the CPU: every method on the embedded checkpoint of every family, and the kernel.

`gpu.py` runs these checks before it measures, and `pytest -m gpu` runs them as tests. Each returns one line that says
what differs, or nothing.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from visionselector_eval.baselines import available, build
from visionselector_eval.baselines.contract.errors import InputError
from visionselector_eval.baselines.contract.greedy import kernel_works, pick_by_kernel, pick_by_loop
from visionselector_eval.baselines.contract.numerics import unit_rows
from visionselector_eval.harness.profiler.workloads import textured_image
from visionselector_eval.models.inputs import MediaSettings, build_inputs
from visionselector_eval.models.loading import load_backbone
from visionselector_eval.models.tiny import EMBEDDED

if TYPE_CHECKING:
    from visionselector_eval.models.backbones.base import Backbone

_GREEDY: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
_BUDGETS = (0.1, 0.3)
_LOGITS = 2e-3  # largest difference of float32 logits between a batch row and its single run
KERNEL_SIZES = (256, 1024, 4096)


@contextlib.contextmanager
def exact_float32() -> Iterator[None]:
    """Convolutions in float32 proper: cuDNN's default is TF32, whose rounding (1e-3) is no method's fault."""
    before = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = before


def _conversations() -> dict[str, list[list[dict[str, Any]]]]:
    def ask(*images: Any) -> list[dict[str, Any]]:
        content = [*({"type": "image", "image": image} for image in images), {"type": "text", "text": "What is it?"}]
        return [{"role": "user", "content": content}]

    large, small = textured_image(224, 280, 0), textured_image(140, 112, 1)
    one, two, words = ask(large), ask(large, small), ask()
    return {"one image": [one], "two images": [two], "text only": [words], "batch": [two, words, one]}


@dataclass
class Pair:
    """One embedded checkpoint on the CPU and on `device`, with the prompts that both are asked."""

    checkpoint: str
    device: str

    @cached_property
    def cpu(self) -> Backbone:
        return load_backbone(self.checkpoint, device="cpu", dtype="float32")

    @cached_property
    def gpu(self) -> Backbone:
        return load_backbone(self.checkpoint, device=self.device, dtype="float32")

    @cached_property
    def half(self) -> Backbone:
        return load_backbone(self.checkpoint, device=self.device, dtype="bfloat16")

    @cached_property
    def inputs(self) -> Mapping[str, Any]:
        return {
            name: build_inputs(self.cpu.processor, chats, MediaSettings()) for name, chats in _conversations().items()
        }


def fits(pair: Pair, method: str) -> str:
    """Why a method can't be used with the checkpoint (weights that it does not have, say); empty where it can."""
    try:
        pair.cpu.bind(build(method))
    except InputError as error:
        return str(error)
    return ""


def same_kept(pair: Pair, method: str) -> str:
    """Kept sets in float32 equal the CPU's."""
    with exact_float32():
        for name, inputs in pair.inputs.items():
            for budget in _BUDGETS:
                ours = pair.gpu.prefill(inputs, build(method), budget).kept
                theirs = pair.cpu.prefill(inputs, build(method), budget).kept
                for row, (a, b) in enumerate(zip(ours, theirs, strict=True)):
                    if a.cpu().tolist() != b.tolist():
                        common = len(set(a.tolist()) & set(b.tolist()))
                        return f"{name}, budget {budget}, row {row}: {common} of {len(b)} kept tokens are the CPU's"
    return ""


def stock_answers(pair: Pair, method: str) -> str:
    """At budget 1.0 the answer is the unmodified model's, token by token."""
    for name, inputs in pair.inputs.items():
        ours = pair.gpu.generate(inputs, build(method), 1.0, **_GREEDY)
        stock = pair.gpu.model.generate(**pair.gpu.to_device(inputs), **_GREEDY)[:, inputs["input_ids"].shape[1] :]
        if not torch.equal(ours, stock):
            return f"{name}: the answer at budget 1.0 differs from the stock model's"
    return ""


def batch_rows(pair: Pair, method: str) -> str:
    """A row of a batch keeps and computes what its single run does."""
    with exact_float32():
        together = pair.gpu.prefill(pair.inputs["batch"], build(method), 0.3)
        for row, name in enumerate(("two images", "text only", "one image")):
            alone = pair.gpu.prefill(pair.inputs[name], build(method), 0.3)
            if not torch.equal(together.kept[row], alone.kept[0]):
                return f"row {row} ({name}) keeps other tokens than alone"
            away = float((together.logits[row] - alone.logits[0]).abs().max())
            if not away <= _LOGITS:
                return f"row {row} ({name}): logits are {away:.1e} away from those of its single run"
    return ""


def half_precision(pair: Pair, method: str) -> str:
    """bfloat16 runs: the promised number of tokens, finite logits."""
    for name, inputs in pair.inputs.items():
        out, exact = (b.prefill(inputs, build(method), 0.3) for b in (pair.half, pair.cpu))
        if [len(k) for k in out.kept] != [len(k) for k in exact.kept]:
            return f"{name}: other numbers of kept tokens than in float32"
        if out.hidden.dtype != torch.bfloat16 or not bool(torch.isfinite(out.logits).all()):
            return f"{name}: hidden states are {out.hidden.dtype}, or logits are not finite"
    return ""


CHECKS: dict[str, Callable[[Pair, str], str]] = {
    "kept sets equal the CPU's in float32": same_kept,
    "budget 1.0 gives the stock tokens": stock_answers,
    "a batch row equals its single run": batch_rows,
    "bfloat16 runs": half_precision,
}


def methods_of(pair: Pair) -> list[str]:
    """The built-in and third-party methods that the checkpoint can run."""
    return [name for name in available() if not fits(pair, name)]


def checkpoints() -> tuple[str, ...]:
    """The embedded checkpoints: one of every family, and of every trained projector."""
    return tuple(EMBEDDED)


def exact_rows(n: int, seed: int = 0) -> torch.Tensor:
    """(n, 64) float32 rows of +-1, a third of them copies: their cosines are exact in float32, and full of ties."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, 2, (n, 64), generator=generator) * 2.0 - 1.0
    copies = torch.randperm(n, generator=generator)[: n // 3]
    rows[copies] = rows[torch.randint(0, n, (len(copies),), generator=generator)]
    return rows


def kernel_equals_loop(n: int, device: str) -> str:
    """The picking kernel's order of picks is the loop's, with ties and copied rows, at a fifth and a half of `n`."""
    if not kernel_works(torch.device(device)):
        return "no Triton kernel can be run here"
    unit = unit_rows(exact_rows(n)).to(device)
    importance = (torch.randint(0, 65, (n,), generator=torch.Generator().manual_seed(1)) / 64).to(device)
    for count in (n // 5, n // 2):
        for start, weight, fades in ((None, 1.0, False), (importance, 0.5, False), (importance, 20.0, True)):
            fast = pick_by_kernel(unit, start, weight, count, fades).tolist()
            slow = pick_by_loop(unit, start, weight, count, fades).tolist()
            if fast != slow:
                first = next(i for i, (a, b) in enumerate(zip(fast, slow, strict=True)) if a != b)
                return f"weight {weight}, fades {fades}, N={n}, K={count}: pick {first} differs from the loop's"
    return ""
