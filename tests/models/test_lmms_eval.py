"""The lmms-eval model: from the stock command, from `simple_evaluate`, and request by request."""

from __future__ import annotations

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from battery import draw_image
from chat import media_of

from visionselector_eval.baselines import InputError, available, parse_budget
from visionselector_eval.models.generation import cut, generation_arguments
from visionselector_eval.models.tiny import checkpoint
from visionselector_eval.tasks import binding, lmms
from visionselector_eval.tasks.tiny import store

IMAGES, VIDEO = "tiny_chartqa", "tiny_mvbench_moving_direction"
NAME = "visionselector_qwen2_5_vl"


@pytest.fixture(scope="module")
def model_class() -> Any:
    """Our class as lmms-eval finds it: through the entry point."""
    lmms.lmms_eval()
    from lmms_eval.models import get_model

    return get_model(NAME)


def evaluate(model: Any, tasks: list[str], limit: int = 4) -> dict[str, list[dict[str, Any]]]:
    """Samples of each task from lmms-eval's own evaluator, in the order of documents."""
    loaded = [binding.bind(task, limit=limit) for task in tasks]
    results = lmms.lmms_eval().simple_evaluate(
        model=model,
        tasks=[task for bound in loaded for task in bound.tasks.values()],
        task_manager=loaded[0].task_manager,
        limit=limit,
        bootstrap_iters=0,
        cli_args=SimpleNamespace(output_path=None, process_with_media=False),
    )
    return {name: sorted(samples, key=lambda s: s["doc_id"]) for name, samples in results["samples"].items()}


def texts(samples: list[dict[str, Any]]) -> list[str]:
    return [sample["resps"][0][0] for sample in samples]


def counts(samples: list[dict[str, Any]]) -> list[dict[str, int]]:
    return [sample["token_counts"][0] for sample in samples]


# simple_evaluate -----------------------------------------------------------------------------------------------------


