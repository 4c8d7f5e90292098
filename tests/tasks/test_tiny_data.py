"""The generators of the embedded benchmarks and the cache that keeps what they make."""

from __future__ import annotations

from pathlib import Path

import av
import numpy as np
import pytest

from visionselector_eval.baselines.contract.errors import InputError
from visionselector_eval.tasks.tiny import CELL, MIRRORS, Document, Mirror, generate, store

NAMES = list(MIRRORS)


@pytest.mark.parametrize("name", NAMES)
def test_a_seed_is_a_promise(name: str) -> None:
    first, again, other = (generate(name, seed, 16) for seed in (3, 3, 4))
    assert store.content_hash(first) == store.content_hash(again)
    assert store.content_hash(first) != store.content_hash(other)
    assert [d.digest() for d in generate(name, 3, 8)] == [d.digest() for d in first[:8]]


@pytest.mark.parametrize("name", NAMES)
def test_seeds_share_no_image(name: str) -> None:
    def images(seed: int) -> set[bytes]:
        return {b"".join(p.tobytes() for p in d.images()) for d in generate(name, seed, 64)}

    pair = MIRRORS[name].pair
    zero, one = images(0), images(1)
    assert len(zero) == len(one) == 64 // pair
    assert not zero & one


@pytest.mark.parametrize("name", NAMES)
def test_documents_are_sane(name: str) -> None:
    documents = generate(name, 5, 64)
    assert len({(d.row["question"], d.answer) for d in documents}) > 8
    for d in documents:
        pixels = np.stack(d.images())
        assert pixels.dtype == np.uint8
        assert pixels.shape[1] % CELL == 0
        assert pixels.shape[2] % CELL == 0
        assert max(pixels.shape[1:3]) <= 12 * CELL
        assert d.answer != d.wrong
        assert d.questions
        cells = [(m.frame, m.row, m.column) for m in d.marks]
        assert len(set(cells)) == len(cells)
        assert all(0 <= m.row < pixels.shape[1] // CELL and 0 <= m.column < pixels.shape[2] // CELL for m in d.marks)
    answers = [d.answer for d in documents]
    commonest = max(answers.count(a) for a in set(answers)) / len(answers)
    assert commonest <= 0.5, "a constant answer must not be right more than half the time"


def test_yes_and_no_are_even_and_alternate() -> None:
    for name, answers in (("tiny_pope", ["yes", "no"]), ("tiny_mme", ["Yes", "No"])):
        assert [d.row["answer"] for d in generate(name, 0, 12)] == answers * 6
    pairs = generate("tiny_mme", 0, 12)
    assert all(a.row["question_id"] == b.row["question_id"] for a, b in zip(pairs[::2], pairs[1::2], strict=True))


def test_one_frame_tells_little_about_the_direction() -> None:
    """Where the object is in the first frame, cut in thirds each way, predicts its direction little better than
    chance."""
    seen: dict[tuple[int, int], list[str]] = {}
    held_out: list[tuple[tuple[int, int], str]] = []
    for i, d in enumerate(generate("tiny_mvbench_moving_direction", 9, 600)):
        word = d.row["question"].removeprefix("What direction is the ").removesuffix(" moving within the video?")
        mark = next(m for m in d.marks if m.frame == 0 and m.text == word)
        place, answer = (mark.row // 2, mark.column // 2), d.row["answer"]
        if i % 2:
            seen.setdefault(place, []).append(answer)
        else:
            held_out.append((place, answer))
    guess = {place: max(set(answers), key=answers.count) for place, answers in seen.items()}
    right = sum(guess.get(place) == answer for place, answer in held_out) / len(held_out)
    assert right < 0.42, "an even guess is right in 0.25, the best single-frame guess in 0.36 of the cases"


def test_what_is_asked_and_what_is_right_share_no_frame() -> None:
    for d in generate("tiny_videomme", 9, 200):
        frames = {t: {m.text for m in d.marks if m.frame == t} for t in range(8)}
        right = d.row["options"]["ABCD".index(d.answer)].removeprefix(f"{d.answer}. ")
        if d.row["task_type"] in ("Temporal Perception", "OCR Problems"):
            named = d.row["question"].removesuffix("?").split()[-1].lower()
            shown = [" ".join(texts) for texts in frames.values()]
            assert sum(named in s for s in shown) == sum(right in s for s in shown) == 2
            assert not any(named in s and right in s for s in shown)
        elif d.row["task_type"] == "Counting Problem":
            assert all(len(texts) == 1 for texts in frames.values())
            assert len(set().union(*frames.values())) == int(right)
        else:
            colours = [next(iter(texts)).split()[0] for texts in frames.values()]
            assert colours[-1] == right != colours[0]
    for d in generate("tiny_seedbench", 9, 100)[::2]:
        assert all(len({m.text for m in d.marks if m.frame == t}) == 1 for t in range(4))
    for d in generate("tiny_nextqa_mc_test", 9, 99)[1::3]:  # the colour before the cue is not seen with the cue
        cue = d.row["question"].split()[-2]
        late = {m.frame for m in d.marks if m.text.endswith(cue)}
        assert late == {6, 7}
        right = d.row[f"a{d.row['answer']}"]
        assert {m.frame for m in d.marks if m.text.startswith(right) and not m.text.endswith(cue)} == {4, 5}


def test_several_images_all_matter() -> None:
    for d in generate("tiny_mmmu_val", 9, 200):
        assert d.row["question"].count("<image ") == 1 + len(d.more)
    kinds = [1 + len(d.more) for d in generate("tiny_mmmu_val", 9, 8)]
    assert kinds == [2, 2, 2, 1, 3, 2, 2, 1]


def test_half_of_the_forms_of_mmbench_are_turned() -> None:
    for name in ("tiny_mmbench_en_dev_static", "tiny_mmbench_cn_dev"):
        documents = generate(name, 0, 20)
        for first, second in zip(documents[::2], documents[1::2], strict=True):
            assert second.row["index"] == first.row["index"] + 1_000_000
            assert second.row["question"] == first.row["question"]
            assert second.row[second.answer] == first.row[first.answer]
            assert second.answer != first.answer


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tiny_chartq", 0, 4), "did you mean 'tiny_chartqa'"),
        (("tiny_chartqa", -1, 4), "seed >= 0"),
        (("tiny_chartqa", 0, 0), "n >= 1"),
        (("tiny_mme", 0, 5), "even number"),
    ],
)
def test_bad_requests(arguments: tuple[str, int, int], message: str) -> None:
    with pytest.raises(InputError, match=message):
        generate(*arguments)


