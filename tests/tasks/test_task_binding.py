"""Mirrors run end to end through upstream's code: prompts, media, metrics, and what goes wrong."""

from __future__ import annotations

import functools
import pickle
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from chat import media_of

from visionselector_eval.baselines.contract.errors import InputError
from visionselector_eval.tasks import binding, scoring, suites
from visionselector_eval.tasks.tiny import MIRRORS, Document, generate

NAMES = list(MIRRORS)
LIMIT = 16


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def bound(cache: Path) -> dict[str, binding.BoundTask]:
    return {name: binding.bind(name, cache_dir=cache, limit=LIMIT) for name in NAMES}


@functools.cache
def documents(name: str, n: int) -> list[Document]:
    return generate(name, 0, n)


def answers(name: str, right: bool = True, n: int = LIMIT) -> dict[str, dict[int, str]]:
    return {name: {i: d.answer if right else d.wrong for i, d in enumerate(documents(name, n))}}


@pytest.mark.parametrize("name", NAMES)
def test_oracle_and_anti_oracle(name: str, bound: dict[str, binding.BoundTask]) -> None:
    entry = suites.entry(name)
    best = scoring.score(bound[name], answers(name))
    worst = scoring.score(bound[name], answers(name, right=False))
    assert best.score == entry.scale
    assert worst.score == 0
    assert best.metric == entry.key
    assert best.metrics[entry.key] == best.score
    assert best.n_documents == bound[name].n_documents == LIMIT
    assert [d.doc_id for d in best.documents] == list(range(LIMIT))
    assert best.mean_of_documents == worst.mean_of_documents == entry.mean_of_documents
    # MMBench asks each question in several forms and scores the first: the others have no score of their own.
    scored = [i for i in range(LIMIT) if not entry.circular or i % 2 == 0]
    assert [d.doc_id for d in best.documents if d.score is not None] == scored
    assert all(best.documents[i].score == (entry.scale if entry.mean_of_documents else 1) for i in scored)
    assert all(worst.documents[i].score == 0 for i in scored)
    assert [d.answer for d in worst.documents] == list(answers(name, right=False)[name].values())
    assert len({d.doc_hash for d in best.documents}) == LIMIT


@pytest.mark.parametrize("name", NAMES)
def test_the_whole_mirror_reaches_its_maximum(name: str, cache: Path) -> None:
    whole = binding.bind(name, cache_dir=cache)
    assert (whole.n_documents, whole.limit) == (64, None)
    assert scoring.score(whole, answers(name, n=64)).score == suites.entry(name).scale