def test_budget_one_is_a_plain_generate_of_the_same_prompt(model_class, tiny):
    """transformers' own processor and `generate`, one document at a time; every compressor answers the same."""
    asked = binding.requests(binding.bind(IMAGES, limit=3))
    plain = []
    for request in asked:
        chat = request.messages()
        images = [part["image"].convert("RGB") for message in chat for part in message["content"] if "image" in part]
        text = tiny.processor.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        inputs = tiny.processor(text=[text], images=images, return_tensors="pt")
        tokens = tiny.model.generate(**inputs, **generation_arguments(request.generation))
        answer = tiny.processor.tokenizer.decode(
            tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        plain.append((cut(answer, request.until), inputs["input_ids"].shape[1], tokens.shape[1]))
    for method in available():
        model = model_class(backbone=tiny, method=method, budget=1.0, protocol="checkpoint")
        samples = evaluate(model, [IMAGES], limit=3)[IMAGES]
        assert texts(samples) == [answer for answer, _, _ in plain], method
        for count, (_, prompt, whole) in zip(counts(samples), plain, strict=True):
            assert count["input_tokens"] == prompt
            assert count["output_tokens"] == whole - prompt
            assert count["visual_tokens_kept"] == count["visual_tokens_total"] == 64


@pytest.mark.parametrize("method", ["divprune", "downsample", "random"])
def test_answers_do_not_depend_on_the_batch_size(method, model_class, tiny):
    """Seven documents one by one, in threes with a rest, and all at once, images and videos in one call."""
    seen = []
    for size in (1, 3, 7):
        model = model_class(backbone=tiny, method=method, budget="20%", batch_size=size, protocol="checkpoint")
        samples = evaluate(model, [IMAGES, VIDEO], limit=7)
        seen.append({name: (texts(of_task), counts(of_task)) for name, of_task in samples.items()})
    assert seen[0] == seen[1] == seen[2]
    assert {len(answers) for answers, _ in seen[0].values()} == {7}


def test_one_model_serves_several_evaluations(model_class, tiny):
    model = model_class(backbone=tiny, method="visionzip", budget=0.3, batch_size=2, protocol="checkpoint")
    first, other, again = evaluate(model, [IMAGES]), evaluate(model, ["tiny_pope"], limit=16), evaluate(model, [IMAGES])
    assert texts(first[IMAGES]) == texts(again[IMAGES])
    assert len(set(texts(other["tiny_pope"]))) > 1
    both = evaluate(model, [IMAGES, "tiny_pope"])
    assert texts(both[IMAGES]) == texts(first[IMAGES])
    assert texts(both["tiny_pope"]) == texts(other["tiny_pope"])[: len(both["tiny_pope"])]


def test_a_video_task_counts_the_tokens_of_all_frames(model_class, tiny):
    for budget in ("0.2", "9tok"):
        model = model_class(backbone=tiny, method="divprune", budget=budget, max_num_frames=4, protocol="checkpoint")
        for count in counts(evaluate(model, [VIDEO])[VIDEO]):
            total = count["visual_tokens_total"]
            assert total > 64
            assert count["visual_tokens_kept"] == parse_budget(budget).count(total)


def test_the_protocol_decides_the_pixels(model_class, tiny):
    """The checkpoint's own unless asked otherwise; single fields go over a protocol's."""
    for arguments, least, most in (
        ({}, 64, 64),
        ({"protocol": "lmms_eval"}, 256, 2048),
        ({"protocol": "lmms_eval", "max_pixels": 100 * 784, "min_pixels": 784}, 1, 100),
    ):
        model = model_class(backbone=tiny, **arguments)
        assert all(least <= c["visual_tokens_total"] <= most for c in counts(evaluate(model, [IMAGES], 2)[IMAGES]))


# request by request --------------------------------------------------------------------------------------------------


def ask(model: Any, questions: list[tuple[str, dict[str, Any], Any]]) -> list[Any]:
    """Answers to (question, generation settings, image or None) as an evaluator would ask them."""
    from lmms_eval.api.instance import Instance

    def to_messages(document: tuple[str, Any]) -> list[dict[str, Any]]:
        question, image = document
        content = [{"type": "image", "url": image}] if image is not None else []
        return [{"role": "user", "content": [*content, {"type": "text", "text": question}]}]

    model.task_dict["mine"] = {"test": [(question, image) for question, _, image in questions]}
    return model.generate_until(
        [
            Instance(
                request_type="generate_until",
                arguments=(question, to_messages, generation, number, "mine", "test"),
                idx=0,
                metadata={"task": "mine", "doc_id": number, "repeats": 1},
            )
            for number, (question, generation, _) in enumerate(questions)
        ]
    )


def test_answers_come_back_in_the_order_of_the_questions(model_class, tiny):
    """Different generation settings and prompts in one call: each question gets the answer it gets alone."""
    model = model_class(backbone=tiny, method="divprune", budget=0.3, batch_size=3, protocol="checkpoint")
    questions = [
        (f"Question number {i} {'?' * i}", {"max_new_tokens": 3 + 4 * (i % 2)}, draw_image(112, 84 + 28 * i, i))
        for i in range(5)
    ] + [("Just text?", {"max_new_tokens": 3}, None)]
    together = ask(model, questions)
    alone = [ask(model, [question])[0] for question in questions]
    assert [r.text for r in together] == [r.text for r in alone]
    assert [r.token_counts.to_dict() for r in together] == [r.token_counts.to_dict() for r in alone]
    assert all(r.token_counts.output_tokens <= 3 + 4 * (i % 2) for i, r in enumerate(together[:5]))
    assert together[5].token_counts.visual_tokens_total == 0


def test_a_batch_has_one_limit_where_a_protocol_changes_that_of_one_task(model_class, tiny):
    from lmms_eval.api.instance import Instance

    model = model_class(backbone=tiny, batch_size=4, protocol="visionselector", min_pixels=784, max_pixels=16 * 784)
    requests = []
    for task in ("mmmu_val", "other"):
        model.task_dict[task] = {"test": ["One?", "Two?", "Three?"]}
        for number, question in enumerate(model.task_dict[task]["test"]):
            message = {"role": "user", "content": [{"type": "text", "text": question}]}
            arguments = (question, lambda _, m=message: [m], {"max_new_tokens": 128}, number, task, "test")
            metadata = {"task": task, "doc_id": number, "repeats": 1}
            requests.append(Instance(request_type="generate_until", arguments=arguments, idx=0, metadata=metadata))
    seen: list[set[int]] = []
    prepare = model.answerer.prepare
    model.answerer.prepare = lambda batch, settings: (
        seen.append({r.generation["max_new_tokens"] for r in batch}) or prepare(batch, settings)
    )
    assert len(model.generate_until(requests)) == 6
    assert sorted(map(sorted, seen)) == [[16], [128]]


def test_until_cuts_the_answer(model_class, tiny):
    model = model_class(backbone=tiny, protocol="checkpoint")
    whole = ask(model, [("What is it?", {"max_new_tokens": 12}, draw_image(112, 112))])[0].text
    stop = next(character for character in whole if whole.index(character) > 0)
    for until in (stop, [stop], ["never there", stop], [stop, ""]):
        given = {"max_new_tokens": 12, "until": until}
        assert ask(model, [("What is it?", given, draw_image(112, 112))])[0].text == whole.split(stop)[0]
    for until in (None, [], ["never there"]):
        given = {"max_new_tokens": 12, "until": until}
        assert ask(model, [("What is it?", given, draw_image(112, 112))])[0].text == whole


def test_settings_of_other_models_are_ignored_and_temperature_zero_is_greedy(model_class, tiny):
    model = model_class(backbone=tiny, protocol="checkpoint")
    image = draw_image(112, 112)
    plain = ask(model, [("What?", {"max_new_tokens": 8}, image)])[0].text
    for extra in ({"temperature": 0, "top_p": None, "num_beams": 1}, {"image_aspect_ratio": "pad"}):
        assert ask(model, [("What?", {"max_new_tokens": 8, **extra}, image)])[0].text == plain


# wrong input ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("method=divprun", "unknown method 'divprun': did you mean 'divprune'"),
        ("method=divprune,upstram_exact=True", "unknown option of method divprune 'upstram_exact': did you mean 'up"),
        ("method=divprune,budget=0", "invalid budget 0: expected "),
        ("method=divprune,budget=1.5", "invalid budget 1.5: expected "),
        ("method=divprune,budget=abc", "invalid budget 'abc': expected "),
        ("batch_size=0", "invalid batch_size='?0'?: expected "),
        ("batch_size=auto", "invalid batch_size='auto': expected "),
        ("protocol=lmms", "unknown protocol 'lmms': did you mean 'lmms_eval'"),
        ("pretrained=./nowhere", "no checkpoint folder"),
        ("device=gpu", "invalid device 'gpu': expected auto"),
        ("min_pixels=100,max_pixels=50", "pixel bounds 100..50"),
        ("maxpixels=50", "unknown option of method full 'maxpixels'"),
    ],
)
def test_wrong_model_arguments_are_one_clear_line(arguments, message, model_class):
    """As the stock command passes them: one text, parsed by lmms-eval."""
    with pytest.raises(InputError, match=message) as caught:
        model_class.create_from_arg_string(f"pretrained=tiny,device=cpu,{arguments}")
    assert "\n" not in str(caught.value)


