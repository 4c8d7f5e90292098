"""The benchmarks as a user runs them: by the command, with good and with bad data."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import pytest
from local_data import CLIPS, DOCUMENTS, SERVER, break_image, write_task

from visionselector_eval.harness import cli
from visionselector_eval.harness.store.run import load_run
from visionselector_eval.tasks.suites import suite

METHOD = ["--methods", "random", "--budgets", "0.2"]
# What an answer that can't be parsed counts as is drawn at random upstream (mmmu, nextqa), a table is never emptied
# (ocrbench), pairs are scored together (mme), questions in several forms (mmbench).
DELICATE = ["tiny_mmmu_val", "tiny_nextqa_mc_test", "tiny_ocrbench", "tiny_mme", "tiny_mmbench_en_dev_static"]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Any:
    """`run(*flags)`: exit code, standard output and standard error of a sweep into `tmp_path / "run"`."""

    def command(*flags: str) -> tuple[int, str, str]:
        capsys.readouterr()  # the bars that datasets draws while a test writes its data
        code = cli.main(["sweep", *METHOD, "--device", "cpu", "--output", str(tmp_path / "run"), *flags])
        return code, *capsys.readouterr()

    return command


# all mirrors, again and elsewhere ------------------------------------------------------------------------------------


def numbers(folder: Path) -> tuple[pd.DataFrame, pd.DataFrame]:
    """What two runs must share: scores of cells; answers, scores and tokens of documents."""
    frames = load_run(folder)
    place = ["task", "method", "budget", "seed"]
    documents = ["answer", "score", "kept_tokens", "total_tokens"]
    return (
        frames.cells.set_index(place)[["digest", "status", "score", "kept_tokens", "n_documents"]].sort_index(),
        frames.samples.set_index([*place, "subtask", "doc_id"])[documents].sort_index(),
    )


@pytest.fixture(scope="module")
def everything(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every mirror in one command."""
    folder = tmp_path_factory.mktemp("everything") / "run"
    flags = ["--suite", "tiny", "--limit", "4", "--device", "cpu", "--output", str(folder)]
    assert cli.main(["sweep", *METHOD, *flags]) == 0
    return folder


def test_every_mirror_runs_in_one_command(everything: Path) -> None:
    cells, samples = numbers(everything)
    assert set(cells.index.get_level_values("task")) == set(suite("tiny"))
    assert len(cells) == 2 * len(suite("tiny"))
    assert set(cells["status"]) == {"done"}
    assert cells["score"].notna().all()
    assert len(samples) == 4 * len(cells)


def test_the_same_again(everything: Path, run: Any, tmp_path: Path) -> None:
    assert run("--tasks", *DELICATE, "--limit", "4")[0] == 0
    for here, there in zip(numbers(tmp_path / "run"), numbers(everything), strict=True):
        pd.testing.assert_frame_equal(here, there[there.index.get_level_values("task").isin(DELICATE)])


