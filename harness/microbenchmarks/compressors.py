"""Time and memory of each compressor beside the naive form of the same method.

    python -m visionselector_eval.harness.microbenchmarks.compressors --tokens 1024 4096 16384 --threads 2 --attention

Both forms run in turn in one process on the same random features; read the ratios, the milliseconds belong to
this machine. The naive forms (`naive.py`) are full matrices and re-scans, as in most published code. Their memory grows
with N^2, and their time, K being a share of N, with N^3: one that would by its cost at a smaller N go over
`--naive-seconds` or `--naive-gib` is not run, and the table says so. A decoder-stage method is timed at its first
stage, in a layer as wide as the tokens with heads of 128 channels and four of them for keys, as in Qwen2.5-VL-7B. MiB
is the peak of what an operation allocates beside its inputs.

VisionZip's cost lies in its attention (`--attention`); its merging has no naive form. DART and Dynamic-Qwen do what
their published code does. With `--results` the table is kept, after each row, with the rows and the environment.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pandas as pd
import torch
from rich.console import Console
from tabulate import tabulate
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from visionselector_eval.baselines import EncoderTrace, InputError, VisualTokens, build
from visionselector_eval.baselines.cdpruner import relevance
from visionselector_eval.baselines.contract.budget import Share
from visionselector_eval.baselines.contract.decoder import DecoderCompressor
from visionselector_eval.baselines.contract.numerics import unit_rows
from visionselector_eval.harness.environment import environment
from visionselector_eval.harness.microbenchmarks import naive
from visionselector_eval.harness.microbenchmarks.measured import machine, slug
from visionselector_eval.harness.store.files import write_atomic
from visionselector_eval.models.decoder_view import LayerAccess, PromptView
from visionselector_eval.models.dynamic_qwen import Predictor
from visionselector_eval.models.loading import choose_device
from visionselector_eval.models.visionselector import Scorer

LARGE, SMALL = (1024, 4096, 16384), (64, 256)  # visual tokens: of a GPU's table, of a dry run
_DEPTH = 28  # of the LLM that decoder-stage methods are asked about
_SMALL = 1024  # visual tokens at which every naive form can be tried
_ENOUGH = 30.0  # seconds; a case that took so long is not repeated
_HEADS, _HEAD_WIDTH = 16, 80  # Qwen2.5-VL's vision encoder; 4 patches make one token


class Allocations(TorchDispatchMode):
    """Counts what the operations inside the block allocate: peak bytes alive at once, elements of the largest tensor.

    The same on every device and in every run. Tensors that existed before count nothing, and neither does the
    scratch memory inside an operation.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak_bytes = 0
        self.largest = 0
        self._alive = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for value in tree_leaves((args, kwargs)):
            if isinstance(value, Tensor):
                self._note(value, new=False)
        result = func(*args, **(kwargs or {}))
        for value in tree_leaves(result):
            if isinstance(value, Tensor):
                self._note(value, new=True)
        return result

    def _note(self, tensor: Tensor, new: bool) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._known:
            return
        self._known.add(storage._cdata)
        size = storage.nbytes() if new else 0
        self._alive += size
        self.peak_bytes = max(self.peak_bytes, self._alive)
        self.largest = max(self.largest, tensor.numel() if new else 0)
        weakref.finalize(storage, self._gone, storage._cdata, size)

    def _gone(self, address: int, size: int) -> None:
        self._known.discard(address)
        self._alive -= size


@dataclass
class Measured:
    """One form of one case: median seconds, peak bytes allocated, timed runs."""

    seconds: float
    bytes: int
    repeats: int