def test_model_arguments_arrive_as_they_were_written(model_class):
    for text, budget in (("0.2", "0.2"), ("20%", "0.2"), ("64tok", "64tok"), ("1", "1"), ("1.0", "1")):
        model = model_class.create_from_arg_string(
            f"pretrained=tiny,device=cpu,method=divprune,upstream_exact=True,budget={text},batch_size=3,fps=2"
        )
        assert str(model.setting.budget) == budget
        assert model.setting.compressor.upstream_exact is True
        assert (model.batch_size, model.answerer.settings.fps) == (3, 2)
        assert model.device == torch.device("cpu")


def test_other_kinds_of_task_are_refused(model_class, tiny):
    model = model_class(backbone=tiny)
    for call, kind in ((model.loglikelihood, "loglikelihood"), (model.generate_until_multi_round, "multi_round")):
        with pytest.raises(InputError, match=kind):
            call([])


def test_repetitions_and_the_seed_of_the_command_give_other_samples(model_class, tiny):
    """`--seed` reaches a model as torch's seed; a document that is asked again draws again."""
    bound = binding.bind(IMAGES, limit=2)
    list(binding.requests(bound))
    task = bound.tasks[IMAGES]
    for instance in task.instances:
        instance.args[2].update(temperature=8.0, max_new_tokens=12)

    def sampled(seed: int, batch_size: int = 1) -> list[str]:
        model = model_class(backbone=tiny, protocol="checkpoint", batch_size=batch_size)
        model.task_dict = {IMAGES: task.dataset}
        torch.manual_seed(seed)
        given = [result.text for result in model.generate_until([i for i in task.instances for _ in range(3)])]
        assert torch.initial_seed() == seed
        return given

    first = sampled(1)
    assert len(set(first)) == 6
    assert sampled(1) == first
    assert sampled(1, batch_size=4) == first
    assert not set(sampled(2)) & set(first)


def test_a_task_that_a_family_cannot_answer_is_named(llava_class, llava):
    with pytest.raises(InputError, match=rf"^{VIDEO} can't be answered: this backbone takes images.*leave this task"):
        evaluate(llava_class(backbone=llava), [VIDEO], limit=1)


# the stock command ---------------------------------------------------------------------------------------------------


