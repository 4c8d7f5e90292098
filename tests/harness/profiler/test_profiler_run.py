"""`profile` end to end on the embedded checkpoint: files, resuming, failures, mistakes, and life without lmms-eval."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml

from visionselector_eval.harness import cli
from visionselector_eval.harness.microbenchmarks import measured
from visionselector_eval.harness.profiler import rounds
from visionselector_eval.harness.profiler.measure import out_of_memory
from visionselector_eval.harness.profiler.nvml import Nvml, NvmlSampler
from visionselector_eval.harness.profiler.rounds import Progress
from visionselector_eval.harness.profiler.run import run_profile
from visionselector_eval.harness.profiler.spec import ProfileSpec, profile_cells
from visionselector_eval.harness.profiler.store import load_profile
from visionselector_eval.harness.store.run import load_run

SMALL: dict[str, Any] = {
    "methods": ["divprune", "fastv"],
    "budgets": ["0.2"],
    "synthetic": [16, 20],
    "repeats": 2,
    "warmup": 1,
    "memory_rounds": 1,
    "max_new_tokens": 2,
    "device": "cpu",
}
FLAGS = [
    "--methods", "divprune", "--budgets", "0.2", "--synthetic", "16", "--repeats", "1", "--warmup", "0",
    "--memory-rounds", "1", "--max-new-tokens", "2", "--device", "cpu",
]  # fmt: skip


@pytest.fixture(autouse=True)
def _quick_ceiling(monkeypatch) -> None:
    monkeypatch.setattr(rounds, "matmul_ceiling", lambda device, dtype: 1e11)


def spec(folder: Path, **fields: Any) -> Any:
    return ProfileSpec.make({**SMALL, "output": str(folder), **fields})


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = cli.main(["profile", *arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("profile") / "small"
    assert run_profile(spec(folder)).failed == []
    return folder


def test_everything_asked_for_is_in_the_rows(done) -> None:
    rows = load_profile(done).rows
    count = rows.groupby(["workload", "kind"]).size().unstack()
    assert dict(count.loc["synthetic-16"]) == {"flops": 4, "memory": 4, "plain": 2, "published": 4, "time": 8}
    time = rows[(rows["kind"] == "time") & (rows["workload"] == "synthetic-20")].set_index("label")
    assert set(time["visual_before"]) == {20}
    assert set(time.loc["divprune", "visual_after"]) == {4}
    assert set(time.loc["fastv", "visual_layers"]) == {(2 * 20 + 4 * 4) / 6}
    assert set(rows["attention"]) == {"sdpa"}
    phases = ["vision_ms", "compressor_ms", "prefill_ms", "setup_ms", "decode_ms"]
    assert time[phases].sum(axis=1).to_numpy() == pytest.approx(time["latency_ms"].to_numpy())
    assert (time["ttft_ms"] == time["vision_ms"] + time["compressor_ms"] + time["prefill_ms"]).all()
    assert time["decode_token_ms"].to_numpy() == pytest.approx(time["decode_ms"].to_numpy())
    assert (rows["published_prefill_ms"].dropna() > 0).all()


def test_cells_run_in_another_order_each_round_and_the_seed_says_which(tmp_path, done) -> None:
    def orders(folder: Path) -> list[list[str]]:
        rows = load_profile(folder).rows
        time = rows[(rows["kind"] == "time") & (rows["workload"] == "synthetic-16")]
        return [list(own.sort_values("place")["label"]) for _, own in time.groupby("round")]

    run_profile(spec(tmp_path / "more", synthetic=[16], repeats=5))
    more = orders(tmp_path / "more")
    assert len({tuple(order) for order in more}) > 1
    assert more[:2] == orders(done)


def test_the_files_say_what_ran_where(done) -> None:
    assert {path.name for path in done.iterdir()} >= {
        "spec.yaml", "environment.json", "profile.json", "samples.parquet", "table.md", "table.csv", "plots",
    }  # fmt: skip
    assert not (done / "samples.jsonl").exists()
    assert ProfileSpec.make(yaml.safe_load((done / "spec.yaml").read_text())) == spec(done)
    about = load_profile(done).about
    assert about["settings"]["threads"] == 1
    assert about["energy"].startswith("none: device is cpu")


def test_the_same_command_measures_nothing_twice_and_more_adds(done, tmp_path) -> None:
    folder = Path(shutil.copytree(done, tmp_path / "own"))  # others read the shared one
    before = load_profile(folder).rows
    seen = Counting()
    run_profile(spec(folder), progress=seen)
    assert (seen.total, seen.samples) == (0, 0)
    pd.testing.assert_frame_equal(load_profile(folder).rows, before)
    run_profile(spec(folder, methods=["divprune", "fastv", "uniform"]), progress=seen)
    rows = load_profile(folder).rows
    assert set(rows["label"]) == {"full", "divprune", "fastv", "uniform", "limit"}
    assert len(rows) == len(before) + seen.total


class Counting(Progress):
    """Counts samples, and stops after some."""

    def __init__(self, stop: int | None = None) -> None:
        self.total = self.samples = 0
        self._stop = stop

    def start(self, samples: int) -> None:
        self.total = samples

    def measured(self, count: int) -> None:
        self.samples += count
        if self.samples == self._stop:
            raise KeyboardInterrupt


@pytest.mark.parametrize("stop", [1, 7, 21])
def test_stopped_anywhere_nothing_measured_is_lost(tmp_path, stop) -> None:
    with pytest.raises(KeyboardInterrupt):
        run_profile(spec(tmp_path / "p"), progress=Counting(stop))
    before = load_profile(tmp_path / "p").rows
    assert len(before) == stop
    seen = Counting()
    run_profile(spec(tmp_path / "p"), progress=seen)
    rows = load_profile(tmp_path / "p").rows
    assert len(rows) == stop + seen.total == 44
    assert not rows.duplicated(["workload", "cell", "kind", "round"]).any()
    assert rows["at"].head(stop).tolist() == before["at"].tolist()


def test_out_of_memory_marks_the_cell_and_the_rest_goes_on(tmp_path, monkeypatch) -> None:
    from visionselector_eval.baselines.divprune import DivPrune

    compress = DivPrune.compress

    def hungry(self: Any, tokens: Any, count: int) -> Any:
        if len(tokens.features) == 20:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 PiB")
        return compress(self, tokens, count)

    monkeypatch.setattr(DivPrune, "compress", hungry)
    result = run_profile(spec(tmp_path / "p"))
    assert result.failed == ["divprune @ 0.2 on synthetic-20: out of memory at N=20"]
    assert "out of memory at N=20" in result.text
    rows = load_profile(tmp_path / "p").rows
    kinds = rows[rows["kind"] == "time"].groupby(["workload", "label"]).size()
    assert ("synthetic-16", "divprune") in kinds
    assert ("synthetic-20", "divprune") not in kinds
    assert ("synthetic-20", "fastv") in kinds
    monkeypatch.undo()
    assert run_profile(spec(tmp_path / "p")).failed == []
    assert "out of memory" not in (tmp_path / "p" / "table.md").read_text()


@pytest.mark.parametrize(
    ("error", "is_memory"),
    [
        (torch.OutOfMemoryError("x"), True),
        (MemoryError(), True),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
            True,
        ),
        (RuntimeError("shapes"), False),
        (ValueError("out of memory"), False),
    ],
)
def test_what_counts_as_out_of_memory(error, is_memory) -> None:
    assert out_of_memory(error) == is_memory


def test_a_method_that_does_not_fit_is_a_line_and_exit_code_3(tmp_path, monkeypatch, capsys) -> None:
    from visionselector_eval.models.loading import load_backbone

    bare = load_backbone("tiny")
    bare.host = type(bare.host)(id="bare", width=bare.width, extra_weights={}, depth=bare.depth)
    monkeypatch.setattr("visionselector_eval.harness.profiler.run.load_backbone", lambda *a, **k: bare)
    flags = [*FLAGS, "--output", str(tmp_path / "p")]
    flags[1:2] = ["visionselector", "uniform"]
    code, out, err = run(capsys, *flags)
    assert code == 3
    assert "needs scorer weights" in out
    assert re.search(r"failed: visionselector @ 0.2 on synthetic-16: .*needs scorer weights", err)


# the command ----------------------------------------------------------------------------------------------------------


@pytest.mark.versions
def test_the_command_prints_the_table_and_reports_again(tmp_path, capsys) -> None:
    folder = str(tmp_path / "p")
    code, out, err = run(capsys, *FLAGS, "--output", folder)
    assert code == 0, err
    assert "| divprune" in out
    assert out.splitlines()[-1].startswith(f"profile: {folder}")
    code, again, _ = run(capsys, "report", folder)
    assert code == 0
    assert again.strip() in out
    code, _, err = run(capsys, *FLAGS, "--output", folder, "--max-new-tokens", "3")
    assert code == 2
    assert "made with other settings (new_tokens: 2 then, 3 now)" in err
    assert run(capsys, *FLAGS, "--output", folder, "--max-new-tokens", "3", "--existing", "overwrite")[0] == 0


MISTAKES = {
    "shape": (["--random-weights", "qwen2_5_vl_7"], "unknown shape .*did you mean 'qwen2_5_vl_7b'"),
    "no adapter": (["--random-weights", "llava_onevision_7b"], "can't be built yet: its family 'llava_onevision'"),
    "positions": (["--synthetic", "40000"], "40000 is more than the 32768 positions of tiny"),
    "positions of a shape": (
        ["--random-weights", "qwen2_5_vl_7b", "--synthetic", "200000"],
        "200000 is more than the 128000 positions of qwen2_5_vl_7b",
    ),
    "positions with the text": (["--synthetic", "32740"], "more than the model's 32768 positions"),
    "image": (["--synthetic", "251"], "no image of 251 visual tokens: try 252"),
    "repeats": (["--repeats", "0"], "invalid repeats 0 in the profile: expected a number greater"),
    "budget": (["--budgets", "1.5"], "invalid budget '1.5': expected "),
    "method": (["--methods", "divprun"], "unknown method 'divprun': did you mean 'divprune'"),
    "twice": (["--methods", "divprune", "divprune"], "listed twice"),
    "flag": (["--repeat", "3"], "unknown argument '--repeat': did you mean --repeats"),
    "both": (["--random-weights", "qwen2_5_vl_tiny", "--pretrained", "x"], "not both"),
    "task and shape": (["--random-weights", "qwen2_5_vl_tiny", "--task", "tiny_pope"], "use --synthetic N"),
    "limit": (["--limit", "2"], "--limit goes with --task"),
    "action": (["compare", "a"], "expected report FOLDER or compare A B"),
    "no profile": (["report", "nothing"], "there is no folder 'nothing'"),
    "device": (["--device", "cuda:9"], "is not here"),
    "attention": (["--attn-implementation", "flash_attention_2", "--device", "cpu"], "can't be used"),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(what, tmp_path, monkeypatch, capsys) -> None:
    from transformers.utils import logging as hf_logging

    hf_logging.disable_progress_bar()
    monkeypatch.chdir(tmp_path)
    arguments, message = MISTAKES[what]
    code, out, err = run(capsys, *arguments)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1, err
    assert re.search(message, err), err


def test_sweep_takes_its_profile_flags_together(capsys) -> None:
    assert cli.main(["sweep", "--profile-repeats", "3"]) == 2
    assert "--profile-repeats goes with --profile" in capsys.readouterr().err
    assert cli.main(["sweep", "--profile", "--profile-warmup", "-1"]) == 2
    assert "invalid warmup -1 in the profile: expected a number greater than or equal to 0" in capsys.readouterr().err


@pytest.mark.versions
def test_a_sweep_with_profile_puts_rows_beside_its_answers(tmp_path, capsys) -> None:
    flags = ["--methods", "divprune", "random", "--budgets", "0.2", "--tasks", "tiny_pope", "--limit", "2"]
    flags += ["--device", "cpu", "--seeds", "0", "1", "--output", str(tmp_path / "run")]
    code = cli.main(["sweep", *flags, "--profile", "--profile-repeats", "2", "--profile-warmup", "0"])
    said = capsys.readouterr()
    assert code == 0, said.err
    assert "## tiny_pope" in said.out
    cells = load_run(tmp_path / "run").cells
    measured_cells = cells[cells["seed"] == 0]
    for cell in measured_cells.itertuples():
        own = pd.read_parquet(tmp_path / "run" / "cells" / cell.digest / "profile.parquet")
        assert set(own["label"]) == {cell.label}
        assert set(own["kind"]) >= {"time", "memory", "flops"}
        time = own[own["kind"] == "time"]
        assert set(time["item"]) == {"tiny_pope/0", "tiny_pope/1"}
        assert time["visual_after"].mean() == pytest.approx(cell.kept_tokens)
    assert not (tmp_path / "run" / "cells" / cells[cells["seed"] == 1]["digest"].iloc[0] / "profile.parquet").exists()


def test_documents_of_a_task_are_measured_in_turn(tmp_path) -> None:
    fields = {"synthetic": [], "task": "tiny_pope", "limit": 2, "repeats": 3}
    run_profile(spec(tmp_path / "p", **fields))
    rows = load_profile(tmp_path / "p").rows
    time = rows[(rows["kind"] == "time") & (rows["label"] == "full")].sort_values("round")
    assert list(time["item"]) == ["tiny_pope/0", "tiny_pope/1", "tiny_pope/0"]


def test_all_methods_are_measured_by_default() -> None:
    from visionselector_eval.baselines import available

    made = ProfileSpec.make({})
    assert {m.name for m in made.methods} == set(available()) - {"full"}
    cells = profile_cells(made)
    assert len(cells) == 1 + 3 * len(made.methods) + 3
    assert [c.title for c in cells[:2]] == ["full", f"{made.methods[0].name} @ 0.3"]
    assert len({c.digest for c in cells}) == len(cells)


# without lmms-eval ----------------------------------------------------------------------------------------------------


def test_the_profiler_lives_without_lmms_eval(tmp_path) -> None:
    code = """
        import sys
        sys.modules["lmms_eval"] = None
        from visionselector_eval.harness import cli
        flags = sys.argv[1:]
        assert cli.main(["profile", *flags]) == 0
        assert cli.main(["profile", "--task", "chartqa", "--device", "cpu", "--output", "x"]) == 2
        assert not [name for name in sys.modules if name.startswith("lmms_eval.")]
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *FLAGS, "--output", "p"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert "| divprune" in done.stdout
    assert "--task chartqa needs lmms-eval" in done.stderr