@pytest.fixture
def _own_cluster(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    ray = pytest.importorskip("ray", reason="the ray extra is optional")
    monkeypatch.setenv("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    yield
    ray.shutdown()


@pytest.mark.usefixtures("_own_cluster")
def test_the_same_on_two_workers(everything: Path, run: Any, tmp_path: Path) -> None:
    """In other processes, in another order, for every mirror."""
    assert run("--suite", "tiny", "--limit", "4", "--engine", "ray", "--workers", "2")[0] == 0
    for here, there in zip(numbers(tmp_path / "run"), numbers(everything), strict=True):
        pd.testing.assert_frame_equal(here, there)


# bad data ------------------------------------------------------------------------------------------------------------


def chart(root: Path, **changes: Any) -> Path:
    rows = [{k: v for k, v in {**row, **changes}.items() if v is not None} for row in DOCUMENTS["chartqa"][1]]
    return write_task(root, "chartqa", rows)


@pytest.mark.parametrize(
    ("what", "said"),
    [
        ("column", r"task chartqa: .* lacks the column question \(it has type, answer, image\)"),
        ("empty", r"task chartqa has no documents: .*test\.parquet \(parquet\) is empty"),
        ("odd", r"limit 3 for mme: its documents are scored in groups of 2, try 4"),
        ("choice", r"invalid on_bad_document 'maybe' in the spec: expected 'fail' or 'skip'"),
    ],
)
def test_what_can_not_be_run_is_one_line(what: str, said: str, run: Any, tmp_path: Path) -> None:
    root, flags = tmp_path / "root", ["--tasks", "chartqa"]
    if what == "column":
        chart(root, question=None)
    elif what == "empty":
        file = chart(root)
        pq.write_table(pq.read_table(file)[:0], file)
    elif what == "odd":
        write_task(root, "mme")
        flags = ["--tasks", "mme", "--limit", "3"]
    else:
        chart(root)
        flags += ["--on-bad-document", "maybe"]
    code, out, err = run("--data-root", str(root), *flags)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert re.search(said, err), err


def bad(root: Path, what: str) -> tuple[str, list[int], str]:
    """A task with documents that can't be read; its name, their numbers, and what is said of the first."""
    if what == "image":
        break_image(chart(root), 1)
        return "chartqa", [1], "its media cannot be read (cannot identify image file)"
    write_task(root, "videomme")
    (root / CLIPS["videomme"][1]).unlink()
    return "videomme", [2, 3], "its media cannot be read (video 'clip1' is neither in "


@pytest.mark.parametrize("what", ["image", "video"])
def test_a_bad_document_fails_its_cells_by_name(what: str, run: Any, tmp_path: Path) -> None:
    """The reason is in the table; cells of other tasks are finished."""
    task, numbers_, said = bad(tmp_path / "root", what)
    write_task(tmp_path / "root", "pope")
    code, out, err = run("--data-root", str(tmp_path / "root"), "--tasks", task, "pope")
    assert code == 3
    reason = f"document {numbers_[0]} of {task}: {said}"
    for method in ("full, 100%", "random, 20%"):
        assert f"failed: tiny, {method}, {task}, seed 0: {reason}" in out
    assert reason in err
    cells = load_run(tmp_path / "run").cells.set_index("task")
    assert set(cells.loc["pope", "status"]) == {"done"}
    assert set(cells.loc[task, "status"]) == {"failed"}
    # Choosing otherwise needs nothing else.
    code, out, _ = run("--data-root", str(tmp_path / "root"), "--tasks", task, "--on-bad-document", "skip")
    assert (code, "failed" in out) == (0, False)


@pytest.mark.parametrize("what", ["image", "video"])
def test_a_skipped_document_is_counted(what: str, run: Any, tmp_path: Path) -> None:
    task, numbers_, said = bad(tmp_path / "root", what)
    code, out, _ = run("--data-root", str(tmp_path / "root"), "--tasks", task, "--on-bad-document", "skip")
    assert code == 0
    some = f"{len(numbers_)} document{'s' if len(numbers_) > 1 else ''}"
    line = f"skipped: tiny, {task}: {some} could not be read, counted as unanswered"
    assert line in out
    for name in ("leaderboard.md", "leaderboard.html"):
        assert line in (tmp_path / "run" / name).read_text()
    cells, samples = load_run(tmp_path / "run")
    assert set(cells["n_skipped"]) == {len(numbers_)}
    assert set(cells["n_documents"]) == {4}
    for _, own in samples.groupby("cell"):
        reasons = own.set_index("doc_id")["skipped"]
        assert list(reasons[reasons != ""].index) == numbers_
        assert all(f"document {i} of {task}: {said}" in reasons[i] for i in numbers_)
        assert set(own.set_index("doc_id").loc[numbers_, "answer"]) == {""}


def test_a_server_scored_task_says_so(run: Any, tmp_path: Path) -> None:
    """Exit code 0: everything that can be done here was done."""
    for task in SERVER:
        write_task(tmp_path / "root", task)
    code, out, err = run("--data-root", str(tmp_path / "root"), "--tasks", *SERVER)
    assert code == 0, err
    assert out.count("needs submission") >= 2 * len(SERVER)
    cells = load_run(tmp_path / "run").cells
    assert cells["needs_submission"].all()
    assert cells["score"].isna().all()
    for digest in cells["digest"]:
        assert [f for f in (tmp_path / "run" / "cells" / digest / "submissions").rglob("*") if f.is_file()]
