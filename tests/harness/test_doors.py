"""Sweep, ask, profile and lmms-eval's command show one checkpoint the same prompts, whichever is taken."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from battery import draw_image

from visionselector_eval.harness import cli
from visionselector_eval.harness.profiler.run import _workloads
from visionselector_eval.harness.profiler.spec import ProfileSpec
from visionselector_eval.harness.sweep.plan import _prompts_hash
from visionselector_eval.harness.sweep.spec import SweepSpec
from visionselector_eval.models.lmms_eval_models import VisionSelectorLlava, VisionSelectorQwen2_5_VL
from visionselector_eval.models.protocols import PROTOCOLS
from visionselector_eval.models.tiny import checkpoint
from visionselector_eval.tasks import binding, lmms
from visionselector_eval.tasks.tiny import MIRRORS

MMMU = "tiny_mmmu_val"


@pytest.fixture(scope="module")
def real(tmp_path_factory) -> Path:
    """A checkpoint of the user's: what is no embedded one has its family's protocol."""
    return Path(shutil.copytree(checkpoint(), tmp_path_factory.mktemp("real") / "checkpoint"))


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """lmms-eval's tasks write files for servers into the working folder."""
    monkeypatch.chdir(tmp_path)


def stock(kind: type, pretrained: str, *arguments: str) -> Any:
    """Our model as lmms-eval's command makes it."""
    return kind.create_from_arg_string(",".join([f"pretrained={pretrained}", "device=cpu", *arguments]))


def seen_by_the_command(model: Any, task: str, limit: int) -> list[Any]:
    """Requests that reach the backbone from lmms-eval's evaluator, in the order of documents."""
    seen: list[Any] = []
    prepare = model.answerer.prepare
    model.answerer.prepare = lambda batch, settings: seen.extend(batch) or prepare(batch, settings)
    bound = binding.bind(task, limit=limit)
    lmms.lmms_eval().simple_evaluate(
        model=model,
        tasks=list(bound.tasks.values()),
        task_manager=bound.task_manager,
        limit=limit,
        bootstrap_iters=0,
        cli_args=SimpleNamespace(output_path=None, process_with_media=False),
    )
    return seen


# the default ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "name", "protocol"),
    [
        (VisionSelectorQwen2_5_VL, "tiny", "checkpoint"),
        (VisionSelectorLlava, "tiny-llava", "llava_stf"),
        (VisionSelectorQwen2_5_VL, None, "visionselector"),
        (VisionSelectorQwen2_5_VL, str(checkpoint()), "checkpoint"),
    ],
)
def test_the_default_is_the_same_at_every_door(kind, name, protocol, real, tmp_path, capsys):
    pretrained = name or str(real)
    expected = PROTOCOLS[protocol].fields
    spec = SweepSpec.make({"backbones": pretrained})
    assert spec.protocol_of(spec.backbones[0]) == protocol
    assert spec.media(spec.backbones[0]) == expected
    model = stock(kind, pretrained)
    settings = model.answerer.settings
    assert model.protocol == protocol
    assert {name: getattr(settings, name) for name in expected} == expected
    assert kind(backbone=model.answerer.backbone).protocol == protocol
    (workload,) = _workloads(
        ProfileSpec.make({"pretrained": pretrained, "task": "tiny_pope", "limit": 1}), model.answerer.backbone
    )
    assert workload.settings["protocol"] == protocol
    assert {name: workload.settings["media"][name] for name in expected} == expected
    draw_image(112, 112).save(tmp_path / "picture.png")
    ask = ["ask", "--image", str(tmp_path / "picture.png"), "What?", "--pretrained", pretrained, "--device", "cpu"]
    totals = []
    for extra in ([], ["--protocol", protocol]):
        assert cli.main([*ask, "--max-new-tokens", "1", *extra]) == 0
        totals.append(re.search(r"of (\d+) visual tokens", capsys.readouterr().out).group(1))  # type: ignore[union-attr]
    assert totals[0] == totals[1] == {"checkpoint": "16", "llava_stf": "64", "visionselector": "256"}[protocol]


def test_the_command_on_the_embedded_checkpoint_scores(real):
    """As documented: with the protocol of another family of images it would answer nothing right."""
    bound = binding.bind("tiny_chartqa", limit=8)
    results = lmms.lmms_eval().simple_evaluate(
        model=stock(VisionSelectorQwen2_5_VL, "tiny"),
        tasks=list(bound.tasks.values()),
        task_manager=bound.task_manager,
        limit=8,
        bootstrap_iters=0,
        cli_args=SimpleNamespace(output_path=None, process_with_media=False),
    )
    assert results["results"]["tiny_chartqa"]["relaxed_overall,none"] > 0.4