@pytest.mark.parametrize("name", NAMES)
def test_half_right_is_in_between_and_repeatable(name: str, bound: dict[str, binding.BoundTask]) -> None:
    right, wrong = answers(name)[name], answers(name, right=False)[name]
    mixed = {name: {i: (right if i < LIMIT // 2 else wrong)[i] for i in range(LIMIT)}}
    first = scoring.score(bound[name], mixed)
    scoring.score(bound[name], answers(name))
    second = scoring.score(bound[name], mixed)
    assert first == second
    scale = suites.entry(name).scale
    assert scale is not None
    assert first.score == pytest.approx(scale / 2)
    if first.mean_of_documents:
        assert np.mean([d.score for d in first.documents if d.score is not None]) == pytest.approx(first.score)


def test_right_answers_are_reported(bound: dict[str, binding.BoundTask]) -> None:
    for name in set(NAMES) - {"tiny_mvbench_moving_direction", "tiny_nextqa_mc_test"}:
        assert all(d.answer == d.target for d in scoring.score(bound[name], answers(name)).documents)
    clips = scoring.score(bound["tiny_mvbench_moving_direction"], answers("tiny_mvbench_moving_direction")).documents
    assert {d.target for d in clips} <= {"Up", "Down", "To the left", "To the right"}
    fifth = scoring.score(bound["tiny_nextqa_mc_test"], answers("tiny_nextqa_mc_test")).documents
    assert all(d.target == str("ABCDE".index(d.answer)) for d in fifth)


@pytest.mark.parametrize("name", ["tiny_mme", "tiny_mmbench_en_dev_static", "tiny_mmbench_cn_dev"])
def test_documents_of_one_image_are_a_cluster(name: str, bound: dict[str, binding.BoundTask]) -> None:
    clusters = [d.cluster for d in scoring.score(bound[name], answers(name)).documents]
    assert clusters[::2] == clusters[1::2]
    assert len(set(clusters)) == LIMIT // 2


@pytest.mark.parametrize("name", ["tiny_mmbench_en_dev_static", "tiny_mmbench_cn_dev"])
def test_mmbench_counts_a_question_that_is_right_in_all_forms(
    name: str, bound: dict[str, binding.BoundTask], monkeypatch: pytest.MonkeyPatch
) -> None:
    import requests

    monkeypatch.setattr(requests, "post", lambda *_, **__: pytest.fail("a judge was asked"))
    given = answers(name)
    given[name][1] = documents(name, LIMIT)[1].wrong
    given[name][2] = "no letter at all"  # upstream would ask a judge
    result = scoring.score(bound[name], given)
    assert result.score == pytest.approx(100 * (LIMIT // 2 - 2) / (LIMIT // 2))
    assert [d.score for d in result.documents][:6] == [0, None, 0, None, 100, None]
    assert result.mean_of_documents
    odd = binding.bind(name, cache_dir=bound_cache(bound[name]), limit=3)
    assert scoring.score(odd, {name: {i: a for i, a in answers(name)[name].items() if i < 3}}).score == 100


def bound_cache(task: binding.BoundTask) -> Path:
    (config,) = (t.config for t in task.tasks.values())
    return Path(config.dataset_kwargs["cache_dir"]).parent


def test_empty_answers_fall_out_of_mvbench(bound: dict[str, binding.BoundTask]) -> None:
    """An upstream quirk that the flag must tell: empty answers do not count as wrong."""
    name = "tiny_mvbench_moving_direction"
    given = answers(name)
    given[name][0] = ""
    result = scoring.score(bound[name], given)
    assert result.score == 100
    assert not result.mean_of_documents


_LETTER = "\nAnswer with the option's letter from the given choices directly."
_WORD = "\nAnswer the question using a single word or phrase."
PROMPTS = {
    "tiny_docvqa_val": "?\nAnswer the question using a single word or phrase.",
    "tiny_chartqa": "?\nAnswer the question with a single word.",
    "tiny_textvqa_val": "?\nAnswer the question using a single word or phrase.",
    "tiny_pope": "?\nAnswer the question using a single word or phrase.",
    "tiny_mme": "?\nAnswer the question using a single word or phrase.",
    "tiny_scienceqa_img": "\nAnswer with the option's letter from the given choices directly.",
    "tiny_mvbench_moving_direction": "\nOnly give the best option.\n",
    "tiny_ocrbench": "",
    "tiny_ai2d_no_mask": _LETTER,
    "tiny_mmmu_val": ("\n" + _LETTER, "\n" + _WORD),
    "tiny_seedbench": _LETTER,
    "tiny_videomme": _LETTER,
    "tiny_nextqa_mc_test": "",
    "tiny_vqav2_val": _WORD,
    "tiny_gqa": _WORD,
    "tiny_vizwiz_vqa_val": "\nWhen the provided information is insufficient, respond with 'Unanswerable'." + _WORD,
    "tiny_mmbench_en_dev_static": _LETTER,
    "tiny_mmbench_cn_dev": "\n请直接使用所提供的选项字母作为答案回答。",
}
NEW_TOKENS = {"tiny_docvqa_val": 32, "tiny_pope": 128, "tiny_ocrbench": 128, "tiny_mmmu_val": 128} | dict.fromkeys(
    ["tiny_textvqa_val", "tiny_seedbench", "tiny_nextqa_mc_test", "tiny_vizwiz_vqa_val"]
)


@pytest.mark.parametrize("name", NAMES)
def test_requests_are_upstreams(name: str, bound: dict[str, binding.BoundTask]) -> None:
    asked = binding.requests(bound[name])
    assert [(r.task, r.doc_id) for r in asked] == [(name, i) for i in range(LIMIT)]
    for request, document in zip(asked, documents(name, LIMIT), strict=True):
        chat = request.messages()
        images, videos = media_of(request, "image"), media_of(request, "video")
        text = chat[-1]["content"][-1]["text"]
        question = document.row["question"].removesuffix(" Please answer yes or no.")
        if MIRRORS[name].media == "images":  # images stand where the question names them
            question = re.split(r"<image \d>", question)[-1].strip()
            assert len(images) == 1 + len(document.more)
        else:
            assert text == request.context
        assert text.endswith(PROMPTS[name])
        assert question.lower() in text.lower()
        assert {part["type"] for turn in chat for part in turn["content"]} <= {"text", "image", "video"}
        if MIRRORS[name].media == "clip":
            assert not images
            assert Path(videos[0]).is_file()
        else:
            assert not videos
            for shown, drawn in zip(images, document.images(), strict=True):
                assert np.array_equal(np.asarray(shown.convert("RGB")), drawn)
        assert request.generation.get("max_new_tokens") == NEW_TOKENS.get(name, 16)
        assert "until" not in request.generation
        waits = ("tiny_textvqa_val", "tiny_seedbench", "tiny_vizwiz_vqa_val")
        assert request.until == (("ASSISTANT:",) if name in waits or "mmbench" in name else ())
    # Upstream's MMMU code changes a module table while it makes messages: prompts (and so digests) must not see it.
    assert [r.context for r in binding.requests(bound[name])] == [r.context for r in asked]


def test_prompts_follow_the_base_model(cache: Path) -> None:
    asked = binding.requests(binding.bind("tiny_docvqa_val", base_model="qwen_vl", cache_dir=cache, limit=1))
    assert asked[0].context.endswith(" Answer:")


def test_submissions_go_to_the_output_folder(
    bound: dict[str, binding.BoundTask], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = "tiny_textvqa_val"
    kept = scoring.score(bound[name], answers(name), tmp_path / "out")
    assert [p.parent for p in kept.submissions] == [tmp_path / "out" / "submissions"]
    assert scoring.score(bound[name], answers(name)).submissions == []
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_scoring_leaves_the_random_state_alone(bound: dict[str, binding.BoundTask]) -> None:
    random.seed(5)
    np.random.seed(5)
    torch.manual_seed(5)
    before = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # type: ignore[index,union-attr]
    scoring.score(bound["tiny_pope"], answers("tiny_pope"))
    after = (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())  # type: ignore[index,union-attr]
    assert before == after


def test_a_replay_is_quick(bound: dict[str, binding.BoundTask]) -> None:
    scoring.score(bound["tiny_chartqa"], answers("tiny_chartqa"))
    start = time.perf_counter()
    for _ in range(5):
        scoring.score(bound["tiny_chartqa"], answers("tiny_chartqa"))
    assert (time.perf_counter() - start) / 5 < 0.3


def test_hashes_name_the_documents(cache: Path, bound: dict[str, binding.BoundTask]) -> None:
    assert len({b.data_hash for b in bound.values()}) == len(NAMES)
    same = binding.bind("tiny_pope", cache_dir=cache)
    other = binding.bind("tiny_pope", cache_dir=cache, seed=1, documents=8)
    assert same.data_hash == bound["tiny_pope"].data_hash != other.data_hash
    assert other.n_documents == 8


def test_missing_answers_are_named(bound: dict[str, binding.BoundTask]) -> None:
    given = answers("tiny_pope")
    del given["tiny_pope"][3]
    with pytest.raises(InputError, match="1 of 16 answers are missing, the first is document 3"):
        scoring.score(bound["tiny_pope"], given)


def test_a_missing_video_is_one_documents_fault(cache: Path) -> None:
    name = "tiny_mvbench_moving_direction"
    made = binding.bind(name, cache_dir=cache, documents=2)
    first, second = binding.requests(made)
    clip = Path(media_of(second, "video")[0])
    moved = clip.rename(clip.with_suffix(".away"))
    try:
        first.messages()
        with pytest.raises(binding.DocumentError, match=f"document 1 of {name}: its video .* does not exist") as raised:
            second.messages()
        assert (raised.value.task, raised.value.doc_id) == (name, 1)
        assert str(pickle.loads(pickle.dumps(raised.value))) == str(raised.value)
    finally:
        moved.rename(clip)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("tiny_mme", {"limit": 7}, "groups of 2, try 8"),
        ("tiny_chartqa", {"limit": 0.5}, "whole number"),
        ("tiny_chartq", {}, "unknown task 'tiny_chartq': did you mean 'tiny_chartqa'"),
        ("mmmu_vall", {}, "did you mean 'mmmu_val'"),
        ("tiny_chartqa", {"override": {"dataset_name": "x"}}, "name chartqa instead"),
        ("chartqa", {"seed": 1}, "not one"),
        ("tiny_mme", {"documents": 3}, "even number"),
    ],
)
def test_bad_input_is_one_line(name: str, options: dict, message: str, cache: Path) -> None:
    with pytest.raises(InputError, match=message) as raised:
        binding.bind(name, cache_dir=cache, **options)
    assert "\n" not in str(raised.value)


def test_standard_output_stays_clean(cache: Path) -> None:
    code = f"""
import warnings
from visionselector_eval.tasks import binding, scoring
from visionselector_eval.tasks.tiny import generate
before = list(warnings.filters)
b = binding.bind("tiny_textvqa_val", cache_dir={str(cache)!r}, limit=2)
binding.requests(b)[0].messages()
scoring.score(b, {{b.name: dict(enumerate(["x", "y"]))}})
from loguru import logger
logger.warning("heard")
logger.info("not heard")
assert list(warnings.filters) == before
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert [line for line in done.stderr.splitlines() if "heard" in line] == ["heard"]
    assert "Postprocessing" not in done.stderr
