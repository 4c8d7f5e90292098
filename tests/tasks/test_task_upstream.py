"""Real task names on four documents of the real layout: the same code path, with the data elsewhere."""

from __future__ import annotations

import io
import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets
import pytest
from chat import media_of
from PIL import Image, ImageFile

from visionselector_eval.baselines.contract.errors import InputError
from visionselector_eval.tasks import binding, lmms, scoring, suites
from visionselector_eval.tasks.local import upstream
from visionselector_eval.tasks.tiny import MIRRORS, generate, store

PICTURE = Image.new("RGB", (56, 56), "white")


def elsewhere(folder: Path, split: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    """An override that takes these rows as the data set."""
    folder.mkdir(exist_ok=True)
    features = None
    if any(isinstance(v, Image.Image) for row in rows for v in row.values()):
        plain = datasets.Dataset.from_list(
            [{k: v for k, v in r.items() if not isinstance(v, Image.Image)} for r in rows]
        )
        images = {k: datasets.Image() for row in rows for k, v in row.items() if isinstance(v, Image.Image)}
        features = datasets.Features({**plain.features, **images})
    file = folder / "data.parquet"
    datasets.Dataset.from_list(rows, features=features).to_parquet(file)
    return {
        "dataset_path": "parquet",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {split: str(file)}, "cache_dir": str(folder / "hf")},
    }


def reply(bound: binding.BoundTask, *texts: str) -> dict[str, dict[int, str]]:
    return {name: dict(enumerate(texts)) for name in bound.tasks}


@pytest.mark.parametrize("name", list(MIRRORS))
def test_real_names_on_documents_of_the_real_layout(name: str, tmp_path: Path) -> None:
    """The mirrors' documents under the real task's name: right answers have the maximum, wrong ones nothing."""
    mirror = MIRRORS[name]
    stored = store.ensure(name, n=8, seed=2, cache_dir=tmp_path)
    location = {
        "dataset_path": "parquet",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {mirror.split: str(stored.parquet)}, "cache_dir": str(tmp_path / "hf")},
    }
    joined = {k: v for k, v in mirror.changes.items() if k == "process_docs"}
    bound = binding.bind(mirror.upstream, override={**location, **joined})
    documents = generate(name, 2, 8)
    scale = suites.entry(name).scale
    assert scoring.score(bound, reply(bound, *(d.answer for d in documents))).score == scale
    assert scoring.score(bound, reply(bound, *(d.wrong for d in documents))).score == 0
    asked = binding.requests(bound)
    assert len(asked) == 8
    if mirror.media == "clip":  # upstream looks for videos in its own folder
        with pytest.raises(binding.DocumentError, match=r"does not exist|cannot be read"):
            asked[0].messages()
    else:
        assert len(media_of(asked[0], "image")) == len(documents[0].images())


@pytest.mark.parametrize("task", [n for n, e in suites.load_suites().tasks.items() if e.needs_submission])
def test_server_scored_tasks_write_a_submission(task: str, tmp_path: Path) -> None:
    row = {
        "question_id": 7,
        "question": "what?",
        "image": PICTURE,
        "index": 1,
        "answer": "nan",
        **dict.fromkeys("ABCD", "option"),
        **dict.fromkeys(("hint", "category", "L2-category", "source", "split"), "nan"),
    }
    if "mmbench" not in task:
        row = {k: row[k] for k in ("question_id", "question", "image")} | {"answers": None}
    bound = binding.bind(task, override=elsewhere(tmp_path, "test", [row] * 2))
    result = scoring.score(bound, reply(bound, "A", "B"), tmp_path / "out")
    assert (result.score, result.needs_submission, result.mean_of_documents) == (None, True, False)
    assert [(d.answer, d.score, d.target) for d in result.documents] == [("A", None, ""), ("B", None, "")]
    (file,) = result.submissions
    assert file.parent == tmp_path / "out" / "submissions"
    if file.suffix == ".json":
        assert [r["answer"].upper() for r in json.loads(file.read_text())] in (["A", "B"], ["", "B"])
    again = scoring.score(bound, reply(bound, "A", "B"), tmp_path / "out")
    assert len(again.submissions) == 1
    assert scoring.score(bound, reply(bound, "A", "B")).submissions == []
    assert not list(Path.cwd().glob("submissions"))


