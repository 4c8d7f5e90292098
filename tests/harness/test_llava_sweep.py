"""Sweeps over two families: one command, one leaderboard, the suite published with LLaVA-STF."""

from __future__ import annotations

from pathlib import Path

import pytest
from llava_checkpoint import FUSED, save_llava
from local_data import write_task
from sweeps import sweep

from visionselector_eval.harness import cli
from visionselector_eval.harness.store.run import load_run
from visionselector_eval.tasks.suites import suite


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Random weights: a plain LLaVA and one with token fusion; the embedded Qwen2.5-VL beside them."""
    folder = tmp_path_factory.mktemp("backbones")
    return {
        "plain": str(save_llava(folder / "llava-plain")),
        "fused": str(save_llava(folder / "llava-fused", **FUSED)),
        "tiny": "tiny",
    }


def test_the_published_suite_on_both_families(backbones, tmp_path, monkeypatch, capsys):
    """All nine tasks, local data; every backbone has its own part, its own `full` row and its own number of tokens."""
    monkeypatch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path / "cache"))
    root, folder = tmp_path / "data", tmp_path / "run"
    for task in suite("llava_stf9"):
        write_task(root, task)
    flags = ["--suite", "llava_stf9", "--data-root", str(root), "--methods", "divprune", "prumerge_plus", "fastv"]
    flags += ["--budgets", "0.25", "--limit", "4", "--batch-size", "2", "--device", "cpu", "--output", str(folder)]
    assert cli.main(["sweep", "--pretrained", *backbones.values(), *flags]) == 0, capsys.readouterr().err
    cells, samples = load_run(folder)
    assert set(cells.status) == {"done"}
    assert set(cells.task) == set(suite("llava_stf9"))
    assert cells.groupby("backbone").size().to_dict() == dict.fromkeys(backbones.values(), 9 * 4)
    with_image = samples[samples.total_tokens > 0]
    tokens = with_image.groupby(["backbone", "method"])[["kept_tokens", "total_tokens"]].max()
    for name, total in (("plain", 64), ("fused", 16)):
        own = tokens.loc[backbones[name]]
        assert set(own.total_tokens) == {total}
        assert own.kept_tokens.to_dict() == {
            "full": total,
            **dict.fromkeys(("divprune", "prumerge_plus", "fastv"), total // 4),
        }
    page = (folder / "leaderboard.md").read_text()
    headings = [line.removeprefix("## ") for line in page.splitlines() if line.startswith("## ")]
    assert sorted(headings) == sorted(
        [backbones["plain"], f"{backbones['fused']} (trained fusion, LLM retrained)", "tiny"]
    )


@pytest.mark.versions
def test_videos_fail_with_a_reason_and_images_go_on(backbones, tmp_path, capsys):
    """LLaVA-1.5 takes none: its video cells fail alone, the other family's do not."""
    folder = tmp_path / "run"
    flags = ["--tasks", "tiny_pope", "tiny_mvbench_moving_direction", "--methods", "divprune", "--budgets", "0.25"]
    flags += ["--limit", "2", "--device", "cpu", "--output", str(folder)]
    assert cli.main(["sweep", "--pretrained", backbones["plain"], "tiny", *flags]) == 3
    capsys.readouterr()
    cells = load_run(folder).cells
    failed = cells[cells.status == "failed"]
    assert set(zip(failed.backbone, failed.task, strict=True)) == {
        (backbones["plain"], "tiny_mvbench_moving_direction")
    }
    reason = "tiny_mvbench_moving_direction can't be answered: this backbone takes images, no videos"
    assert all(error.startswith(reason) for error in failed.error)
    # Skipping is for documents: a task without any that can be answered is no score of 0.
    spec = {"backbones": [{"pretrained": backbones["plain"]}], "on_bad_document": "skip"}
    _, result = sweep(tmp_path / "skip", tasks=["tiny_mvbench_moving_direction"], **spec)
    assert not result.done
    assert all(error.startswith(reason) for error in result.failed.values())


def test_ask_says_what_kind_of_model_answers(backbones, tmp_path: Path, capsys):
    from PIL import Image

    Image.new("RGB", (90, 60), "teal").save(tmp_path / "picture.png")
    command = ["ask", "What is it?", "--image", str(tmp_path / "picture.png"), "--method", "visionzip"]
    command += ["--budget", "0.5", "--max-new-tokens", "2", "--device", "cpu"]
    for name, total in (("plain", 64), ("fused", 16)):
        assert cli.main([*command, "--pretrained", backbones[name]]) == 0
        assert f"{total // 2} of {total}" in capsys.readouterr().out
    assert cli.main([*command[:2], "--video", "x.mp4", "--pretrained", backbones["plain"]]) == 2
