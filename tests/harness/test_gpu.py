"""The GPU's list of measurements, dry-run on a CPU, and the checks of correctness, which a GPU runs as tests."""

from __future__ import annotations

import csv
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch

from visionselector_eval.baselines import available
from visionselector_eval.harness.microbenchmarks import bundle, compressors, correctness, gpu, measured
from visionselector_eval.harness.profiler.store import load_profile

ROOT = Path(__file__).parents[2]


@pytest.fixture
def short(monkeypatch):
    """One method, one small cost line, no compressors alone."""
    monkeypatch.setattr(correctness, "checkpoints", lambda: ("tiny",))
    monkeypatch.setattr(correctness, "methods_of", lambda pair: ["divprune"])
    monkeypatch.setattr(gpu, "ON_CPU", (gpu.Line("qwen2_5_vl_tiny", 16, ("0.2",), ("divprune",)),))
    monkeypatch.setattr(compressors, "SMALL", (16,))
    return ["--device", "cpu", "--repeats", "1", "--date", "2026-01-02", "--results"]


def the_folder(results: Path) -> Path:
    (folder,) = results.iterdir()
    assert folder.name.endswith("-2026-01-02")
    return folder


def test_the_list_is_worked_through_once(short, tmp_path, capsys):
    assert gpu.main([*short, str(tmp_path), "--commit", "abc"]) == 0
    folder = the_folder(tmp_path)
    page = (folder / "README.md").read_text()
    assert "4 of 4 checks pass" in page
    assert "Not measured yet" not in page
    assert "qwen2_5_vl_tiny/table.md" in page
    assert "compressors/table.md" in page
    with (folder / "correctness.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["check"] for row in rows] == list(correctness.CHECKS)
    measured_rows = load_profile(folder / "qwen2_5_vl_tiny").rows
    assert {"time", "plain", "published", "memory", "flops"} <= set(measured_rows["kind"])
    assert gpu.main([*short, str(tmp_path)]) == 0
    assert len(load_profile(folder / "qwen2_5_vl_tiny").rows) == len(measured_rows), "nothing is measured twice"
    assert "4 of 4 checks pass" in (folder / "README.md").read_text()
    assert "resumes" not in capsys.readouterr().out


def test_time_that_is_up_is_said_and_the_next_call_resumes(short, tmp_path, capsys):
    assert gpu.main([*short, str(tmp_path), "--minutes", "1e-9"]) == 3
    assert "stopped after the minutes given" in capsys.readouterr().out
    page = (the_folder(tmp_path) / "README.md").read_text()
    assert "Not measured yet: qwen2_5_vl_tiny, N = 16, budget 0.2, 1 methods." in page
    assert gpu.main([*short, str(tmp_path), "--skip-correctness"]) == 0
    assert "Not measured yet" not in (the_folder(tmp_path) / "README.md").read_text()


def test_a_check_that_fails_or_breaks_is_named(short, tmp_path, monkeypatch):
    def breaks(pair, method):
        raise ValueError("two\nlines")

    monkeypatch.setitem(correctness.CHECKS, "bfloat16 runs", breaks)
    monkeypatch.setitem(correctness.CHECKS, "a batch row equals its single run", lambda pair, method: "it does not")
    assert gpu.main([*short, str(tmp_path)]) == 3
    page = (the_folder(tmp_path) / "README.md").read_text()
    assert "2 of 4 checks pass" in page
    assert "- tiny, divprune, bfloat16 runs: ValueError: two lines" in page
    assert "- tiny, divprune, a batch row equals its single run: it does not" in page


@pytest.mark.parametrize(
    ("flags", "words"),
    [(["--minutes", "0"], "--minutes"), (["--device", "gpu"], "gpu"), (["--repeats", "0"], "--repeats")],
)
def test_bad_flags_are_one_line(flags, words, capsys):
    with pytest.raises(SystemExit) as stop:
        gpu.main(flags)
    assert stop.value.code == 2
    assert words in capsys.readouterr().err.splitlines()[-1]


def test_the_list_begins_with_the_headline():
    first = gpu.ON_GPU[0]
    assert (first.shape, first.tokens, first.budgets) == ("qwen2_5_vl_7b", 4096, ("0.2",))
    assert set(first.methods) == {"visionselector", "divprune", "visionzip", "fastv", "pooling"}
    assert {line.tokens for line in gpu.ON_GPU} >= {1024, 4096, 16384}


def test_a_profiler_that_costs_more_than_one_percent_misses_its_target(short, tmp_path):
    gpu.main([*short, str(tmp_path)])
    rows = load_profile(the_folder(tmp_path) / "qwen2_5_vl_tiny").rows
    plain = rows["kind"] == "plain"
    cell = rows.loc[plain, "cell"].iloc[0]
    own = (rows["cell"] == cell) & (rows["kind"] == "time")
    for latency, met in ((100.9, True), (102.0, False)):
        rows.loc[plain, "latency_ms"], rows.loc[own, "latency_ms"] = 100.0, latency
        assert measured.overhead_target("x", rows).met is met
    assert measured.overhead_target("x", rows[~plain]).met is None


# The checks see what they are for -------------------------------------------------------------------------------------


def test_the_checks_notice_another_device_that_computes_otherwise():
    pair = correctness.Pair("tiny", "cpu")
    assert correctness.same_kept(pair, "divprune") == ""
    weight = pair.gpu.model.model.visual.patch_embed.proj.weight
    weight.data += 0.05 * torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    assert "kept tokens are the CPU's" in correctness.same_kept(pair, "divprune")


def test_exact_rows_have_exact_cosines_ties_and_copies():
    rows = correctness.exact_rows(256)
    unit = rows / rows.norm(dim=1, keepdim=True)
    assert torch.equal((unit @ unit.T).double(), unit.double() @ unit.double().T)
    assert len(rows.unique(dim=0)) < 256


needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
pair_of = cache(lambda checkpoint: correctness.Pair(checkpoint, "cuda"))


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("check", correctness.CHECKS)
@pytest.mark.parametrize("method", available())
@pytest.mark.parametrize("checkpoint", correctness.checkpoints())
def test_on_a_gpu(checkpoint, method, check):
    pair = pair_of(checkpoint)
    if reason := correctness.fits(pair, method):
        pytest.skip(reason)
    assert correctness.CHECKS[check](pair, method) == ""


@pytest.mark.gpu
@needs_gpu
@pytest.mark.parametrize("n", correctness.KERNEL_SIZES)
def test_the_kernel_picks_what_the_loop_picks(n):
    assert correctness.kernel_equals_loop(n, "cuda") == ""


# The bundle -----------------------------------------------------------------------------------------------------------


def test_the_bundle_names_what_the_lock_pins():
    locked = bundle.pins(ROOT / "requirements.lock")
    names = set(bundle.libraries(bundle.EXTRAS))
    assert names <= set(locked)
    assert {"transformers", "pydantic-core", "httpx2", "pyarrow", "contourpy"} <= names, "with what they need"
    assert not names & {"torch", "numpy", "triton", "sympy"}, "the machine's own"
    assert bundle.ranges(ROOT)["transformers"][0][0] == ">="


def test_a_bundle_of_this_package_alone(tmp_path):
    size = bundle.make(ROOT, tmp_path / "b", [], "3.12")
    names = {path.name for path in (tmp_path / "b").iterdir()}
    assert {"install.sh", "missing.py", "commit"} < names
    assert any(name.startswith("visionselector_eval-") for name in names)
    assert 1 << 20 < size < 60 << 20
    assert subprocess.run(["sh", "-n", str(tmp_path / "b" / "install.sh")]).returncode == 0


def test_missing_says_what_is_not_in_range(tmp_path):
    script = tmp_path / "missing.py"
    known = {"transformers": "5.0", "no-such-library": "1.0", "rich": "1.0"}
    script.write_text(bundle._MISSING.format(pins=known, ranges={"rich": ((">=", "999"),)}))
    done = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert lines[0] == "no-such-library (needed: any; here: none)"
    assert lines[1].startswith("rich (needed: >=999; here: ")
    assert lines[2].endswith("2 of 5 missing")


@pytest.mark.parametrize(
    ("flags", "words"), [(["--only", "panda"], "pandas"), (["--python", "three"], "invalid --python 'three'")]
)
def test_a_bundle_of_nothing_known_is_refused(flags, words, capsys):
    with pytest.raises(SystemExit) as stop:
        bundle.main(flags)
    assert stop.value.code == 2
    assert words in capsys.readouterr().err.splitlines()[-1]
