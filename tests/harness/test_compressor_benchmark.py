"""The benchmark of compressors beside naive forms: both forms of a case are the same method."""

from __future__ import annotations

import json

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from visionselector_eval.baselines.contract.registry import BUILTIN, compressor_class
from visionselector_eval.harness.microbenchmarks import compressors as benchmark

TIMED = [name for name in BUILTIN if name != "full" and compressor_class(name).stage in ("projector", "decoder")]


def table(capsys, *arguments):
    assert benchmark.main(["--width", "8", "--repeats", "1", *arguments]) == 0
    return capsys.readouterr().out


def test_a_row_for_every_compressor_that_works_on_tokens(capsys):
    text = table(capsys, "--tokens", "24", "--attention")
    assert all(f"| {name} " in text for name in [*TIMED, "visionzip: attention", "fastv: rows=all"])


@settings(deadline=None, max_examples=60)
@given(n=st.integers(1, 300), width=st.sampled_from([6, 64, 512]), ratio=st.floats(0.01, 1))
def test_naive_forms_of_decoder_methods_keep_the_same(n, width, ratio):
    cases = benchmark.decoder_cases(n, width, ratio, torch.device("cpu"), torch.float64)
    assert {case.name for case in cases if case.naive} == {"fastv", "fastv: rows=all", "pyramiddrop", "sparsevlm"}
    for case in cases:
        if case.naive:
            assert case.ours().kept.tolist() == case.naive(), case.name


def test_what_would_take_too_long_or_too_much_is_said_and_not_run(capsys):
    text = table(capsys, "--tokens", "64", "1024", "--methods", "divprune", "fastv", "--naive-gib", "0.004")
    rows = [line for line in text.splitlines() if "divprune" in line]
    assert "x |" in rows[0]
    assert "over 0.004 GiB" in rows[1]
    assert "over 0 s" in table(capsys, "--tokens", "64", "128", "--methods", "divprune", "--naive-seconds", "0")


def test_a_first_size_that_may_be_too_large_is_tried_smaller(capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "_SMALL", 32)
    text = table(capsys, "--tokens", "512", "--methods", "divprune", "pooling", "--naive-gib", "0.001")
    assert "over 0.001 GiB" in text
    assert " 32 " not in text


def test_results_hold_table_rows_and_environment(capsys, tmp_path):
    text = table(capsys, "--tokens", "16", "32", "--methods", "holov", "dart", "--results", str(tmp_path))
    (folder,) = tmp_path.glob("*/compressors")
    kept = (folder / "table.md").read_text()
    assert all(line in kept for line in text.splitlines())
    rows = pd.read_csv(folder / "rows.csv")
    assert rows[["part", "n"]].values.tolist() == [["holov", 16], ["dart", 16], ["holov", 32], ["dart", 32]]
    assert (rows["ms"] > 0).all()
    assert rows["naive"].tolist() == ["run", "none"] * 2
    assert json.loads((folder / "environment.json").read_text())["threads"] == 1


@pytest.mark.parametrize(
    "arguments",
    [
        ["--tokens", "0"],
        ["--width", "7"],
        ["--width", "200"],
        ["--budget", "0"],
        ["--repeats", "0"],
        ["--device", "gpu"],
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(capsys, arguments):
    with pytest.raises(SystemExit) as stop:
        benchmark.main(arguments)
    assert stop.value.code == 2
    assert "error:" in capsys.readouterr().err.splitlines()[-1]