def test_ocrbench_is_a_mean_and_starts_afresh(tmp_path: Path) -> None:
    rows = [
        {"dataset": "IIIT5K", "question": "what?", "question_type": kind, "answer": [f"word{i}"], "image": PICTURE}
        for i, kind in enumerate(["Regular Text Recognition", "Doc-oriented VQA"] * 2)
    ]
    bound = binding.bind("ocrbench", override=elsewhere(tmp_path, "test", rows))
    for _ in range(2):
        assert scoring.score(bound, reply(bound, *(f"word{i}" for i in range(4)))).score == pytest.approx(1)
    half = scoring.score(bound, reply(bound, "word0", "word1", "-", "-"), tmp_path / "out")
    assert half.score == pytest.approx(0.5)
    assert half.mean_of_documents
    assert [p.name for p in half.submissions] == ["ocrbench_results.txt"]
    assert scoring.score(bound, reply(bound, "-", "-", "-", "-")).score == 0


def test_ai2d_reads_its_own_filter(tmp_path: Path) -> None:
    rows = [{"question": "which?", "options": list("wxyz"), "answer": str(i), "image": PICTURE} for i in range(4)]
    bound = binding.bind("ai2d_no_mask", override=elsewhere(tmp_path, "test", rows))
    result = scoring.score(bound, reply(bound, "A. w", "B", "C", "A"))
    assert (result.metric, result.score) == ("exact_match,flexible-extract", 0.75)
    assert [d.score for d in result.documents] == [1, 1, 1, 0]


def test_mmmu_fallbacks_repeat(tmp_path: Path) -> None:
    rows = [
        {
            "id": f"validation_Art_{i}",
            "question": "which? <image 1>",
            "options": str(list("wxyz")),
            "question_type": "multiple-choice",
            "answer": "ABCD"[i % 4],
            **{f"image_{k}": PICTURE if k == 1 else None for k in range(1, 8)},
        }
        for i in range(12)
    ]
    bound = binding.bind("mmmu_val", override=elsewhere(tmp_path, "validation", rows))
    right = scoring.score(bound, reply(bound, *(r["answer"] for r in rows)))
    assert (right.score, right.mean_of_documents) == (1, True)
    guesses = [scoring.score(bound, reply(bound, *["no idea"] * 12)) for _ in range(3)]
    assert guesses[0] == guesses[1] == guesses[2]
    assert guesses[0].mean_of_documents
    assert media_of(binding.requests(bound)[0], "image")


def test_mvbench_is_the_mean_of_its_subtasks(tmp_path: Path) -> None:
    rows = [{"video": f"{i}.mp4", "question": "?", "candidates": ["up", "down"], "answer": "up"} for i in range(3)]
    bound = binding.bind("mvbench", limit=2, override=elsewhere(tmp_path, "train", rows))
    assert len(bound.tasks) == 20
    assert bound.n_documents == 40
    given = {name: {0: "A", 1: "A" if i % 2 else "B"} for i, name in enumerate(bound.tasks)}
    result = scoring.score(bound, given)
    assert result.score == 75
    assert result.mean_of_documents
    assert result.metrics["mvbench_action_sequence/mvbench_accuracy,none"] in (50, 100)
    asked = binding.requests(bound)
    assert len(asked) == 40
    with pytest.raises(binding.DocumentError, match=r"its video .* does not exist"):
        asked[0].messages()


def test_seedbench_scores_come_from_predictions(tmp_path: Path) -> None:
    rows = [
        {
            "question": "?",
            **{f"choice_{c}": c for c in "abcd"},
            "answer": "B",
            "data_type": "image" if i == 3 else "video",
            "data_id": f"v{i // 2}",
            "question_id": str(i),
            "image": "not read by scoring",
        }
        for i in range(4)
    ]
    bound = binding.bind("seedbench", override=elsewhere(tmp_path, "test", rows))
    result = scoring.score(bound, reply(bound, "B", "A", "B", "A"))
    assert result.score == pytest.approx(2 / 3)
    assert result.metrics["seed_all,none"] == 0.5
    assert [d.score for d in result.documents] == [1, 0, 1, None]
    assert [d.cluster for d in result.documents] == ["v0", "v0", "v1", "v1"]


