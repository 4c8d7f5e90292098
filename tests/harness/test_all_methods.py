"""Every registered method in one sweep, from the command line and from YAML."""

from __future__ import annotations

import json

import pytest

from visionselector_eval.baselines.contract.registry import BUILTIN
from visionselector_eval.harness import cli
from visionselector_eval.harness.store.run import load_run

TINY = ["--device", "cpu", "--dtype", "float32", "--attn-implementation", "sdpa", "--limit", "1"]


@pytest.mark.versions
@pytest.mark.slow
def test_one_command_compares_all_of_them(tmp_path, capsys):
    """A cell for each method, and for a combination, on an image, several images and a video; none failed."""
    methods = sorted({*BUILTIN, "visionselector+fastv"} - {"full"})
    tasks = ["tiny_chartqa", "tiny_mmmu_val", "tiny_videomme"]
    grid = ["--methods", *methods, "--budgets", "0.2", "--tasks", *tasks, "--output", str(tmp_path / "run")]
    assert cli.main(["sweep", *grid, *TINY]) == 0, capsys.readouterr()
    cells, samples = load_run(tmp_path / "run")
    assert set(cells["status"]) == {"done"}
    assert sorted(zip(cells["method"], cells["task"], strict=True)) == sorted(
        (method, task) for method in [*methods, "full"] for task in tasks
    )
    full = cells[cells["method"] == "full"].set_index("task")["total_tokens"]
    for cell in cells.itertuples():
        if cell.method == "full":
            assert cell.kept_tokens == full[cell.task]
        else:
            assert 0 < cell.kept_tokens <= 0.2 * full[cell.task]
    assert len(samples) == len(cells)
    board = (tmp_path / "run" / "leaderboard.md").read_text()
    assert all(f"| {method} " in board for method in methods)


def test_methods_are_configured_in_yaml(tmp_path, capsys):
    spec = tmp_path / "spec.yaml"
    spec.write_text(
        "methods:\n"
        "  - {name: fastv, layer: 3}\n"
        "  - {name: fastv, layer: 1, rows: all, label: early}\n"
        "  - uniform\n"
        "budgets: [0.2]\n"
        "tasks: [tiny_chartqa]\n"
        f"output: {json.dumps(str(tmp_path / 'run'))}\n"
    )
    assert cli.main(["sweep", "--spec", str(spec), *TINY]) == 0, capsys.readouterr()
    cells, _ = load_run(tmp_path / "run")
    assert set(cells["status"]) == {"done"}
    assert sorted(cells["label"]) == ["early", "fastv[layer=3]", "full", "uniform"]
    by_label = cells.set_index("label")
    assert json.loads(by_label.loc["fastv[layer=3]", "options"]) == {
        "layer": 3,
        "rows": "last",
        "upstream_exact": False,
    }
    assert json.loads(by_label.loc["early", "options"]) == {"layer": 1, "rows": "all", "upstream_exact": False}
    # Equal K is not equal cost: of 6 layers, 1 or 3 see all tokens.
    total, kept = by_label.loc["full", "total_tokens"], by_label.loc["uniform", "kept_tokens"]
    for label, layer in (("early", 1), ("fastv[layer=3]", 3)):
        assert by_label.loc[label, "kept_tokens"] == kept
        assert by_label.loc[label, "layer_tokens"] == pytest.approx((layer * total + (6 - layer) * kept) / 6)
    board = (tmp_path / "run" / "leaderboard.md").read_text()
    assert all(f"| {label} " in board for label in by_label.index)
