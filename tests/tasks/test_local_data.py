"""`--data-root`: the real task names on local files, with upstream's prompts and metrics."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet
import pytest
from chat import media_of
from local_data import CLIPS, DOCUMENTS, PICTURE, SERVER, SPLITS, dataset, write_clips, write_mvbench, write_task
from sweeps import records, sweep

from visionselector_eval.baselines.contract.errors import InputError
from visionselector_eval.harness import cli
from visionselector_eval.tasks import (
    binding,
    scoring,
)
from visionselector_eval.tasks.local import hashing, layout, upstream
from visionselector_eval.tasks.local.layout import locate
from visionselector_eval.tasks.suites import load_suites

SWEPT = [name for name, entry in load_suites().tasks.items() if entry.mirror_of is None]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data root with every task; tests only read it."""
    folder = tmp_path_factory.mktemp("root")
    for task in (*DOCUMENTS, *SERVER):
        write_task(folder, task)
    write_mvbench(folder)
    return folder


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path_factory.mktemp("cache")))


def chart(root: Path, **changes: Any) -> Path:
    """A data root's chartqa with columns replaced, or left out where the new value is None."""
    rows = [{k: v for k, v in {**row, **changes}.items() if v is not None} for row in DOCUMENTS["chartqa"][1]]
    return write_task(root, "chartqa", rows)


def test_real_names_run_in_a_sweep(root: Path, tmp_path: Path) -> None:
    """Every real task that a suite can name, the group mvbench and those for a server among them."""
    run, result = sweep(
        tmp_path / "run",
        methods=["uniform"],
        budgets=[0.5],
        tasks=SWEPT,
        limit=2,
        data_root=str(root),
        generation={"max_new_tokens": 2},
    )
    assert result.failed == {}
    assert len(result.done) == 2 * len(SWEPT)
    found = records(run.folder)
    assert {record["task"] for record in found.values()} == set(SWEPT)
    assert all(
        record["n_documents"] == (40 if record["task"] == "mvbench" else 2) and record["total_tokens"] > 0
        for record in found.values()
    )
    # The place of the data changes nothing: another copy of the same folder finds every cell done.
    copy = shutil.copytree(root, tmp_path / "elsewhere")
    assert str(root) not in json.dumps([record["settings"] for record in found.values()])
    _, again = sweep(
        tmp_path / "run",
        methods=["uniform"],
        budgets=[0.5],
        tasks=SWEPT,
        limit=2,
        data_root=str(copy),
        generation={"max_new_tokens": 2},
    )
    assert (len(again.before), again.done, again.failed) == (2 * len(SWEPT), [], {})


@pytest.mark.parametrize("task", sorted(DOCUMENTS))
def test_known_columns_are_those_that_upstream_reads(root: Path, task: str) -> None:
    class Watched(dict):  # type: ignore[type-arg]
        def __getitem__(self, key: str) -> Any:
            read.add(key)
            return super().__getitem__(key)

    bound = binding.bind(task, data_root=root)
    (upstream_task,) = bound.tasks.values()
    read: set[str] = set()
    doc = Watched(upstream_task.eval_docs[0])
    upstream_task.doc_to_text(doc)
    upstream_task.doc_to_visual(doc)
    upstream_task.process_results(doc, ["A"])
    known = upstream.upstream(task).columns
    assert known
    assert read - {f"image_{k}" for k in range(2, 8)} <= set(known) | {"ocr_tokens", "C", "D"}
    assert set(known) - {"answer", "options", "A", "B"} <= read


def test_scores_are_upstreams(root: Path) -> None:
    bound = binding.bind("chartqa", data_root=root)
    answers = {name: {i: str(i) for i in range(4)} for name in bound.tasks}
    assert scoring.score(bound, answers).score == 1
    plain = binding.requests(bound)[0]
    assert plain.context.endswith("Answer the question with a single word.")
    assert media_of(plain, "image")[0].size == PICTURE.size


def test_several_images_of_one_document(root: Path) -> None:
    bound = binding.bind("seedbench", data_root=root)
    assert len(media_of(binding.requests(bound)[0], "image")) == 2


