"""All picks in one kernel: the same picks as the loops, by Triton's interpreter, and built for real GPUs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from visionselector_eval.baselines.contract import greedy
from visionselector_eval.baselines.contract.greedy import KERNEL_ROWS, greedy_pick, kernel_works, pick_by_loop
from visionselector_eval.baselines.contract.numerics import unit_rows

triton = pytest.importorskip("triton", reason="no Triton for this platform")

# In a process of its own: Triton decides whether to interpret when a kernel's module is imported.
SAME = """
import torch
from visionselector_eval.baselines.contract.greedy import pick_by_kernel, pick_by_loop
from visionselector_eval.baselines.contract.numerics import unit_rows

def rows(n, kind, generator):
    features = torch.randn(n, 12, generator=generator)
    if kind == "copies":
        features = features[torch.randint(max(1, n // 3), (n,), generator=generator)]
    if kind == "zeros":
        features[torch.rand(n, generator=generator) < 0.3] = 0
    return unit_rows(features)


checked = 0
kinds = ("plain", "copies", "zeros")
for seed, (n, kind) in enumerate((n, kind) for n in (1, 2, 3, 31, 32, 33, 150) for kind in kinds):
    generator = torch.Generator().manual_seed(seed)
    unit, importance = rows(n, kind, generator), torch.rand(n, generator=generator)
    for count in sorted({1, (n + 1) // 2, n}):
        for arguments in (
            (unit, None, 1.0, count, False),  # divprune
            (unit, 0.5 * importance, 0.5, count, False),  # idpruner
            (unit, 0 * importance, 1.0, count, False),
            (unit, importance, 20.0, count, True),  # id_selection
            (unit, torch.ones(n), 3.0, count, True),
        ):
            slow = pick_by_loop(*arguments).tolist()
            fast = pick_by_kernel(*arguments).tolist()
            assert fast == slow, (arguments[2:], n, kind, fast, slow)
            checked += 1
for fades in (False, True):
    broken = pick_by_kernel(torch.eye(5), torch.full((5,), torch.nan), 1.0, 4, fades)
    assert 0 <= broken.min() <= broken.max() < 5, broken
print(checked)
"""


def test_the_kernel_picks_what_the_loops_pick(tmp_path: Path) -> None:
    script = tmp_path / "same.py"
    script.write_text(SAME)
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(script)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 250


@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("fades", [False, True])
def test_the_kernel_is_built_for_gpus(capability: int, fades: bool) -> None:
    """Down to machine code, which takes no GPU; the largest block must not spill its values out of the registers."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from visionselector_eval.baselines.contract.greedy_kernel import picks

    types = {
        **dict.fromkeys(("similarity", "start"), "*fp32"),
        **dict.fromkeys(("first", "order"), "*i64"),
        **dict.fromkeys(("n", "count"), "i32"),
        **dict.fromkeys(("weight", "slack"), "fp32"),
    }
    # Triton builds a kernel of its own where an integer is 1.
    for block, ones in ((32, {"n": 1, "count": 1}), (32, {"count": 1}), (KERNEL_ROWS, {})):
        given = {name: kind for name, kind in types.items() if name not in ones}
        source = ASTSource(picks, given, constexprs={"FADES": fades, "BLOCK": block, **ones})
        built = triton.compile(
            source, target=GPUTarget("cuda", capability, 32), options={"num_warps": greedy.warps(block)}
        )
        assert len(built.asm["cubin"]) > 1000
        assert ".local" not in built.asm["ptx"]


@pytest.mark.parametrize("n", [1, 7, 16, 100, 133])
def test_mirrored_products_are_the_products(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    unit = unit_rows(torch.randn(n, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(n)))
    monkeypatch.setattr(greedy, "_MIRRORED", 1)
    found = greedy.cosines(unit)
    assert torch.allclose(found, unit @ unit.T, atol=1e-14)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("n", [1, 100, 4096, KERNEL_ROWS])
def test_on_a_gpu_the_kernel_picks_what_the_loops_pick(n: int) -> None:
    unit = unit_rows(torch.randn(n, 256, device="cuda"))
    importance = torch.rand(n, device="cuda")
    count = max(1, n // 5)
    assert kernel_works(unit.device)
    for start, weight, fades in ((None, 1.0, False), (importance, 0.5, False), (importance, 20.0, True)):
        fast = greedy_pick(unit, start, weight, count, fades=fades).tolist()
        slow = pick_by_loop(unit, start, weight, count, fades).tolist()
        # Two sums of the same products differ by rounding, which may break a tie that is none.
        assert len(set(fast) & set(slow)) > 0.99 * count, (weight, fades)


def test_without_a_working_triton_the_loops_remain_and_it_is_said_once(monkeypatch, caplog) -> None:
    monkeypatch.setitem(sys.modules, "visionselector_eval.baselines.contract.greedy_kernel", None)
    kernel_works.cache_clear()
    try:
        assert not kernel_works(torch.device("cpu"))
        assert not kernel_works(torch.device("cpu"))
    finally:
        kernel_works.cache_clear()
    assert caplog.text.count("picking tokens step by step") == 1
