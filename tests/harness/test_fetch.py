"""`tasks fetch`, `tasks layout`: what is downloaded is what `--data-root` reads. The hub is a stand-in."""

from __future__ import annotations

import io
import shutil
import tarfile
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import datasets
import pytest
from chat import media_of
from local_data import DOCUMENTS, PICTURE, dataset, write_clips, write_task

from visionselector_eval.baselines.contract.errors import InputError
from visionselector_eval.harness import cli
from visionselector_eval.tasks import (
    binding,
)
from visionselector_eval.tasks.local import fetch, upstream

# Where the stand-in's repositories keep their clips: what is a folder here is an archive there.
REPOSITORIES = {
    "lmms-eval/Video-MME": ["videos_chunked_01.zip/data/clip0.mp4", "videos_chunked_02.zip/data/clip1.mp4"],
    "lmms-eval/NExTQA": ["videos.tar.part.aa/NExTVideo/0.mp4", "videos.tar.part.aa/NExTVideo/1.mp4"],
    "OpenGVLab/MVBench": [f"video/clevrer/video_validation/video_{i}.mp4" for i in range(4)],
}


class FakeHub(fetch.Hub):
    """Data sets of a few documents; remembers what it was asked."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.asked: list[tuple[Any, ...]] = []

    def dataset(self, path: str, name: str | None, split: str, **settings: Any) -> datasets.Dataset:
        self.asked.append((path, name, split, settings))
        if name == "testdev_balanced_images":
            images = [PICTURE.resize((56 + 28 * i, 56)) for i in range(3)]
            return dataset([{"id": f"p{i}", "image": p} for i, p in enumerate(images)])
        if name == "testdev_balanced_instructions":
            return dataset([{"imageId": f"p{i}", "question": "Which?", "answer": "dog"} for i in (2, 0, 2, 1)])
        for task, (own, rows) in DOCUMENTS.items():
            of = upstream.upstream(task)
            if (of.dataset_path, of.dataset_name, own) == (path, name, split):
                return dataset(rows)
        raise FileNotFoundError(f"Dataset '{path}' doesn't exist on the Hub or cannot be accessed.")

    def files(self, path: str, revision: str | None, patterns: Sequence[str]) -> Path:
        self.asked.append((path, revision, tuple(patterns)))
        place = self.folder / path.replace("/", "--")
        if not place.exists():
            place.mkdir(parents=True)
            for file in REPOSITORIES[path]:
                write_clips(place / file)
            for packed in sorted({p for p in place.iterdir() if p.suffix == ".zip" or ".tar" in p.name}):
                _pack(packed)
        return place


def _pack(folder: Path) -> None:
    """Turn a folder named as an archive into that archive; a tar archive into two parts."""
    content = folder.rename(folder.with_name("content"))
    if folder.suffix == ".zip":
        with zipfile.ZipFile(folder, "w") as archive:
            for file in sorted(content.rglob("*.mp4")):
                archive.write(file, file.relative_to(content))
    else:
        blob = io.BytesIO()
        with tarfile.open(fileobj=blob, mode="w") as archive:
            archive.add(content, ".")
        half = len(blob.getvalue()) // 2
        folder.write_bytes(blob.getvalue()[:half])
        folder.with_name(folder.name[:-1] + "b").write_bytes(blob.getvalue()[half:])
    shutil.rmtree(content)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> FakeHub:
    monkeypatch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path / "cache"))
    fake = FakeHub(tmp_path / "hub")
    monkeypatch.setattr(fetch, "Hub", lambda: fake)
    return fake


def states(results: list[fetch.Fetched]) -> dict[str, str]:
    return {result.task: result.state for result in results}


def test_what_is_fetched_is_what_data_root_reads(hub: FakeHub, tmp_path: Path) -> None:
    root = tmp_path / "root"
    said: list[str] = []
    results = fetch.fetch(["chartqa", "docvqa_val", "seedbench", "tiny_pope"], root, say=said.append)
    assert states(results) == {
        "tiny_pope": "embedded", "chartqa": "fetched", "docvqa_val": "fetched", "seedbench": "fetched"
    }  # fmt: skip
    assert ("lmms-lab-encoder/DocVQA", "DocVQA", "validation", {}) in hub.asked  # no token, no loader settings
    assert "[2/3] docvqa_val" in said
    bound = binding.bind("chartqa", data_root=root)
    assert bound.n_documents == 4
    assert media_of(binding.requests(bound)[0], "image")[0].size == PICTURE.size
    assert len(media_of(binding.requests(binding.bind("seedbench", data_root=root))[0], "image")) == 2
    assert not list(root.rglob(".*"))
    # Again: nothing is asked of the hub.
    hub.asked.clear()
    again = fetch.fetch(["chartqa", "docvqa_val", "seedbench"], root)
    assert set(states(again).values()) == {"there"}
    assert hub.asked == []


@pytest.mark.parametrize("task", ["videomme", "nextqa_mc_test", "mvbench_moving_direction"])
def test_videos_are_unpacked(task: str, hub: FakeHub, tmp_path: Path) -> None:
    pytest.importorskip("cv2") if task == "videomme" else None
    results = fetch.fetch([task], tmp_path / "root")
    assert states(results) == {task: "fetched"}, results
    for request in binding.requests(binding.bind(task, data_root=tmp_path / "root")):
        assert Path(media_of(request, "video")[0]).stat().st_size > 0
    of = upstream.upstream(task)
    assert next(a for a in hub.asked if len(a) == 3)[:2] == (of.dataset_path, of.kwargs.get("revision"))
    assert not list((tmp_path / "root").rglob(".*"))
    hub.asked.clear()
    assert states(fetch.fetch([task], tmp_path / "root")) == {task: "there"}
    assert hub.asked == []


def test_an_interrupted_fetch_goes_on(hub: FakeHub, tmp_path: Path) -> None:
    root = tmp_path / "root"
    fetch.fetch(["videomme"], root)
    videos = root / "videomme/videos"
    (videos / "videos_chunked_02").rename(videos / ".unpacking-videos_chunked_02")  # killed while it unpacked
    (root / "videomme/.fetching-test").mkdir()
    hub.asked.clear()
    assert states(fetch.fetch(["videomme"], root)) == {"videomme": "fetched"}
    assert [len(a) for a in hub.asked] == [3]  # the videos alone
    assert (videos / "videos_chunked_02/data/clip1.mp4").is_file()


def test_big_data_are_written_in_shards(hub: FakeHub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fetch, "SHARD_BYTES", 1)
    monkeypatch.setattr(fetch, "_ROWS", 2)
    fetch.fetch(["chartqa"], tmp_path)
    names = sorted(p.name for p in (tmp_path / "chartqa").glob("*.parquet"))
    assert names == ["test-00000-of-00002.parquet", "test-00001-of-00002.parquet"]
    bound = binding.bind("chartqa", data_root=tmp_path)
    assert [bound.tasks["chartqa"].eval_docs[i]["answer"] for i in range(4)] == list("0123")


def test_images_are_joined_as_upstream_does(hub: FakeHub, tmp_path: Path) -> None:
    fetch.fetch(["gqa"], tmp_path)
    widths = [media_of(r, "image")[0].width for r in binding.requests(binding.bind("gqa", data_root=tmp_path))]
    assert widths == [112, 56, 112, 84]


def test_images_in_files_of_a_cache_are_taken_along(hub: FakeHub, tmp_path: Path) -> None:
    image = tmp_path / "elsewhere.png"
    PICTURE.save(image)
    rows = datasets.Dataset.from_list([{**DOCUMENTS["chartqa"][1][0], "image": str(image)}])
    hub.dataset = lambda *_, **__: rows.cast_column("image", datasets.Image())  # type: ignore[method-assign]
    fetch.fetch(["chartqa"], tmp_path / "root")
    image.unlink()
    asked = binding.requests(binding.bind("chartqa", data_root=tmp_path / "root"))
    assert media_of(asked[0], "image")[0].size == PICTURE.size


def test_one_failed_task_does_not_stop_the_others(
    hub: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    REPOSITORIES_without_one = {**REPOSITORIES, "lmms-eval/Video-MME": ["videos_chunked_01.zip/data/clip0.mp4"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "REPOSITORIES", REPOSITORIES_without_one)
        arguments = ["--tasks", "ai2d", "videomme", "pope", "--data-root", str(tmp_path / "root")]
        assert cli.main(["tasks", "fetch", *arguments]) == 3
    out = capsys.readouterr().out
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert "failed" in lines["ai2d"]
    assert "doesn't exist on the Hub" in lines["ai2d"]
    assert "1 of 2 videos are not in lmms-eval/Video-MME, the first is 'clip1': put them into" in lines["videomme"]
    assert "fetched" in lines["pope"]


def test_a_damaged_archive(hub: FakeHub, tmp_path: Path) -> None:
    place = hub.files("lmms-eval/NExTQA", None, ())
    for part in place.glob("*.tar*"):
        part.write_bytes(b"no archive")
    (result,) = fetch.fetch(["nextqa_mc_test"], tmp_path / "root")
    assert result.state == "failed"
    assert "is damaged" in result.detail


@pytest.mark.parametrize(
    "error",
    [
        ConnectionError("Couldn't reach 'lmms-lab-encoder/ChartQA' on the Hub (ConnectTimeout)"),
        type("ConnectError", (Exception,), {"__module__": "httpx"})("no route"),
    ],
)
def test_without_a_hub_the_layout_is_printed(
    error: Exception, hub: FakeHub, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def unreachable(*_: Any, **__: Any) -> Any:
        raise error

    hub.dataset = unreachable  # type: ignore[method-assign]
    write_task(tmp_path, "pope")
    arguments = ["--tasks", "pope", "chartqa", "videomme", "--data-root", str(tmp_path)]
    assert cli.main(["tasks", "fetch", *arguments]) == 2
    shown = capsys.readouterr()
    assert f"{tmp_path}/chartqa/test.parquet" in shown.out
    assert f"{tmp_path}/videomme/videos/" in shown.out
    assert f"{tmp_path}/pope" not in shown.out  # that is there
    last = shown.err.splitlines()[-1]
    assert "the hub can't be reached" in last
    assert "layout for 2 tasks" in last


def test_offline_is_unreachable(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tasks", "fetch", "--tasks", "chartqa", "--data-root", str(tmp_path)]) == 2
    assert "can't be reached" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["fech"], "unknown action of tasks 'fech': did you mean 'fetch'?"),
        (["fetch"], "tasks fetch which? give --suite or --tasks"),
        (["fetch", "--tasks", "chartqa"], "tasks fetch where to? give --data-root"),
        (["layout", "--suite", "visionselector12"], "did you mean 'visionselector13'"),
        (["layout", "--tasks", "chartq"], "did you mean 'chartqa'"),
        (["list", "--suite", "tiny"], "tasks list takes no flags"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], wanted: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tasks", *arguments]) == 2
    err = capsys.readouterr().err
    assert wanted in err
    assert err.count("\n") == 1


def test_a_root_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"data root .* can't be made"):
        fetch.fetch(["chartqa"], tmp_path / "file")


def test_list_and_layout(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["tasks", "list"]) == 0
    listed = capsys.readouterr().out
    assert cli.main(["list", "tasks"]) == 0
    assert capsys.readouterr().out == listed
    assert cli.main(["tasks", "layout", "--suite", "visionselector13"]) == 0
    text = capsys.readouterr().out
    assert text.count("DATA_ROOT/mvbench_") >= 20
    assert "DATA_ROOT/docvqa_val/validation.parquet" in text