@pytest.mark.parametrize("layout", ["shards", "clone", "dict", "split", "alone", "folder", "csv"])
def test_layouts(layout: str, tmp_path: Path) -> None:
    rows = dataset(DOCUMENTS["chartqa"][1])
    place = tmp_path / "chartqa"
    place.mkdir()
    if layout == "shards":
        for number in range(2):
            rows.shard(2, number, contiguous=True).to_parquet(place / f"test-0000{number}-of-00002.parquet")
    elif layout == "clone":
        (place / "data").mkdir()
        rows.to_parquet(place / "data" / "test-00000-of-00001.parquet")
    elif layout == "dict":
        datasets.DatasetDict({"test": rows, "train": rows}).save_to_disk(place)
    elif layout == "split":
        rows.save_to_disk(place / "test")
    elif layout == "alone":
        rows.save_to_disk(place)
    else:
        folder = place / "test"
        (folder / "images").mkdir(parents=True)
        lines = []
        for number, row in enumerate(DOCUMENTS["chartqa"][1]):
            row["image"].save(folder / "images" / f"{number}.png")
            lines.append({"file_name": f"images/{number}.png", **{k: v for k, v in row.items() if k != "image"}})
        if layout == "csv":
            text = "file_name,type,question,answer\n" + "".join(",".join(line.values()) + "\n" for line in lines)
            (folder / "metadata.csv").write_text(text)
        else:
            (folder / "metadata.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (found,) = locate(tmp_path, "chartqa")
    assert found.local.n_documents() == 4
    assert found.local.column("question") == ["What is written?"] * 4
    bound = binding.bind("chartqa", data_root=tmp_path)
    documents = binding.requests(bound)
    assert [str(bound.tasks["chartqa"].eval_docs[i]["answer"]) for i in range(4)] == list("0123")
    assert media_of(documents[3], "image")[0].size == PICTURE.size


@pytest.mark.parametrize("task", ["mmmu_val", "seedbench"])
def test_an_image_folder_with_several_images(task: str, tmp_path: Path) -> None:
    folder = tmp_path / task / SPLITS[task]
    folder.mkdir(parents=True)
    PICTURE.save(folder / "a.png")
    PICTURE.resize((84, 56)).save(folder / "b.png")
    lines = []
    for row in DOCUMENTS[task][1]:
        line = {k: v for k, v in row.items() if not k.startswith("image")}
        if task == "seedbench":
            line["image_file_names"] = ["a.png", "b.png"]
        else:
            line |= {f"image_{k}_file_name": {1: "a.png", 2: "b.png"}.get(k) for k in range(1, 8)}
            line["question"] = "Which? <image 1> <image 2>"
        lines.append(json.dumps(line) + "\n")
    (folder / "metadata.jsonl").write_text("".join(lines))
    bound = binding.bind(task, data_root=tmp_path)
    images = media_of(binding.requests(bound)[0], "image")
    assert [p.size for p in images] == [(56, 56), (84, 56)]


def test_the_order_of_layouts(tmp_path: Path) -> None:
    write_task(tmp_path, "chartqa")
    datasets.DatasetDict({"test": dataset(DOCUMENTS["chartqa"][1][:1])}).save_to_disk(tmp_path / "chartqa")
    assert binding.bind("chartqa", data_root=tmp_path).n_documents == 4
    (tmp_path / "chartqa" / "test.parquet").unlink()
    assert binding.bind("chartqa", data_root=tmp_path).n_documents == 1


@pytest.mark.parametrize("kind", ["struct", "bytes"])
def test_images_of_other_writers(kind: str, tmp_path: Path) -> None:
    file = chart(tmp_path)
    table = pyarrow.parquet.read_table(file).replace_schema_metadata(None)  # as pandas or polars leave it
    if kind == "bytes":
        images = [value["bytes"] for value in table["image"].to_pylist()]
        table = table.drop_columns("image").append_column("image", pa.array(images))
    pyarrow.parquet.write_table(table, file)
    bound = binding.bind("chartqa", data_root=tmp_path)
    assert media_of(binding.requests(bound)[0], "image")[0].size == PICTURE.size


def test_a_group_has_data_of_each_member(tmp_path: Path) -> None:
    names = [of.task for of in upstream.members("mvbench")]
    assert len(names) == 20
    rows = DOCUMENTS["mvbench_moving_direction"][1]
    for name in names:
        (tmp_path / name).mkdir()
        dataset(rows).to_parquet(tmp_path / name / "train.parquet")
    # Two sub folders hold other clips of the same name: each subtask takes its own.
    write_clips(*(tmp_path / "mvbench/videos/clevrer/video_validation" / f"video_{i}.mp4" for i in range(4)))
    shutil.copytree(tmp_path / "mvbench/videos/clevrer", tmp_path / "mvbench/videos/perception")
    (tmp_path / "mvbench/videos/perception/video_validation").rename(tmp_path / "mvbench/videos/perception/videos")
    with (tmp_path / "mvbench/videos/perception/videos/video_0.mp4").open("ab") as clip:
        clip.write(b"\0" * 8)
    with pytest.raises(InputError, match=r"task mvbench_.*: video video_0\.mp4 is ambiguous: .* differ"):
        binding.bind("mvbench", data_root=tmp_path)
    for name in names:
        if not any(
            x in name
            for x in ("moving", "counterfactual", "_existence", "_shuffle", "character", "state", "action_count")
        ):
            shutil.copytree(tmp_path / "mvbench/videos/clevrer/video_validation", tmp_path / name / "videos")
    bound = binding.bind("mvbench", data_root=tmp_path, limit=1)
    assert list(bound.tasks) == names
    asked = {request.task: media_of(request, "video")[0] for request in binding.requests(bound)}
    assert "clevrer" in asked["mvbench_moving_count"]
    assert "perception" in asked["mvbench_state_change"]
    shutil.rmtree(tmp_path / "mvbench_scene_transition")
    with pytest.raises(InputError, match=r"task mvbench_scene_transition: no data below .*train\.parquet"):
        binding.bind("mvbench", data_root=tmp_path)


def test_the_hash_is_about_contents(tmp_path: Path) -> None:
    def hash_of(task: str, folder: Path) -> str:
        return hashing.content_hash(layout.locate(folder, task))

    chart(tmp_path / "a")
    first = hash_of("chartqa", tmp_path / "a")
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    assert hash_of("chartqa", tmp_path / "b") == first
    chart(tmp_path / "b", answer="another")
    assert hash_of("chartqa", tmp_path / "b") != first
    write_task(tmp_path, "videomme")
    whole = hash_of("videomme", tmp_path)
    clip = tmp_path / CLIPS["videomme"][0]
    clip.rename(tmp_path / "videomme/videos/clip0.mp4")
    assert hash_of("videomme", tmp_path) == whole
    (tmp_path / "videomme/videos/clip0.mp4").unlink()
    assert hash_of("videomme", tmp_path) != whole


def test_big_files_are_hashed_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hashing, "_BIG", 64)
    monkeypatch.setattr(hashing, "_MIB", 64)
    file = chart(tmp_path)
    first = hashing.content_hash(layout.locate(tmp_path, "chartqa"))
    chart(tmp_path, answer="9")
    assert hashing.content_hash(layout.locate(tmp_path, "chartqa")) != first
    assert file.stat().st_size > 64