def test_wrong_flags_of_ask_and_profile_are_one_clear_line(tmp_path, capsys):
    draw_image(112, 112).save(tmp_path / "picture.png")
    ask = ["ask", "--image", str(tmp_path / "picture.png"), "What?", "--device", "cpu"]
    for arguments, message in (
        ([*ask, "--protocol", "losless"], "unknown protocol 'losless': did you mean 'lossless'"),
        ([*ask, "--min-pixels", "0"], "min_pixels"),
        ([*ask, "--jpeg", "perhaps"], "jpeg"),
        (["profile", "--protocol", "lossless"], "--protocol goes with --task NAME"),
        (["profile", "--task", "tiny_pope", "--protocol", "losless"], "unknown protocol 'losless'"),
    ):
        assert cli.main(arguments) == 2
        said = capsys.readouterr().err
        assert message in said
        assert said.count("\n") == 1


# prompts and limits --------------------------------------------------------------------------------------------------


def layout(messages: list[dict[str, Any]]) -> list[tuple[str, str]]:
    return [(p["type"], p.get("text", "")) for message in messages for p in message["content"]]


def test_mmmu_under_visionselector_is_asked_as_published():
    """All images before one text that keeps `<image 1>`, and 16 new tokens; elsewhere as lmms-eval has it."""
    bound = binding.bind(MMMU, limit=4)
    asked = {name: binding.requests(bound, name) for name in ("visionselector", "lmms_eval")}
    for ours, theirs in zip(*asked.values(), strict=True):
        kinds = [kind for kind, _ in layout(ours.messages())]
        (text,) = [text for kind, text in layout(ours.messages()) if kind == "text"]
        assert kinds == ["image"] * (len(kinds) - 1) + ["text"]
        assert "<image 1>" in text
        assert ours.generation["max_new_tokens"] == 16
        assert "<image" not in str(layout(theirs.messages()))
        assert theirs.generation["max_new_tokens"] == 128
        images = [[p["image"] for m in r.messages() for p in m["content"] if "image" in p] for r in (ours, theirs)]
        assert [p.tobytes() for p in images[0]] == [p.tobytes() for p in images[1]]
    longer = binding.requests(bound, "visionselector", {"max_new_tokens": 64})
    assert {r.generation["max_new_tokens"] for r in longer} == {64}
    assert (
        _prompts_hash(bound, "visionselector") != _prompts_hash(bound, "lmms_eval") == _prompts_hash(bound, "lossless")
    )


@pytest.mark.parametrize("task", sorted(set(MIRRORS) - {MMMU}))
def test_all_other_tasks_are_asked_alike(task):
    bound = binding.bind(task, limit=2)
    made = [binding.requests(bound, name) for name in ("visionselector", "lmms_eval")]
    for ours, theirs in zip(*made, strict=True):
        assert layout(ours.messages()) == layout(theirs.messages())
        assert (ours.generation, ours.until) == (theirs.generation, theirs.until)


@pytest.mark.parametrize("protocol", ["visionselector", "checkpoint"])
def test_the_command_asks_what_a_sweep_asks(protocol, tiny):
    for task in (MMMU, "tiny_textvqa_val", "tiny_ocrbench"):
        model = VisionSelectorQwen2_5_VL(backbone=tiny, protocol=protocol, max_pixels=16 * 784, min_pixels=784)
        theirs = seen_by_the_command(model, task, 2)
        ours = binding.requests(binding.bind(task, limit=2), protocol)
        assert [r.key for r in theirs] == [r.key for r in ours]
        for one, other in zip(theirs, ours, strict=True):
            assert layout(one.messages()) == layout(other.messages())
            assert (one.generation, one.until) == (other.generation, other.until)


# stop strings --------------------------------------------------------------------------------------------------------


def test_an_empty_line_does_not_end_an_answer(tiny, monkeypatch):
    """Only where the task names a string does it cut, in a sweep as in lmms-eval's evaluator."""
    answer = "The text in the image is:\n\nHELLO ASSISTANT: again"
    ids = tiny.processor.tokenizer(answer, add_special_tokens=False)["input_ids"]
    generate = tiny.run_generate

    def answers(compressed: Any, **arguments: Any) -> Any:
        tokens, entered = generate(compressed, **{**arguments, "max_new_tokens": 1})
        return torch.tensor([ids] * len(tokens)), entered

    monkeypatch.setattr(tiny, "run_generate", answers)
    for task, expected in (("tiny_ocrbench", answer), ("tiny_textvqa_val", answer.split("ASSISTANT:")[0])):
        model = VisionSelectorQwen2_5_VL(backbone=tiny)
        bound = binding.bind(task, limit=1)
        results = lmms.lmms_eval().simple_evaluate(
            model=model,
            tasks=list(bound.tasks.values()),
            task_manager=bound.task_manager,
            limit=1,
            bootstrap_iters=0,
            cli_args=SimpleNamespace(output_path=None, process_with_media=False),
        )
        assert results["samples"][task][0]["resps"][0][0] == expected
        request = binding.requests(bound)[0]
        prepared = model.answerer.prepare([request], [model.setting])
        assert model.answerer.answer(prepared, model.setting)[0].text == expected