def measure(runs: Sequence[Callable[[], object]], device: torch.device, repeats: int) -> list[Measured]:
    """Each of `runs`, taken in turn so that a busy moment of the machine meets all of them.

    The first round warms up and counts memory. At least one more is timed, at most `repeats`, none after `_ENOUGH`.
    """
    peaks = []
    for run in runs:
        with Allocations() as allocations:
            run()
        peaks.append(allocations.peak_bytes)
    times: list[list[float]] = [[] for _ in runs]
    begin = time.perf_counter()
    for repeat in range(repeats):
        if repeat and time.perf_counter() - begin > _ENOUGH:
            break
        for index, run in enumerate(runs):
            _wait(device)
            start = time.perf_counter()
            run()
            _wait(device)
            times[index].append(time.perf_counter() - start)
    return [Measured(statistics.median(t), peak, len(t)) for t, peak in zip(times, peaks, strict=True)]


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class _Attention(nn.Module):
    """What ranking reads of a decoder layer's attention, at Qwen2.5-VL-7B's sizes where `width` is its width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.head_dim = min(128, width)
        self.heads = width // self.head_dim
        self.scaling = self.head_dim**-0.5
        self.q_proj = nn.Linear(width, self.heads * self.head_dim)
        self.k_proj = nn.Linear(width, (4 if self.heads % 4 == 0 else 1) * self.head_dim)


def _rotate(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    def turn(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]

    return turn(q), turn(k)


def decoder_prompt(
    n: int, width: int, device: torch.device, dtype: torch.dtype = torch.float32, text: int = 32
) -> PromptView:
    """A prompt of `n` visual and `text` other tokens at the input of a random layer 2; half of the text stands before.

    Args:
        width: D, an even number; a multiple of 128 from there on. All values are random.
    """
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    attention = _Attention(width)
    for parameter in attention.parameters():
        parameter.data = noise(*parameter.shape) / width**0.5
    layer = SimpleNamespace(input_layernorm=nn.RMSNorm(width), self_attn=attention.requires_grad_(False))
    layer.input_layernorm.to(device, dtype).requires_grad_(False)
    llm = SimpleNamespace(
        layers=[layer] * _DEPTH,
        norm=layer.input_layernorm,
        config=SimpleNamespace(num_attention_heads=attention.heads),
    )
    total, before = n + text, text // 2
    angles = torch.outer(torch.arange(total), 1e4 ** -torch.linspace(0, 1, attention.head_dim // 2)).repeat(1, 2)
    visual = torch.arange(before, before + n, device=device)
    question = torch.arange(before + n, total, device=device)
    return PromptView(
        layer=2,
        depth=_DEPTH,
        hidden=noise(total, width),
        visual=visual,
        original=torch.arange(n, device=device),
        item=torch.zeros(n, dtype=torch.long, device=device),
        text=question,
        total=total,
        embeds=noise(total, width),
        first_visual=visual,
        first_text=question,
        memory={},
        access=LayerAccess(llm, _rotate),
        tables=(angles.cos().to(device, dtype), angles.sin().to(device, dtype)),
        previous=noise(total, width),
    )


@dataclass(frozen=True)
class _Case:
    name: str
    ours: Callable[[], object]
    naive: Callable[[], object] | None = None


def decoder_cases(
    n: int, width: int, ratio: float, device: torch.device, dtype: torch.dtype = torch.float32
) -> list[_Case]:
    """The decoder-stage methods, each at its first stage: `ours` returns a `Selection`, `naive` a list of indices."""
    prompt = decoder_prompt(n, width, device, dtype)
    members = torch.arange(n, device=device)

    def case(
        name: str, slow: Callable[[PromptView, int], list[int]] | None = None, label: str = "", **options: Any
    ) -> _Case:
        method = build(name, **options)
        assert isinstance(method, DecoderCompressor)
        count = method.counts(n, Share(ratio), _DEPTH, prompt.total)[0]

        def fresh() -> PromptView:  # what a view has computed once would otherwise be free the next time
            return replace(prompt, memory={}, _sources={})

        return _Case(
            label or name,
            lambda: method.keep(fresh(), members, count),
            None if slow is None else lambda: slow(fresh(), count),
        )

    predictor = Predictor(width).eval().requires_grad_(False).to(device)
    return [
        case("fastv", naive.naive_fastv),
        case("fastv", lambda view, count: naive.naive_fastv(view, count, "all"), "fastv: rows=all", rows="all"),
        case("pyramiddrop", naive.naive_pyramiddrop),
        case("sparsevlm", naive.naive_sparsevlm),
        case("dart"),
        case("dynamic_qwen", predictor=predictor),
    ]


def _cases(n: int, width: int, ratio: float, device: torch.device, attention: bool) -> list[_Case]:
    """What is timed, each with its naive form. Long because it is the list of all of them, over the same tensors."""

    def noise(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    generator = torch.Generator().manual_seed(0)
    features = noise(n, width)
    trace = EncoderTrace(
        received=noise(n).exp(), keys=noise(n, _HEAD_WIDTH), keys_concat=noise(n, _HEADS * _HEAD_WIDTH)
    )
    received, all_keys, text = trace.received, trace.keys_concat, noise(16, width)
    assert received is not None
    assert all_keys is not None
    height = max(side for side in range(1, int(n**0.5) + 1) if n % side == 0)
    grid = (1, height, n // height)
    tokens = VisualTokens(features=features, grid=grid, trace=trace, text=text)
    count = max(1, int(ratio * n))
    scorer = Scorer(width).to(device).requires_grad_(False)

    def compress(name: str, **options: object) -> Callable[[], object]:
        compressor = build(name, **options)
        return lambda: compressor.compress(tokens, count)

    cases = [
        _Case("random", compress("random")),
        _Case("uniform", compress("uniform")),
        _Case(
            "visionselector",
            compress("visionselector", scorer=scorer),
            lambda: naive.naive_scores(scorer, features).topk(count),
        ),
        _Case("divprune", compress("divprune"), lambda: naive.naive_divprune(features, count)),
        _Case("visionzip", compress("visionzip")),
        _Case(
            "prumerge_plus",
            compress("prumerge_plus"),
            lambda: naive.naive_prumerge(features, all_keys, received, count),
        ),
        _Case(
            "cdpruner",
            compress("cdpruner"),
            lambda: naive.naive_cdpruner(features, relevance(unit_rows(features), text.mean(dim=0)), count),
        ),
        _Case("vispruner", compress("vispruner"), lambda: naive.naive_vispruner(features, received, count)),
        _Case(
            "idpruner",
            compress("idpruner", scorer=scorer),
            lambda: naive.naive_mmr(features, naive.naive_scores(scorer, features), count),
        ),
        _Case("id_selection", compress("id_selection"), lambda: naive.naive_fading(features, received, count)),
        _Case(
            "holov",
            compress("holov"),
            lambda: naive.naive_holov(received, count, max(1, int(1024 / 576 * n / count)), features),
        ),
        _Case("tome", compress("tome"), lambda: naive.naive_tome(features, None, count)),
        _Case("fusion2x2", compress("fusion2x2"), lambda: naive.naive_fusion2x2(features, grid, count)),
        _Case("pooling", compress("pooling")),
    ]
    if attention:
        # Imported here: it brings transformers along, which the rest does without.
        from visionselector_eval.models.backbones.tower import received_attention

        queries, keys = noise(4 * n, _HEADS, _HEAD_WIDTH), noise(4 * n, _HEADS, _HEAD_WIDTH)
        per_head = queries.transpose(0, 1), keys.transpose(0, 1)
        cases.append(
            _Case(
                "visionzip: attention",
                lambda: received_attention(queries, keys, [4 * n], _HEAD_WIDTH**-0.5),
                lambda: naive.naive_received(*per_head),
            )
        )
    return [*cases, *decoder_cases(n, width, ratio, device)]


def parser() -> argparse.ArgumentParser:
    """The flags of this module."""
    made = argparse.ArgumentParser(
        prog="python -m visionselector_eval.harness.microbenchmarks.compressors",
        description="Time and memory of each compressor beside the naive form of the same method.",
        epilog="example: --tokens 1024 4096 --width 3584 --budget 0.2",
    )
    made.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048], help="visual tokens N")
    made.add_argument("--width", type=int, default=3584, help="size of a token (3584: Qwen2.5-VL-7B)")
    made.add_argument("--budget", type=float, default=0.2, help="share of tokens to keep")
    made.add_argument("--methods", nargs="+", help="these only; all where not given")
    made.add_argument("--naive-seconds", type=float, default=60, help="run no naive form that would take longer")
    made.add_argument("--naive-gib", type=float, default=8, help="run no naive form that would allocate more")
    made.add_argument("--repeats", type=int, default=5, help="timed runs of each form, at most")
    made.add_argument("--device", default="cpu", help="auto, cpu, cuda, cuda:1")
    made.add_argument(
        "--threads",
        type=int,
        default=1,
        help="CPU threads; with several, waiting for a busy core is inside the times",
    )
    made.add_argument(
        "--attention",
        action="store_true",
        help="also the attention that VisionZip reads, from 4 patches a token; at N = 16384 some minutes",
    )
    made.add_argument(
        "--results", type=Path, metavar="FOLDER", help="keep table, rows and environment under FOLDER/<machine>-<date>/"
    )
    made.add_argument("--output", type=Path, metavar="FOLDER", help="the same in FOLDER itself")
    return made


def main(argv: Sequence[str] | None = None) -> int:
    """Print one table; 0 when every case ran."""
    flags = parser()
    arguments = flags.parse_args(argv)
    if min(*arguments.tokens, arguments.repeats, arguments.threads) < 1 or not 0 < arguments.budget <= 1:
        flags.error("tokens, repeats and threads start at 1, and a budget lies above 0 and up to 1")
    width = arguments.width
    if width < 2 or width % (128 if width > 128 else 2):
        flags.error(f"--width {width}: give an even number, from 128 on a multiple of 128")
    torch.set_num_threads(arguments.threads)
    try:
        device = torch.device(choose_device(arguments.device))
    except InputError as error:
        flags.error(str(error))
    title = (
        f"float32, D={width}, budget {arguments.budget:g}, {machine(str(device))}, {arguments.threads} thread(s), "
        f"median of at most {arguments.repeats}"
    )
    folder = arguments.output
    if folder is None and arguments.results:
        folder = arguments.results / f"{slug(machine(str(device)))}-{datetime.now(UTC):%Y-%m-%d}" / "compressors"
    if folder:
        surroundings = {**environment(), "threads": arguments.threads}
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / "environment.json", json.dumps(surroundings, indent=2) + "\n")
    rows: list[Row] = []
    known: dict[str, tuple[int, Measured]] = {}
    # The first N may be too large for a naive form that nothing is known of.
    tried = sorted({*arguments.tokens, min(_SMALL, *arguments.tokens)})
    with Console(stderr=True).status("") as status:
        for n in tried:
            for case in _cases(n, width, arguments.budget, device, arguments.attention):
                if arguments.methods and case.name.split(":")[0] not in arguments.methods:
                    continue
                asked = n in arguments.tokens
                if not asked and case.naive is None:
                    continue
                status.update(f"{case.name}, N={n}")
                why = _too_much(known.get(case.name), n, arguments.naive_seconds, arguments.naive_gib)
                forms = [case.ours, case.naive] if case.naive and not why else [case.ours]
                repeats = arguments.repeats if asked else 1
                try:
                    found = measure(forms, device, repeats)
                except (torch.OutOfMemoryError, MemoryError):
                    why = "out of memory"
                    found = measure(forms[:1], device, repeats)
                if len(found) == 2:
                    known[case.name] = n, found[1]
                if not asked:
                    continue
                rows.append(Row.of(case.name, n, found, why if case.naive else "none"))
                if folder:
                    text = f"# Compressors beside their naive forms\n\n{title}\n\n{shown(rows)}\n"
                    write_atomic(folder / "table.md", text)
                    write_atomic(folder / "rows.csv", pd.DataFrame(map(asdict, rows)).to_csv(index=False))
    Console(width=200, soft_wrap=True).print(f"{title}\n\n{shown(rows)}", markup=False, highlight=False)
    return 0


@dataclass(frozen=True)
class Row:
    """One case at one N: times in milliseconds, memory in MiB; nan, and `naive` says why, where no naive form ran."""

    part: str
    n: int
    ms: float
    naive_ms: float
    faster: float
    mib: float
    naive_mib: float
    less: float
    repeats: int
    naive: str

    @classmethod
    def of(cls, part: str, n: int, found: Sequence[Measured], why: str) -> Row:
        """From one form or both."""
        ours, slow = found[0], found[1] if len(found) == 2 else Measured(math.nan, 0, 0)
        naive_mib = slow.bytes / 2**20 if slow.repeats else math.nan
        return cls(
            part=part,
            n=n,
            ms=ours.seconds * 1e3,
            naive_ms=slow.seconds * 1e3,
            faster=slow.seconds / ours.seconds,
            mib=ours.bytes / 2**20,
            naive_mib=naive_mib,
            less=naive_mib * 2**20 / max(1, ours.bytes),
            repeats=ours.repeats,
            naive=why or "run",
        )


def shown(rows: Sequence[Row]) -> str:
    """A Markdown table."""
    head = ["part", "N", "ms", "naive ms", "faster", "MiB", "naive MiB", "less"]
    lines = []
    for row in rows:
        ran = row.naive == "run"
        slow = [f"{row.naive_ms:.2f}", f"{row.faster:.1f}x"] if ran else ["" if row.naive == "none" else row.naive, ""]
        large = [f"{row.naive_mib:.1f}", f"{row.less:.1f}x"] if ran else ["", ""]
        lines.append([row.part, row.n, f"{row.ms:.2f}", *slow, f"{row.mib:.1f}", *large])
    align = ("left", *["right"] * 7)
    return tabulate(lines, head, tablefmt="pipe", disable_numparse=True, colalign=align if lines else None)


def _too_much(known: tuple[int, Measured] | None, n: int, seconds: float, gib: float) -> str:
    """Why the naive form is not run at `n`, going by its cost at a smaller N; empty where it may run."""
    if known is None:
        return ""
    growth = n / known[0]
    if known[1].bytes * growth**2 > gib * 2**30:
        return f"over {gib:g} GiB"
    return f"over {seconds:g} s" if known[1].seconds * growth**3 > seconds else ""


if __name__ == "__main__":
    raise SystemExit(main())
