"""The trainer of the embedded checkpoint: equal to the stock forward, learns, resumes, never sees what sweeps ask."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from battery import draw_image, user
from safetensors.torch import load_file

from visionselector_eval.baselines import build
from visionselector_eval.harness import cli
from visionselector_eval.harness.training.tiny import batches, network, stages
from visionselector_eval.harness.training.tiny.lessons import lesson, upstream_prompt
from visionselector_eval.models import load_backbone
from visionselector_eval.models.inputs import MediaSettings, build_inputs
from visionselector_eval.tasks.tiny import EVALUATION_SEED, generate

# The wordings that lmms-eval's qwen2_5_vl gives for each mirror, without what the document says.
ENDINGS = {
    "tiny_docvqa_val": "?\nAnswer the question using a single word or phrase.",
    "tiny_chartqa": "?\nAnswer the question with a single word.",
    "tiny_textvqa_val": " sign say?\nAnswer the question using a single word or phrase.",
    "tiny_pope": " in the image?\nAnswer the question using a single word or phrase.",
    "tiny_mme": "?\nAnswer the question using a single word or phrase.",
    "tiny_scienceqa_img": "\nAnswer with the option's letter from the given choices directly.",
    "tiny_mvbench_moving_direction": "\nOnly give the best option.\n",
}


@pytest.mark.parametrize(
    "text", ["", "What is the Tax?\nAnswer", "naïve 漢字 🙂 \t\n x", "hundred starfish", "To the left (A) no nothing"]
)
def test_any_text_survives_the_tokenizer(text: str) -> None:
    tokens = network.tokenizer()
    assert tokens.decode(tokens(text)["input_ids"], clean_up_tokenization_spaces=False) == text


@pytest.mark.parametrize("name", batches.KINDS)
def test_training_documents_are_not_those_that_sweeps_ask(name: str) -> None:
    asked = batches.evaluation_digests()
    for seed in (batches.TRAIN_SEED, batches.CHECK_SEED):
        made = [d.digest() for scene in range(8) for d in batches.documents(name, seed, scene)]
        assert len(set(made)) == len(made)
        assert not asked & set(made)
    with pytest.raises(ValueError, match="evaluation"):
        batches.documents(name, EVALUATION_SEED, 0)


@pytest.mark.parametrize("name", batches.KINDS)
def test_questions_have_upstreams_ending(name: str) -> None:
    document = generate(name, 5, 2)[0]
    assert upstream_prompt(name, document.row).endswith(ENDINGS[name])
    made = lesson(name, document, np.random.default_rng(0))
    assert made.questions
    assert len(made.cells) == len(made.shows) == len(made.groups) == len(made.partners)


@pytest.mark.parametrize("name", ["tiny_docvqa_val", "tiny_mvbench_moving_direction"])
def test_the_batched_forward_is_the_stock_one(name: str) -> None:
    model = network.create(0).eval()
    net, packer = network.Network(model), batches.Packer()
    made = [lesson(name, generate(name, 5, 2)[1], np.random.default_rng(0))]
    batch = packer.pack(made, np.random.default_rng(0), 1.0, only_asked=True)
    t, h, w = batch["grid"]
    frames = batch["pixels"][0].permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(network.IMAGE_PROCESSOR[k]).view(1, 3, 1, 1) for k in ("image_mean", "image_std"))
    frames = (frames - mean) / std
    frames = frames.repeat(2, 1, 1, 1) if t == 1 else frames
    x = frames.view(t, 2, 3, h, 2, 14, w, 2, 14).permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(t * h * w * 4, -1)
    with torch.no_grad():
        features = net.vision(batch["pixels"])
        torch.testing.assert_close(
            features[0], model.model.visual(x, torch.tensor([[t, 2 * h, 2 * w]])).pooler_output, atol=2e-4, rtol=1e-3
        )
        hidden = stages._text(net, batch, features, packer.prefix)[0]
        length = int((batch["segments"][0] == 1).sum())
        pad = model.config.image_token_id if t == 1 else model.config.video_token_id
        ids = torch.tensor([[*packer.prefix, *[pad] * (t * h * w), *batch["ids"][0, :length].tolist()]])
        pixels = {"pixel_values": x, "image_grid_thw": torch.tensor([[1, 2 * h, 2 * w]])}
        if t > 1:
            pixels = {"pixel_values_videos": x, "video_grid_thw": torch.tensor([[t, 2 * h, 2 * w]]),
                      "second_per_grid_ts": torch.tensor([1.0])}  # fmt: skip
        kinds = (ids == pad).long() * (1 if t == 1 else 2)
        stock = model(input_ids=ids, attention_mask=torch.ones_like(ids), mm_token_type_ids=kinds, **pixels).logits[0]
    torch.testing.assert_close(net.logits(hidden[:length]), stock[-length:], atol=1e-2, rtol=1e-2)


def test_a_few_steps_learn_and_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path: Path) -> None:
    losses = stages.train_stage("joint", tmp_path / "whole", 6, size=2, save_every=3, check=0)
    assert losses[-1] < losses[0]
    stages.train_stage("joint", tmp_path / "parts", 6, size=2, save_every=3, check=0, stop=3)
    rest = stages.train_stage("joint", tmp_path / "parts", 6, size=2, save_every=3, check=0)
    np.testing.assert_allclose(rest, losses[3:], rtol=1e-5)


def test_train_tiny_makes_a_checkpoint_with_everything_in_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = ["--vision-steps", "1", "--language-steps", "1", "--joint-steps", "1", "--learned-steps", "1"]
    flags = ["--output", str(tmp_path / "work"), *small, "--documents", "2", "--check", "2"]
    assert cli.main(["train", "tiny", *flags]) == 0
    folder = tmp_path / "work" / "checkpoint"
    weights = load_file(folder / "model.safetensors")
    assert {t.dtype for t in weights.values()} == {torch.bfloat16}
    assert sum("importance_scorer" in name for name in weights) == 4
    assert any("image_score_predictor" in name for name in weights)
    assert "| tiny_docvqa_val | " in (folder / "README.md").read_text()
    stages_logged = {json.loads(line)["stage"] for line in (folder / "training.jsonl").read_text().splitlines()}
    assert stages_logged == {"vision", "language", "joint", "scorer", "predictor"}

    backbone = load_backbone(str(folder))
    inputs = build_inputs(backbone.processor, [user(draw_image(224, 224), "What is the Tax?")], MediaSettings())
    for name in ("visionselector", "dynamic_qwen"):
        assert len(backbone.prefill(inputs, build(name), 0.25).kept[0]) == 16

    capsys.readouterr()
    other = [*flags[:2], *small, "--documents", "4"]
    for arguments, reason in (
        (other, "holds a training with other settings"),
        (["--output", str(Path(__file__).parent)], "holds something else"),
        (["--stages", "vison"], "stages"),
        (["--budget", "0.2"], "no setting of `train tiny`"),
    ):
        assert cli.main(["train", "tiny", *arguments]) == 2
        assert reason in capsys.readouterr().err.splitlines()[-1]


def test_the_embedded_checkpoint_answers_what_it_was_trained_on() -> None:
    """Guards the shipped weights: all tokens answer, a random tenth does not."""
    backbone = load_backbone("tiny")
    documents = generate("tiny_docvqa_val", 4_000_003, 12)
    chats = [user(d.image, upstream_prompt("tiny_docvqa_val", d.row)) for d in documents]
    right = {}
    for name, budget in (("full", 1.0), ("visionselector", 0.1), ("random", 0.1)):
        answers = []
        for chat in chats:
            inputs = build_inputs(backbone.processor, [chat], MediaSettings())
            tokens = backbone.generate(inputs, build(name), budget, max_new_tokens=4)
            answers.append(backbone.processor.tokenizer.decode(tokens[0], skip_special_tokens=True))
        right[name] = sum(a == d.answer for a, d in zip(answers, documents, strict=True))
    assert right["full"] >= 11
    assert right["visionselector"] >= 9
    assert right["random"] <= 6