def test_a_clip_survives_its_file(tmp_path: Path) -> None:
    stored = store.ensure("tiny_mvbench_moving_direction", n=2, cache_dir=tmp_path)
    frames = generate("tiny_mvbench_moving_direction", 0, 2)[1].frames
    assert frames is not None
    with av.open(str(stored.folder / "clips" / "clip_0001.mp4")) as container:
        stream = container.streams.video[0]
        assert stream.average_rate == 2
        decoded = np.stack([f.to_ndarray(format="rgb24") for f in container.decode(stream)])
    assert decoded.shape == frames.shape
    assert np.abs(decoded.astype(int) - frames).mean() < 4


def test_files_are_reused_and_named_by_what_is_in_them(tmp_path: Path) -> None:
    first = store.ensure("tiny_pope", n=4, cache_dir=tmp_path)
    stamp = first.parquet.stat().st_mtime_ns
    assert store.ensure("tiny_pope", n=4, cache_dir=tmp_path) == first
    assert first.parquet.stat().st_mtime_ns == stamp
    assert first.content_hash == store.content_hash(generate("tiny_pope", 0, 4))
    assert store.ensure("tiny_pope", n=4, seed=1, cache_dir=tmp_path).folder != first.folder
    assert store.write_bindings(["tiny_pope"], n=4, cache_dir=tmp_path) == store.write_bindings(
        ["tiny_pope"], n=4, cache_dir=tmp_path
    )
    assert not [p for p in (tmp_path / "data").iterdir() if p.name.startswith(".")]


def test_changed_files_are_noticed(tmp_path: Path) -> None:
    stored = store.ensure("tiny_pope", n=4, cache_dir=tmp_path)
    stored.parquet.write_bytes(stored.parquet.read_bytes()[:-1] + b"x")
    with pytest.raises(InputError, match=r"changed or damaged: delete .*tiny_pope"):
        store.ensure("tiny_pope", n=4, cache_dir=tmp_path)


def test_a_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write the cache folder"):
        store.ensure("tiny_pope", n=4, cache_dir=tmp_path / "file")


def test_the_cache_folder_follows_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("VISIONSELECTOR_EVAL_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert store.default_cache_dir() == tmp_path / "visionselector-eval"
    monkeypatch.setenv("VISIONSELECTOR_EVAL_CACHE", str(tmp_path / "own"))
    assert store.default_cache_dir() == tmp_path / "own"


def test_the_first_of_two_processes_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While one process has written its copy and not yet renamed it, another finishes the same data."""
    write, stored = store._write, []

    def overtaken(documents: list[Document], folder: Path, made_by: Mirror) -> None:
        write(documents, folder, made_by)
        if not stored:
            stored.append(None)
            stored[0] = store.ensure("tiny_chartqa", n=8, cache_dir=tmp_path)

    monkeypatch.setattr(store, "_write", overtaken)
    late = store.ensure("tiny_chartqa", n=8, cache_dir=tmp_path)
    assert stored == [late]
    assert list((tmp_path / "data").iterdir()) == [late.folder]