# NVML -----------------------------------------------------------------------------------------------------------------


class FakeGpu:
    """100 W; the counter counts 5 J at each look, or there is none."""

    def __init__(self, counter: bool = True) -> None:
        self._joules, self._counter = 0.0, counter

    def watts(self) -> float:
        return 100.0

    def used_bytes(self) -> int:
        return 3 << 30

    def joules(self) -> float | None:
        self._joules += 5.0
        return self._joules if self._counter else None


def test_energy_is_counted_where_there_is_a_counter_and_else_sampled() -> None:
    with NvmlSampler(FakeGpu(), interval=0.001) as counted:
        pass
    assert counted.reading is not None
    assert (counted.reading.joules, counted.reading.source) == (5.0, "energy counter")
    assert counted.reading.bytes == 3 << 30
    with NvmlSampler(FakeGpu(counter=False), interval=0.001) as sampled:
        pass
    assert sampled.reading is not None
    assert sampled.reading.joules == pytest.approx(100 * sampled.reading.seconds)
    assert sampled.reading.source == "power sampled every 1 ms"
    assert sampled.reading.samples >= 2


def test_energy_of_an_answer(tiny, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(Nvml, "find", classmethod(lambda cls, device: Nvml(FakeLibrary(), None)))
    run_profile(spec(tmp_path / "p", synthetic=[16], energy_seconds=0.01))
    profile = load_profile(tmp_path / "p")
    energy = profile.rows[profile.rows["kind"] == "energy"]
    assert len(energy) == 4
    assert (energy["joules"] > 0).all()
    assert profile.about["energy"].startswith("NVML every")


class FakeLibrary:
    """pynvml of a GPU at 100 W without a counter."""

    @staticmethod
    def nvmlDeviceGetPowerUsage(handle: Any) -> int:
        return 100_000

    @staticmethod
    def nvmlDeviceGetMemoryInfo(handle: Any) -> Any:
        return type("Info", (), {"used": 1 << 30})

    @staticmethod
    def nvmlDeviceGetTotalEnergyConsumption(handle: Any) -> int:
        raise RuntimeError("not supported")


def test_without_nvml_there_is_a_reason() -> None:
    assert Nvml.find(torch.device("cpu")) == "device is cpu, NVML is for NVIDIA GPUs"
    if not torch.cuda.is_available():
        assert isinstance(Nvml.find(torch.device("cuda")), str)


# the tables of results/measured ---------------------------------------------------------------------------------------


def test_the_measured_tables_can_be_stopped_and_gone_on_with(tmp_path, capsys) -> None:
    flags = ["--device", "cpu", "--shapes", "qwen2_5_vl_tiny", "--synthetic", "16", "--methods", "divprune"]
    flags += ["--budgets", "0.2", "--repeats", "2", "--warmup", "0", "--max-new-tokens", "2"]
    flags += ["--results", str(tmp_path), "--date", "2026-01-02"]
    assert measured.main([*flags, "--minutes", "1e-9"]) == 0
    assert "stopped after the minutes given" in capsys.readouterr().out
    (folder,) = tmp_path.iterdir()
    assert folder.name.endswith("-2026-01-02")
    assert len(load_profile(folder / "qwen2_5_vl_tiny").rows) == 1
    assert measured.main(flags) == 0
    rows = load_profile(folder / "qwen2_5_vl_tiny").rows
    assert len(rows[rows["kind"] == "time"]) == 6
    assert "qwen2_5_vl_tiny/table.md" in (folder / "README.md").read_text()
    assert measured.main([*flags, "--shapes", "nothing"]) == 2


def test_targets_are_checked_against_the_rows() -> None:
    line = {"workload": "synthetic-4096", "role": "method", "method": "visionselector", "label": "visionselector"}
    line |= {"budget": "0.2", "rounds": 50, "speedup": 2.5, "of_ideal": 0.95, "llm_saved": 0.8, "memory_saved": 0.4}
    slow = {**line, "method": "divprune", "label": "divprune", "compressor_share": 0.05}
    lines = pd.DataFrame([{**line, "compressor_share": 0.01}, slow, {**slow, "method": "fastv", "label": "fastv"}])
    found = measured.targets("qwen2_5_vl_7b", lines)
    assert [t.met for t in found] == [True, True, True, False, False]
    assert found[-1].measured == "divprune @ 0.2 5.0 %", "fastv acts inside the LLM"
    assert {t.met for t in measured.targets("x", lines.assign(workload="synthetic-256"))} == {None}
