"""All picks in one kernel: the same picks as the loops, by Triton's interpreter, and built for real GPUs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from visionselector_eval.baselines import divprune, id_selection
from visionselector_eval.baselines.contract import fused
from visionselector_eval.baselines.contract.greedy import _FUSED, pick_all
from visionselector_eval.baselines.contract.numerics import unit_rows
from visionselector_eval.models.visionselector import idpruner

triton = pytest.importorskip("triton", reason="no Triton for this platform")

# In a process of its own: Triton decides whether to interpret when a kernel's module is imported.
SAME = """
import torch
from visionselector_eval.baselines import divprune, id_selection
from visionselector_eval.baselines.contract import fused
from visionselector_eval.baselines.contract.greedy import pick_all
from visionselector_eval.models.visionselector import idpruner

def rows(n, kind, generator):
    features = torch.randn(n, 12, generator=generator)
    if kind == "copies":
        features = features[torch.randint(max(1, n // 3), (n,), generator=generator)]
    if kind == "zeros":
        features[torch.rand(n, generator=generator) < 0.3] = 0
    return features


checked = 0
kinds = ("plain", "copies", "zeros")
for seed, (n, kind) in enumerate((n, kind) for n in (1, 2, 3, 31, 32, 33, 150) for kind in kinds):
    generator = torch.Generator().manual_seed(seed)
    features, importance = rows(n, kind, generator), torch.randn(n, generator=generator)
    for count in sorted({1, (n + 1) // 2, n}):
        for module, arguments in (
            (divprune, (features, count)),
            (idpruner, (features, importance, count, 0.5)),
            (idpruner, (features, importance, count, 0.0)),
            (id_selection, (features, importance.exp(), count, 20.0)),
            (id_selection, (features, torch.ones(n), count, 3.0)),
        ):
            slow = module.pick_order(*arguments).tolist()
            module.pick_all = lambda unit, start, weight, count, fades=False: fused.run(
                unit, start, weight, count, fades
            )
            fast = module.pick_order(*arguments).tolist()
            module.pick_all = pick_all
            assert fast == slow, (module.__name__, n, kind, count, fast, slow)
            checked += 1
for fades in (False, True):
    broken = fused.run(torch.eye(5), torch.full((5,), torch.nan), 1.0, 4, fades)
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
    for block, ones in ((32, {"n": 1, "count": 1}), (32, {"count": 1}), (_FUSED, {})):
        given = {name: kind for name, kind in types.items() if name not in ones}
        source = ASTSource(picks, given, constexprs={"FADES": fades, "BLOCK": block, **ones})
        built = triton.compile(
            source, target=GPUTarget("cuda", capability, 32), options={"num_warps": fused.warps(block)}
        )
        assert len(built.asm["cubin"]) > 1000
        assert ".local" not in built.asm["ptx"]


@pytest.mark.parametrize("n", [1, 7, 16, 100, 133])
def test_mirrored_products_are_the_products(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    unit = unit_rows(torch.randn(n, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(n)))
    monkeypatch.setattr(fused, "_MIRRORED", 1)
    found = fused.cosines(unit)
    assert torch.allclose(found, unit @ unit.T, atol=1e-14)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("n", [1, 100, 4096, _FUSED])
def test_on_a_gpu_the_kernel_picks_what_the_loops_pick(n: int, monkeypatch: pytest.MonkeyPatch) -> None:
    features = torch.randn(n, 256, device="cuda")
    importance = torch.rand(n, device="cuda")
    count = max(1, n // 5)
    runs = [
        (divprune, (features, count)),
        (idpruner, (features, importance, count)),
        (id_selection, (features, importance, count)),
    ]
    assert fused.works(features.device)
    for module, arguments in runs:
        fast = module.pick_order(*arguments).tolist()
        with monkeypatch.context() as patch:
            patch.setattr(module, "pick_all", lambda *a, **b: None)
            slow = module.pick_order(*arguments).tolist()
        # Two sums of the same products differ by rounding, which may break a tie that is none.
        assert len(set(fast) & set(slow)) > 0.99 * count, module.__name__


def test_no_kernel_where_there_is_no_gpu() -> None:
    assert pick_all(unit_rows(torch.randn(5, 3)), None, 1.0, 2) is None


def test_without_a_working_triton_the_loops_remain_and_it_is_said_once(monkeypatch, caplog) -> None:
    monkeypatch.setitem(sys.modules, "visionselector_eval.baselines.contract.greedy_kernel", None)
    fused.works.cache_clear()
    try:
        assert not fused.works(torch.device("cpu"))
        assert not fused.works(torch.device("cpu"))
    finally:
        fused.works.cache_clear()
    assert caplog.text.count("picking tokens step by step") == 1
