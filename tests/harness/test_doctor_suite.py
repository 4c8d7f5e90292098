"""`doctor --suite`: data, videos and packages of each task, without a download."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from local_data import CLIPS, DOCUMENTS, dataset, write_clips, write_task

from visionselector_eval.harness import cli
from visionselector_eval.harness.doctor import data as data_checks
from visionselector_eval.harness.doctor.data import data_checks as check
from visionselector_eval.harness.doctor.data import missing_packages
from visionselector_eval.harness.doctor.machine import Check, exit_code
from visionselector_eval.tasks import suites
from visionselector_eval.tasks.local import upstream


def one(task: str, root: Path | None = None) -> Check:
    (found,) = check([task], root)
    return found


def test_data_root(tmp_path: Path) -> None:
    write_task(tmp_path, "chartqa")
    found = one("chartqa", tmp_path)
    assert found.ok
    assert found.detail == f"4 documents in {tmp_path}/chartqa/test.parquet (parquet)"
    lost = one("pope", tmp_path)
    assert lost.ok is False
    assert f"looked for {tmp_path}/pope/test.parquet" in lost.detail
    assert "tasks layout --tasks pope" in lost.remedy


def test_videos_are_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data_checks, "missing_packages", lambda of: [])
    write_task(tmp_path, "videomme")
    assert one("videomme", tmp_path).detail.endswith("; 2 of 2 videos")
    (tmp_path / CLIPS["videomme"][1]).unlink()
    found = one("videomme", tmp_path)
    assert found.ok is False
    assert found.detail.endswith("; 1 of 2 videos, the first missing is 'clip1'")
    assert f"{tmp_path}/videomme/videos" in found.remedy


def test_bad_data_are_reported(tmp_path: Path) -> None:
    file = write_task(tmp_path, "chartqa")
    file.write_bytes(b"PAR1")
    found = one("chartqa", tmp_path)
    assert found.ok is False
    assert "cannot read" in found.detail
    assert "\n" not in found.detail


def test_a_group_has_a_line_for_each_member(tmp_path: Path) -> None:
    write_task(tmp_path, "mvbench_moving_direction")
    found = check(["mvbench", "tiny_pope"], tmp_path)
    assert len(found) == 21
    assert {c.name for c in found if c.ok} == {"mvbench_moving_direction", "tiny_pope"}
    assert exit_code(found) == 3


def prepared_copy(cache: Path, task: str) -> None:
    """What the datasets library leaves in its cache after a load from the hub."""
    of = upstream.upstream(task)
    owner, name = of.dataset_path.split("/")
    folder = cache / f"{owner}___{datasets.naming.camelcase_to_snakecase(name)}" / (of.dataset_name or "default")
    folder = folder / "0.0.0" / "abc"
    rows = dataset(DOCUMENTS[task][1])
    rows.save_to_disk(folder / "made")
    (arrow,) = (folder / "made").glob("*.arrow")
    arrow.rename(folder / f"{name.lower()}-{of.split}.arrow")
    info = {"splits": {of.split: {"name": of.split, "num_examples": len(rows)}}}
    (folder / "dataset_info.json").write_text(json.dumps(info))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty cache of data sets; lmms-eval remembers where it was."""
    from lmms_eval.api.task import _resolve_hf_datasets_cache_dir as remembered

    with monkeypatch.context() as patch:
        patch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path / "cache"))
        remembered.cache_clear()
        yield tmp_path / "cache"
    remembered.cache_clear()


def test_without_a_data_root_the_caches_count(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))

    def no_network(*_: Any, **__: Any) -> Any:
        raise AssertionError("a download was tried")

    monkeypatch.setattr(datasets, "load_dataset", no_network)
    for task in ("chartqa", "docvqa_val", "nextqa_mc_test"):
        absent = one(task)
        assert absent.ok is False
        assert "not in the cache" in absent.detail
        assert "tasks fetch" in absent.remedy
        prepared_copy(cache, task)
    for task in ("chartqa", "docvqa_val"):
        assert one(task).ok
        assert one(task).detail.startswith("4 documents of lmms-lab-encoder/")
    assert one("nextqa_mc_test").detail.endswith("0 of 2 videos, the first missing is '0'")
    write_clips(*(tmp_path / "home/nextqa/NExTVideo" / f"{i}.mp4" for i in range(2)))
    assert one("nextqa_mc_test").ok


def test_packages_are_found_without_running_the_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def only(name: str) -> Any:
        return None if name in ("cv2", "decord") else object()

    monkeypatch.setattr(data_checks, "find_spec", only)
    assert missing_packages(upstream.upstream("longvideobench_val_v")) == ["decord"]
    assert missing_packages(upstream.upstream("videomme")) == ["cv2"]
    # nltk and pywsd are optional there
    assert missing_packages(upstream.upstream("nextqa_mc_test")) == []
    write_task(tmp_path, "videomme")
    found = one("videomme", tmp_path)
    assert found.ok is False
    assert "its code imports cv2, which is not installed" in found.detail
    assert found.remedy == "pip install opencv-python-headless"


def test_every_suite_is_checked_quickly() -> None:
    one("chartqa")  # imports lmms-eval
    begun = time.perf_counter()
    for name in suites.load_suites().suites:
        assert check(suites.suite(name))
    assert time.perf_counter() - begun < 10


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_task(tmp_path, "chartqa")
    assert cli.main(["doctor", "--tasks", "chartqa", "tiny_pope", "--data-root", str(tmp_path)]) == 0
    assert "embedded: generated on first use" in capsys.readouterr().out
    assert cli.main(["doctor", "--tasks", "chartqa", "pope", "--data-root", str(tmp_path)]) == 3
    assert "FAILED" in capsys.readouterr().out
    assert cli.main(["doctor", "--suite", "tiny"]) == 0
    capsys.readouterr()
    for arguments, wanted in (
        (["--data-root", str(tmp_path)], "doctor --data-root for which tasks?"),
        (["--suite", "tini"], "did you mean 'tiny'"),
        (["--tasks", "chartq"], "did you mean 'chartqa'"),
        (["--tasks", "chartqa", "--data-root", str(tmp_path / "no")], "is not a folder"),
    ):
        assert cli.main(["doctor", *arguments]) == 2
        err = capsys.readouterr().err
        assert wanted in err
        assert err.count("\n") == 1
