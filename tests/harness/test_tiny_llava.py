"""The embedded LLaVA-1.5 and its trainer: the stock forward, the words of sweeps; what the shipped weights can do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from battery import draw_image, user
from PIL import Image
from safetensors.torch import load_file

from visionselector_eval.baselines import build
from visionselector_eval.harness import cli
from visionselector_eval.harness.training.tiny import batches, fusion, llava_network, network, stages
from visionselector_eval.harness.training.tiny.checkpoint import write_checkpoint
from visionselector_eval.harness.training.tiny.lessons import lesson, upstream_prompt
from visionselector_eval.harness.training.tiny.llava_network import LlavaNetwork
from visionselector_eval.models import load_backbone
from visionselector_eval.models.inputs import MediaSettings, build_inputs
from visionselector_eval.models.tiny import EMBEDDED, checkpoint
from visionselector_eval.tasks.binding import bind, requests
from visionselector_eval.tasks.tiny import EVALUATION_SEED, generate


@pytest.fixture(scope="module")
def untrained(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A backbone of the embedded LLaVA's layout with its first weights."""
    folder = tmp_path_factory.mktemp("untrained")
    write_checkpoint(llava_network.create(0), folder, LlavaNetwork)
    return load_backbone(str(folder))


def test_the_batched_forward_is_the_stock_one_on_what_the_processor_makes(untrained: Any) -> None:
    document = generate("tiny_docvqa_val", 5, 1)[0]
    made = [lesson("tiny_docvqa_val", document, np.random.default_rng(0))]
    net, packer = LlavaNetwork(untrained.model), batches.Packer(LlavaNetwork)
    batch = packer.pack(made, np.random.default_rng(0), 1.0, only_asked=True)
    chat = user(document.image, upstream_prompt("tiny_docvqa_val", document.row))
    inputs = build_inputs(untrained.processor, [chat], MediaSettings(pad_square=True))
    with torch.no_grad():
        features = net.vision(batch["pixels"])
        own = untrained.features(inputs["pixel_values"])
        torch.testing.assert_close(features[0], own[0], atol=1e-4, rtol=1e-3)
        hidden = stages._text(net, batch, features, packer.prefix)[0]
        stock = untrained.model(**inputs).logits[0]
    length = len(packer.ids(LlavaNetwork.after.format(made[0].asked[0])))
    torch.testing.assert_close(net.logits(hidden[:length]), stock[-length:], atol=1e-3, rtol=1e-3)
    assert batch["ids"][0, :length].tolist() == inputs["input_ids"][0, -length:].tolist()


def test_dropped_tokens_keep_the_positions_that_the_backbone_gives_them(untrained: Any) -> None:
    keep = torch.tensor([[3, 17, 63]])
    places = LlavaNetwork(untrained.model).positions((1, 8, 8), keep, torch.arange(4)[None], 1)
    assert places.tolist() == [[[0, 4, 18, 64, 65, 66, 67, 68]]]


@pytest.mark.parametrize("name", batches.PICTURES)
def test_questions_are_worded_as_sweeps_word_them_for_llava(name: str, tmp_path: Path) -> None:
    bound = bind(name, base_model="llava_hf", cache_dir=str(tmp_path), seed=5, documents=4)
    drawn = generate(name, 5, 4)
    for request in requests(bound):
        (message,) = request.messages()
        texts = [part["text"] for part in message["content"] if part["type"] == "text"]
        assert texts == [upstream_prompt(name, drawn[request.doc_id].row)]


def test_an_answer_is_taught_with_its_end_and_right_after_the_prompt(untrained: Any) -> None:
    chat = user(draw_image(224, 224), "What is the Tax?")
    asked = untrained.processor.apply_chat_template(chat, add_generation_prompt=True)
    answered = untrained.processor.apply_chat_template([*chat, {"role": "assistant", "content": "A4"}])
    assert asked == "USER: <image>\nWhat is the Tax? ASSISTANT:"
    assert answered == f"{asked}A4<|im_end|>"


def test_images_to_learn_fusion_from_are_square_and_never_asked(tmp_path: Path) -> None:
    file = fusion.write_lessons(tmp_path / "data", 12)
    records = [json.loads(line) for line in file.read_text().splitlines()]
    assert len(records) > 30
    assert {Image.open(file.parent / r["image"]).size for r in records} == {(224, 224)}
    assert all(r["conversations"][0]["value"].startswith("<image>") for r in records)
    assert fusion.SEED != EVALUATION_SEED


def test_train_tiny_of_family_llava_makes_a_checkpoint(tmp_path: Path) -> None:
    small = ["--vision-steps", "2", "--language-steps", "1", "--joint-steps", "1", "--learned-steps", "1"]
    small += ["--fusion-steps", "1", "--documents", "2", "--check", "2"]
    flags = ["--family", "llava", "--output", str(tmp_path / "work"), *small]
    assert cli.main(["train", "tiny", *flags]) == 0
    folder = tmp_path / "work" / "checkpoint"
    assert {t.dtype for t in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    assert "| tiny_docvqa_val | " in (folder / "README.md").read_text()
    logged = {json.loads(line)["stage"] for line in (folder / "training.jsonl").read_text().splitlines()}
    assert {"vision", "language", "joint"} <= logged
    fused = tmp_path / "work" / "checkpoint-stf"
    assert "| tiny_docvqa_val | " in (fused / "README.md").read_text()
    for made, method, budget in ((folder, "visionselector", 0.25), (fused, "full", 1.0)):
        backbone = load_backbone(str(made))
        inputs = build_inputs(backbone.processor, [user(draw_image(224, 224), "What is the Tax?")], MediaSettings())
        assert len(backbone.prefill(inputs, build(method), budget).kept[0]) == 16


def test_tokens_of_both_families_agree_but_for_the_last() -> None:
    first, second = network.tokenizer(), llava_network.tokenizer()
    assert second.convert_ids_to_tokens(range(len(first))) == first.convert_ids_to_tokens(range(len(first)))
    assert len(second) == len(first) + 3


# The shipped weights ------------------------------------------------------------------------------------------------


def right_answers(name: str, method: str, budget: float, documents: int) -> int:
    """Of fresh square forms and signs."""
    backbone, right = load_backbone(name), 0
    for task in ("tiny_docvqa_val", "tiny_textvqa_val"):
        drawn = generate(task, 4_000_003, 2 * documents)[::2]
        for document in drawn:
            chat = user(document.image, upstream_prompt(task, document.row))
            inputs = build_inputs(backbone.processor, [chat], MediaSettings(pad_square=True))
            tokens = backbone.generate(inputs, build(method), budget, max_new_tokens=4)
            right += backbone.processor.tokenizer.decode(tokens[0], skip_special_tokens=True) == document.answer
    return right


def test_embedded_checkpoints_are_there_by_name() -> None:
    for name in EMBEDDED:
        assert (checkpoint(name) / "README.md").is_file()
        assert (checkpoint(name) / "model.safetensors").stat().st_size < 8_000_000
    assert load_backbone("tiny-llava").model.config.model_type == "llava"


def test_trained_fusion_answers_where_pooling_does_not() -> None:
    """Guards the shipped weights: 16 fused tokens tell what 64 tell, 16 averaged ones do not."""
    assert right_answers("tiny-llava", "full", 1.0, 12) >= 22
    assert right_answers("tiny-llava-stf", "full", 1.0, 12) >= right_answers("tiny-llava", "pooling", 0.25, 12) + 6