def test_nextqa_multiple_choice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nltk = pytest.importorskip("nltk")
    # Word lists of the open-ended tasks, which upstream's module fetches over the network whenever it is imported.
    monkeypatch.setattr(nltk, "download", lambda *_, **__: pytest.fail("word lists were fetched"))
    rows = [{"video": "1", "question": "why", **{f"a{k}": f"x{k}" for k in range(5)}, "answer": i} for i in range(4)]
    bound = binding.bind("nextqa_mc_test", override=elsewhere(tmp_path, "test", rows))
    result = scoring.score(bound, reply(bound, "A", "B.", "(C)", "A"))
    assert (result.score, result.mean_of_documents) == (0.75, True)
    with pytest.raises(binding.DocumentError, match="its media cannot be read"):
        binding.requests(bound)[0].messages()


def test_videomme_does_not_end_the_process(tmp_path: Path) -> None:
    pytest.importorskip("cv2")
    common = {
        "videoID": "abc",
        "question": "?",
        "options": ["A. x", "B. y"],
        "duration": "short",
        "domain": "Knowledge",
    }
    rows = [
        {**common, "answer": "A", "question_id": str(i), "sub_category": "Geography", "task_type": "OCR Problems"}
        for i in range(4)
    ]
    bound = binding.bind("videomme", override=elsewhere(tmp_path, "test", rows))
    result = scoring.score(bound, reply(bound, "A", "A", "A", "B"))
    assert (result.score, result.mean_of_documents) == (75, True)
    assert {d.cluster for d in result.documents} == {"abc"}
    with pytest.raises(binding.DocumentError, match=r"abc\.mp4 does not exist"):
        binding.requests(bound)[0].messages()


def test_mme_perception_only_and_undefined(tmp_path: Path) -> None:
    def rows(category: str) -> list[dict[str, Any]]:
        return [
            {"question_id": f"{category}/1", "question": "?", "answer": a, "category": category, "image": PICTURE}
            for a in ("Yes", "No")
        ]

    bound = binding.bind("mme", override=elsewhere(tmp_path, "test", rows("code_reasoning") + rows("count")))
    result = scoring.score(bound, reply(bound, "Yes", "No", "Yes", "No"))
    assert (result.score, result.metrics["mme_cognition_score,none"]) == (200, 200)
    assert [d.score for d in result.documents] == [None, None, 1, 1]
    only = binding.bind("mme", limit=2, override=elsewhere(tmp_path, "test", rows("code_reasoning") * 2))
    with pytest.raises(InputError, match="mme_perception_score,none has no value for these 2 documents"):
        scoring.score(only, reply(only, "Yes", "No"))


def test_mme_pairs_must_be_whole(tmp_path: Path) -> None:
    rows = [
        {"question_id": f"count/{i}", "question": "?", "answer": a, "category": "count", "image": PICTURE}
        for a in ("Yes", "No")
        for i in range(2)
    ]
    with pytest.raises(InputError, match=r"the first 2 there is 1 of 'count/0': take another limit"):
        binding.bind("mme", limit=2, override=elsewhere(tmp_path, "test", rows))
    whole = binding.bind("mme", override=elsewhere(tmp_path, "test", rows))
    assert scoring.score(whole, reply(whole, "Yes", "Yes", "No", "No")).score == 200
    with pytest.raises(InputError, match=r"its 3 there is 1 of 'count/1': its data are not complete"):
        binding.bind("mme", override=elsewhere(tmp_path, "test", rows[:3]))


