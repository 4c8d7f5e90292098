"""Time and memory of each compressor beside the naive form of the same method.

    python -m visionselector_eval.harness.benchmarks.compressors --tokens 1024 4096 --width 3584

Both forms run in turn in one process on the same random features; read the ratios, the milliseconds belong to
this machine. The naive forms (`naive.py`) are full matrices and re-scans, as in most published code; at large N some
take many minutes, so they run up to `--naive-tokens` only. VisionZip's cost lies in its attention (`--attention`); its
merging has no naive form. MiB is the peak of what an operation allocates beside its inputs.
"""

from __future__ import annotations

import argparse
import statistics
import time
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from visionselector_eval.baselines import EncoderTrace, VisualTokens, build
from visionselector_eval.baselines.base import unit_rows
from visionselector_eval.baselines.cdpruner import relevance
from visionselector_eval.models.visionselector import Scorer

from . import naive

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


def median_seconds(runs: Sequence[Callable[[], object]], device: torch.device, repeats: int) -> list[float]:
    """Median time of each of `runs`, taken in turn so that a busy moment of the machine meets all of them."""
    times: list[list[float]] = [[] for _ in runs]
    for repeat in range(repeats + 1):
        for index, run in enumerate(runs):
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            start = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            if repeat:  # the first round warms up
                times[index].append(time.perf_counter() - start)
    return [statistics.median(samples) for samples in times]


@dataclass(frozen=True)
class _Case:
    name: str
    ours: Callable[[], object]
    naive: Callable[[], object] | None = None


def _cases(n: int, width: int, ratio: float, device: torch.device, attention: bool) -> list[_Case]:
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
    return cases


def main(argv: Sequence[str] | None = None) -> int:
    """Print one table; 0 when every case ran."""
    parser = argparse.ArgumentParser(
        prog="python -m visionselector_eval.harness.benchmarks.compressors",
        description="Time and memory of each compressor beside the naive form of the same method.",
        epilog="example: --tokens 1024 4096 --width 3584 --budget 0.2",
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024, 2048], help="visual tokens N")
    parser.add_argument("--width", type=int, default=3584, help="size of a token (3584: Qwen2.5-VL-7B)")
    parser.add_argument("--budget", type=float, default=0.2, help="share of tokens to keep")
    parser.add_argument("--methods", nargs="+", help="these only; all where not given")
    parser.add_argument("--naive-tokens", type=int, default=4096, help="largest N at which the naive forms run too")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each form")
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument(
        "--threads",
        type=int,
        default=1,
        help="CPU threads; with several, waiting for a busy core is inside the times",
    )
    parser.add_argument(
        "--attention",
        action="store_true",
        help="also the attention that VisionZip reads; its naive form takes 2 KiB * N^2",
    )
    arguments = parser.parse_args(argv)
    torch.set_num_threads(arguments.threads)
    device = torch.device(arguments.device)

    table = Table(
        title=f"float32, D={arguments.width}, budget {arguments.budget:g}, {device}, "
        f"{arguments.threads} thread(s), median of {arguments.repeats}"
    )
    table.add_column("part", no_wrap=True)
    for heading in ("N", "ms", "naive ms", "faster", "MiB", "naive MiB", "less"):
        table.add_column(heading, justify="right", no_wrap=True)
    for n in arguments.tokens:
        for case in _cases(n, arguments.width, arguments.budget, device, arguments.attention):
            if arguments.methods and case.name.split(":")[0] not in arguments.methods:
                continue
            paired = case.naive is not None and n <= arguments.naive_tokens
            forms = [case.ours, case.naive] if paired and case.naive else [case.ours]
            seconds = median_seconds(forms, device, arguments.repeats)
            mebibytes = [_peak_mebibytes(form) for form in forms]
            table.add_row(
                case.name,
                str(n),
                f"{seconds[0] * 1e3:.2f}",
                f"{seconds[1] * 1e3:.2f}" if paired else "",
                f"{seconds[1] / seconds[0]:.1f}x" if paired else "",
                f"{mebibytes[0]:.1f}",
                f"{mebibytes[1]:.1f}" if paired else "",
                f"{mebibytes[1] / mebibytes[0]:.1f}x" if paired else "",
            )
    console = Console()
    console.width = max(console.width, 100)  # a pipe would cut the numbers
    console.print(table)
    return 0


def _peak_mebibytes(run: Callable[[], object]) -> float:
    with Allocations() as allocations:
        run()
    return allocations.peak_bytes / 2**20


if __name__ == "__main__":
    raise SystemExit(main())
