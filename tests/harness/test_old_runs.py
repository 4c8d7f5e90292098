"""Run folders of earlier releases: reported, or refused with the way out."""

from __future__ import annotations

import shutil
from pathlib import Path

import pandas as pd
import pytest

from visionselector_eval.harness.cli.commands import main

WRITTEN = Path(__file__).parent / "written_by_0_1_0"  # two cells, by release 0.1.0 itself


@pytest.fixture
def run_folder(tmp_path):
    return Path(shutil.copytree(WRITTEN, tmp_path / "run"))


def test_a_run_of_0_1_0_is_reported_with_its_values(run_folder, capsys):
    before = pd.read_csv(WRITTEN / "leaderboard.csv")
    assert main(["report", str(run_folder)]) == 0
    shown = capsys.readouterr().out
    assert "random" in shown
    assert "41.7" in shown
    assert "commit d7084c0728d0" in (run_folder / "leaderboard.csv").read_text()
    after = pd.read_csv(run_folder / "leaderboard.csv")
    pd.testing.assert_frame_equal(after[before.columns], before)


def test_a_sweep_in_a_folder_of_0_1_0_names_the_way_out(run_folder, capsys):
    """Its cells were measured by other code: they are never mixed with new ones in silence."""
    asked = ["--pretrained", "tiny", "--methods", "random", "--budgets", "0.3", "--tasks", "tiny_chartqa"]
    asked += ["--limit", "12", "--batch-size", "4", "--device", "cpu", "--output", str(run_folder)]
    code = main(["sweep", *asked])
    said = capsys.readouterr()
    assert code == 2
    assert "--existing replace-stale" in said.err
    assert "Traceback" not in said.err