def test_a_missing_video_is_the_documents(tmp_path: Path) -> None:
    write_task(tmp_path, "videomme")
    (tmp_path / CLIPS["videomme"][1]).unlink()
    asked = binding.requests(binding.bind("videomme", data_root=tmp_path))
    assert media_of(asked[0], "video") == [str(tmp_path / CLIPS["videomme"][0])]
    with pytest.raises(binding.DocumentError, match=r"document 2 of videomme: .*'clip1' is neither in .*/videos") as e:
        asked[2].messages()
    assert "\n" not in str(e.value)


def bad_root(root: Path, what: str) -> str:
    """Spoil a data root; returns what the one line must say."""
    place = root / "chartqa"
    if what == "no folder":
        return r"data root '.*' is not a folder"
    root.mkdir()
    if what == "nothing":
        return r"task chartqa: no data below .*chartqa/test\.parquet.*test-\*\.parquet.*state\.json.*metadata\.jsonl"
    file = chart(root)
    if what == "no column":
        chart(root, question=None)
        return r"chartqa: .*test\.parquet \(parquet\) lacks the column question \(it has type, answer, image\)"
    if what == "no image column":
        chart(root, image="red.png")
        return r"column image of .* holds string, not images"
    if what == "empty":
        pyarrow.parquet.write_table(pyarrow.parquet.read_table(file)[:0], file)
        return r"task chartqa has no documents: .*test\.parquet"
    if what == "corrupt":
        file.write_bytes(file.read_bytes()[:200])
        return r"task chartqa: cannot read .*test\.parquet.*: copy or fetch it again"
    if what == "corrupt inside":
        blob = bytearray(file.read_bytes())
        blob[4:400] = bytes(396)
        file.write_bytes(bytes(blob))
        return r"task chartqa: cannot load the given data"
    if what == "lost shard":
        file.rename(place / "test-00001-of-00002.parquet")
        return r"chartqa: shard 0 of 2 is missing in .*chartqa"
    file.unlink()
    if what == "wrong split":
        dataset(DOCUMENTS["chartqa"][1]).to_parquet(place / "train.parquet")
        return r"task chartqa: no data below"
    if what == "damaged state":
        (place / "state.json").write_text("{")
        return r"chartqa: .*state\.json is damaged"
    (place / "metadata.jsonl").write_text('{"file_name": "0.png"')
    if what == "damaged metadata":
        return r"task chartqa: cannot read .*metadata\.jsonl"
    row = {"file_name": "0.png", "type": "human_test", "question": "?", "answer": "x"}
    (place / "metadata.jsonl").write_text(json.dumps(row) + "\n")
    assert what == "lost image"
    return r"chartqa: (.*line 1: no file .*0\.png|cannot load the given data .*0\.png)"