def test_longvideobench_fallbacks_repeat(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "decord" not in sys.modules:
        monkeypatch.setitem(sys.modules, "decord", SimpleNamespace(VideoReader=None, cpu=None))
    rows = [
        {
            "id": str(i),
            "video_id": str(i),
            "video_path": f"{i}.mp4",
            "question": "?",
            **{f"option{k}": "xyz"[k] if k < 3 else "N/A" for k in range(5)},
            "correct_choice": i % 3,
            "duration_group": 15,
            "question_category": "S2E",
        }
        for i in range(12)
    ]
    bound = binding.bind("longvideobench_val_v", override=elsewhere(tmp_path, "validation", rows))
    right = scoring.score(bound, reply(bound, *("ABC"[i % 3] for i in range(12))))
    assert right.score == 1
    scores = []
    for seed in range(3):
        random.seed(seed)  # the caller's random state must not matter
        scores.append(scoring.score(bound, reply(bound, *["no idea"] * 12)))
    assert scores[0] == scores[1] == scores[2]
    with pytest.raises(binding.DocumentError, match="document 0 of longvideobench_val_v"):
        binding.requests(bound)[0].messages()


def _encoded(kind: str, size: int = 64) -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((size, size), 90).convert("RGB").save(buffer, kind)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
@pytest.mark.parametrize("damage", ["cut off", "garbage", "none"])
def test_a_broken_image_is_one_documents_fault(kind: str, damage: str, tmp_path: Path) -> None:
    good = _encoded(kind)
    bad = {"cut off": {"bytes": good[: len(good) // 2]}, "garbage": {"bytes": b"no image"}, "none": None}[damage]
    rows = [
        {"type": "human_test", "question": "?", "answer": "x", "image": None if b is None else {"path": None, **b}}
        for b in ({"bytes": good}, bad)
    ]
    features = datasets.Features(
        {**{k: datasets.Value("string") for k in ("type", "question", "answer")}, "image": datasets.Image()}
    )
    override = elsewhere(tmp_path, "test", [{"a": 1}])
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "data.parquet")
    bound = binding.bind("chartqa", override=override)
    fine, broken = binding.requests(bound)
    assert media_of(fine, "image")[0].size == (64, 64)
    with pytest.raises(binding.DocumentError, match="document 1 of chartqa: its media cannot be read") as raised:
        broken.messages()
    assert "\n" not in str(raised.value)
    assert scoring.score(bound, reply(bound, "x", "x")).score == 1  # scoring reads no images


def test_images_cut_off_stay_an_error_after_all_imports() -> None:
    lmms.lmms_eval()
    assert not ImageFile.LOAD_TRUNCATED_IMAGES


@pytest.mark.parametrize("task", ["chartqa", "docvqa_val", "ocrbench", "pope", "mme", "nextqa_mc_test", "vqav2_val"])
def test_a_missing_column_is_named(task: str, tmp_path: Path) -> None:
    name = next(m.name for m in MIRRORS.values() if m.upstream == task)
    stored = store.ensure(name, n=4, cache_dir=tmp_path)
    whole = datasets.Dataset.from_parquet(str(stored.parquet), cache_dir=str(tmp_path / "hf"))
    for column in upstream.upstream(task).columns:
        whole.remove_columns(column).to_parquet(tmp_path / "data.parquet")
        location = elsewhere(tmp_path / "unused", MIRRORS[name].split, [])
        location["dataset_kwargs"]["data_files"] = {MIRRORS[name].split: str(tmp_path / "data.parquet")}
        with pytest.raises(InputError, match=rf"{task}.*lack the column.* '{column}'") as raised:
            binding.bind(task, override=location)
        assert "\n" not in str(raised.value)


def test_columns_that_only_some_code_reads(tmp_path: Path) -> None:
    """Of tasks without an entry no columns are known before upstream's code asks for them."""
    row = {"question": "which?", "options": list("wxyz"), "answer": "1"}
    bound = binding.bind("ai2d", override=elsewhere(tmp_path, "test", [row] * 2))
    with pytest.raises(
        InputError, match=r"ai2d: its data lack the column 'image' \(present: answer, options, question"
    ):
        binding.requests(bound)[0].messages()


def test_values_that_upstream_does_not_know(tmp_path: Path) -> None:
    pytest.importorskip("cv2")
    row = {
        "videoID": "v",
        "question": "?",
        "options": ["A. x"],
        "answer": "A",
        "question_id": "0",
        "duration": "short",
        "domain": "Cooking",
        "sub_category": "Geography",
        "task_type": "OCR Problems",
    }
    bound = binding.bind("videomme", override=elsewhere(tmp_path, "test", [row]))
    with pytest.raises(InputError, match="videomme: upstream's code does not know 'short_Cooking_Geography_OCR"):
        scoring.score(bound, reply(bound, "A"))


def test_a_task_without_an_entry_works(tmp_path: Path) -> None:
    rows = [{"question": "which?", "options": list("wxyz"), "answer": str(i), "image": PICTURE} for i in range(4)]
    bound = binding.bind("ai2d", override=elsewhere(tmp_path, "test", rows))
    assert bound.entry.metric == "exact_match"
    result = scoring.score(bound, reply(bound, "A", "B", "C", "A"))
    assert (result.score, result.mean_of_documents) == (0.75, True)


def test_the_headline_of_mmstar_is_its_average_and_another_can_be_chosen(tmp_path: Path) -> None:
    categories = ("coarse perception", "math")
    rows = [
        {"index": i, "question": "which?", "answer": "A", "category": c, "l2_category": c, "image": PICTURE}
        for i, c in enumerate(categories * 2)
    ]
    bound = binding.bind("mmstar", override=elsewhere(tmp_path, "val", rows))
    result = scoring.score(bound, reply(bound, "A", "B", "A", "A"))
    assert (result.metric, result.score, bound.entry.guess) == ("average,none", 0.75, "")
    assert [d.score for d in result.documents] == [1, 0, 1, 1]
    bound = binding.bind("mmstar", override=elsewhere(tmp_path, "val", rows), metric="math")
    assert scoring.score(bound, reply(bound, "A", "B", "A", "A")).score == 0.5
    with pytest.raises(InputError, match="unknown metric of mmstar 'maths': did you mean 'math'"):
        binding.bind("mmstar", override=elsewhere(tmp_path, "val", rows), metric="maths")


def test_a_group_is_combined_as_its_file_states(tmp_path: Path) -> None:
    """C4-Bench: `weight_by_size`, so one right of three and one right of one are 4 of 6, not the mean of four."""
    forms = ["H0", "H0", "H0", "H1", "H4", "E0"]
    rows = [{"task": form, "question": "?", "answer": "画龙点睛", "answer_aliases": []} for form in forms]
    bound = binding.bind("c4_bench", override=elsewhere(tmp_path, "test", rows))
    assert (bound.entry.metric, bound.entry.combine, bound.entry.guess) == ("c4_exact_match", "weighted", "")
    right = {"c4_bench_h0": ["画龙点睛", "no", "no"]}
    answers = {
        task: dict(enumerate(right.get(task, ['{"answer": "画龙点睛"}' if task == "c4_bench_e0" else "画龙点睛"])))
        for task in bound.tasks
    }
    result = scoring.score(bound, answers)
    assert result.score == pytest.approx(4 / 6)
    assert result.mean_of_documents


def test_changed_data_are_read_again(tmp_path: Path) -> None:
    def rows(answer: str) -> list[dict[str, Any]]:
        return [{"type": "human_test", "question": "?", "answer": answer, "image": PICTURE}]

    old = binding.bind("chartqa", override=elsewhere(tmp_path, "test", rows("one")))
    new = binding.bind("chartqa", override=elsewhere(tmp_path, "test", rows("two")))
    assert old.data_hash != new.data_hash
    assert scoring.score(new, reply(new, "two")).score == 1
    assert scoring.score(old, reply(old, "one")).score == 1


def test_data_that_cannot_be_used(tmp_path: Path) -> None:
    row = {"type": "human_test", "question": "?", "answer": "x", "image": PICTURE}
    good = elsewhere(tmp_path, "test", [row])
    file = tmp_path / "data.parquet"
    datasets.Dataset.from_parquet(str(file), cache_dir=str(tmp_path / "hf2")).select([]).to_parquet(file)
    with pytest.raises(InputError, match="chartqa has no documents"):
        binding.bind("chartqa", override=good)
    with pytest.raises(InputError, match="chartqa: its data lack the column or split 'test'"):
        binding.bind("chartqa", override=elsewhere(tmp_path, "train", [row]))
    file.unlink()
    with pytest.raises(InputError, match="cannot load the given data"):
        binding.bind("chartqa", override=good)
    del row["question"]
    with pytest.raises(InputError, match="chartqa: its data lack the column or split 'question'"):
        binding.bind("chartqa", override=elsewhere(tmp_path, "test", [row]))


def test_an_unreachable_hub_is_one_line() -> None:
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if not HF_HUB_OFFLINE:
        pytest.skip("HF_HUB_OFFLINE is not set: the hub may be reachable")
    with pytest.raises(InputError, match=r"cannot load its data set 'lmms-lab-encoder/ChartQA'.*tiny suite") as raised:
        binding.bind("chartqa")
    assert "\n" not in str(raised.value)