def stock_command(folder: Path, tasks: list[str], batch_size: int, limit: int) -> list[str]:
    """Arguments of `lmms-eval eval` for the embedded look-alikes."""
    arguments = f"pretrained={checkpoint()},method=divprune,budget=0.2,device=cpu,protocol=checkpoint"
    return [
        *("eval", "--model", NAME, "--model_args", arguments, "--tasks", ",".join(tasks)),
        *("--include_path", str(store.write_bindings(tasks)), "--batch_size", str(batch_size)),
        *("--limit", str(limit), "--log_samples", "--output_path", str(folder)),
    ]


def environment(threads: int) -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": str(threads)}


def logged(folder: Path, task: str) -> list[dict[str, Any]]:
    (file,) = folder.rglob(f"*samples_{task}.jsonl")
    return sorted((json.loads(line) for line in file.read_text().splitlines()), key=lambda s: s["doc_id"])


def same_as_here(model_class: Any, tiny: Any, found: dict[str, list[dict[str, Any]]], limit: int) -> None:
    model = model_class(backbone=tiny, method="divprune", budget=0.2, batch_size=2, protocol="checkpoint")
    for task, samples in evaluate(model, list(found), limit).items():
        assert [s["doc_id"] for s in found[task]] == list(range(limit))
        assert [s["filtered_resps"] for s in found[task]] == texts(samples)
        assert counts(found[task]) == counts(samples)
        for count in counts(found[task]):
            assert count["visual_tokens_kept"] == parse_budget(0.2).count(count["visual_tokens_total"]) > 0


@pytest.mark.versions
def test_the_stock_command_runs_our_model(tmp_path, model_class, tiny):
    """`lmms-eval eval --model visionselector_qwen2_5_vl ...` in a process of its own: scores, answers, token counts."""
    tasks = [IMAGES, VIDEO]
    done = subprocess.run(
        [str(Path(sys.executable).with_name("lmms-eval")), *stock_command(tmp_path, tasks, batch_size=2, limit=4)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment(2),
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(rf"{IMAGES} .*relaxed_overall", done.stdout), done.stdout + done.stderr
    assert "visual_tokens_kept" in done.stdout
    same_as_here(model_class, tiny, {task: logged(tmp_path, task) for task in tasks}, limit=4)


@pytest.mark.slow
@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch without distributed")
def test_two_ranks_share_the_documents(tmp_path, model_class, tiny):
    """torchrun with two processes on the CPU (gloo): every document once, the same answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launch = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", str(port), "-m", "lmms_eval"]
    done = subprocess.run(
        [sys.executable, *launch, *stock_command(tmp_path, [IMAGES], batch_size=2, limit=5)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**environment(1), "CUDA_VISIBLE_DEVICES": ""},
        check=False,
    )
    assert done.returncode == 0, done.stderr
    same_as_here(model_class, tiny, {IMAGES: logged(tmp_path, IMAGES)}, limit=5)


# LLaVA-1.5 -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llava_class() -> Any:
    lmms.lmms_eval()
    from lmms_eval.models import get_model

    return get_model("visionselector_llava")


def test_llava_at_budget_one_is_a_plain_generate_of_llava_hfs_prompt(llava_class, llava):
    """lmms-eval's own llava_hf puts a task's messages through the processor's template and nothing else."""
    asked = binding.requests(binding.bind(IMAGES, limit=3, base_model="llava_hf"))
    plain = []
    for request in asked:
        images = media_of(request, "image")
        text = llava.processor.apply_chat_template(request.messages(), tokenize=False, add_generation_prompt=True)
        inputs = llava.processor(images=[p.convert("RGB") for p in images], text=text, return_tensors="pt")
        tokens = llava.model.generate(**inputs, **generation_arguments(request.generation))
        answer = llava.processor.tokenizer.decode(
            tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        plain.append(cut(answer, request.until))
    for method in ("full", "visionzip", "fastv"):
        model = llava_class(backbone=llava, method=method, budget=1.0, protocol="lmms_eval")
        samples = evaluate(model, [IMAGES], limit=3)[IMAGES]
        assert texts(samples) == plain, method
        assert {c["visual_tokens_kept"] for c in counts(samples)} == {64}


def test_llava_keeps_the_budget_in_batches(llava_class, llava):
    seen = []
    for size in (1, 3):
        model = llava_class(backbone=llava, method="prumerge_plus", budget="20%", batch_size=size)
        samples = evaluate(model, [IMAGES], limit=5)[IMAGES]
        assert {(c["visual_tokens_kept"], c["visual_tokens_total"]) for c in counts(samples)} == {(12, 64)}
        seen.append(texts(samples))
    assert seen[0] == seen[1]


def test_llava_answers_no_video(llava_class, llava):
    with pytest.raises(InputError, match="takes images, no videos"):
        evaluate(llava_class(backbone=llava, method="divprune", budget=0.2), [VIDEO], limit=1)