@pytest.mark.parametrize(
    "what",
    [
        "no folder", "nothing", "no column", "no image column", "empty", "corrupt", "corrupt inside", "lost shard",
        "wrong split", "damaged state", "damaged metadata", "lost image",
    ],
)  # fmt: skip
def test_bad_data_are_one_line(what: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    root = tmp_path / "root"
    wanted = bad_root(root, what)
    with pytest.raises(InputError, match=wanted) as raised:
        binding.bind("chartqa", data_root=root)
    assert "\n" not in str(raised.value)
    if what in ("nothing", "no folder"):
        arguments = ["--tasks", "chartqa", "--data-root", str(root), "--output", str(tmp_path / "run")]
        assert cli.main(["sweep", "--methods", "uniform", *arguments]) == 2
        err = capsys.readouterr().err
        assert err.count("\n") == 1
        assert "chartqa" in err or what == "no folder"


def test_one_bad_task_of_several_fails_alone(root: Path, tmp_path: Path) -> None:
    own = tmp_path / "root"
    write_task(own, "pope")
    run, result = sweep(
        tmp_path / "run", methods=["uniform"], budgets=[0.5], tasks=["chartqa", "pope"], limit=2, data_root=str(own)
    )
    assert len(result.done) == 2
    assert len(result.failed) == 2
    assert all(reason.startswith("task chartqa: no data below") for reason in result.failed.values())
    # Once the data are there the same command does the rest.
    write_task(own, "chartqa")
    _, result = sweep(
        run.folder, methods=["uniform"], budgets=[0.5], tasks=["chartqa", "pope"], limit=2, data_root=str(own)
    )
    assert (len(result.before), len(result.done), result.failed) == (2, 2, {})


def test_a_data_root_for_embedded_tasks_only_is_a_mistake(root: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"data_root .* is for real tasks, and tiny is embedded"):
        sweep(tmp_path / "run", tasks=[], data_root=str(root))
    # Beside real ones a mirror runs as ever.
    bound = binding.bind("tiny_pope", data_root=root)
    assert bound.data_hash == binding.bind("tiny_pope").data_hash


def test_a_guessed_headline_is_told_noted_and_replaced(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """MMVP defines the accuracy of its documents and that of its pairs, and none as its aggregate."""
    rows = [
        {"Index": i + 1, "Question": "?", "Options": "(a) x (b) y", "Correct Answer": "(a)", "image": PICTURE}
        for i in range(4)
    ]
    root = tmp_path / "data"
    (root / "mmvp").mkdir(parents=True)
    dataset(rows).to_parquet(root / "mmvp" / "train.parquet")
    settings = {"methods": ["uniform"], "budgets": [0.5], "tasks": ["mmvp"], "data_root": str(root)}
    settings["generation"] = {"max_new_tokens": 2}
    run, result = sweep(tmp_path / "run", **settings)
    assert result.failed == {}
    note = "headline mmvp_accuracy is a guess, as plausible: mmvp_pair_accuracy"
    assert f"mmvp: {note}; choose with --metric mmvp=NAME" in caplog.text
    assert {(r["metric"], r["metric_note"]) for r in records(run.folder).values()} == {("mmvp_accuracy,none", note)}
    caplog.clear()
    run, result = sweep(tmp_path / "chosen", **settings, metric={"mmvp": "mmvp_pair_accuracy"})
    assert "guess" not in caplog.text
    assert {(r["metric"], r["metric_note"]) for r in records(run.folder).values()} == {("mmvp_pair_accuracy,none", "")}
    assert cli.main(["tasks", "check", "--tasks", "mmvp", "mmstar"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"mmvp: {note}",
        "1 of 2 tasks have a headline metric that is a guess",
    ]


def test_layout_names_what_is_wanted() -> None:
    text = layout.layout("videomme", "/d")
    for part in ("/d/videomme/test.parquet", "lmms-eval/Video-MME", "videoID", "/d/videomme/videos/"):
        assert part in text
    assert layout.layout("mvbench", "/d").count("split train of OpenGVLab/MVBench") == 20
    assert "lmms-eval looks for them" in layout.layout("longvideobench_val_i")
    for task, split in SPLITS.items():
        assert upstream.upstream(task).split == split


def test_names_that_have_no_folder() -> None:
    with pytest.raises(InputError, match="unknown task 'chartq': did you mean 'chartqa'"):
        upstream.members("chartq")


def test_an_override_for_the_stock_loader(root: Path) -> None:
    bound = binding.bind("chartqa", override=layout.locate(root, "chartqa")[0].override())
    assert bound.n_documents == 4
