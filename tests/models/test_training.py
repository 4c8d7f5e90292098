"""Training end to end on the embedded checkpoint: data, losses in the model, resuming, several processes, export."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration, TrainerCallback

from visionselector_eval.baselines import Host, InputError, build
from visionselector_eval.baselines.contract.budget import Share
from visionselector_eval.models import load_backbone
from visionselector_eval.models.dynamic_qwen import Predictor
from visionselector_eval.models.inputs import MediaSettings, build_inputs
from visionselector_eval.models.training import export
from visionselector_eval.models.training.data import IGNORED, Collator, Conversations, Tokeniser, Unusable
from visionselector_eval.models.training.learners import PredictorLearner, SelectorLearner
from visionselector_eval.models.training.records import MediaPaths, parse_record
from visionselector_eval.models.training.spec import PredictorSpec, SelectorSpec
from visionselector_eval.models.training.trainer import TrainingPlan, TrainingStopped, last_checkpoint, train
from visionselector_eval.models.visionselector import Scorer

SETTINGS = MediaSettings()


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL file of 6 conversations about images of several sizes."""
    folder = tmp_path_factory.mktemp("samples")
    rng = np.random.default_rng(0)
    lines = []
    for i in range(6):
        size = (56 + 28 * (i % 3), 84 + 28 * (i % 2), 3)
        Image.fromarray(rng.integers(0, 255, size, dtype=np.uint8)).save(folder / f"{i}.png")
        turns = [{"from": "human", "value": "<image>\nWhat is it" + "?" * i}, {"from": "gpt", "value": f"cat {i}"}]
        lines.append(json.dumps({"image": f"{i}.png", "conversations": turns}))
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "train.jsonl"


def selector_spec(data: Path, output: Path | None = None, **fields: Any) -> SelectorSpec:
    small = {"max_steps": 6, "batch_size": 2, "accumulation": 1, "learning_rate": 3e-3, "log_steps": 2, "save_steps": 2}
    small |= {"report_to": "none", "device": "cpu", "output": str(output or "unused"), "data": [str(data)]}
    return SelectorSpec.make({**small, **fields})


def predictor_spec(data: Path, output: Path | None = None, **fields: Any) -> PredictorSpec:
    small = selector_spec(data, output).model_dump(include={*PredictorSpec.model_fields} - {"hidden", "upstream_exact"})
    return PredictorSpec.make({**small, "hidden": 16, "blocks": 1, **fields})


def fresh_tiny() -> Any:
    """A backbone of its own: learners freeze it and choose its attention."""
    return load_backbone("tiny")


def batch_of(backbone: Any, data: Path, numbers: list[int], side: str = "left") -> dict[str, Any]:
    conversations = Conversations([data], MediaPaths(), Tokeniser(backbone.processor, SETTINGS, 4096))
    return Collator(backbone.processor.tokenizer.pad_token_id, side)([conversations[i] for i in numbers])  # type: ignore[arg-type]


# --- data -------------------------------------------------------------------------------------------------------------


def test_only_answers_are_learned_and_the_prompt_is_the_one_of_inference(tiny, samples, tmp_path):
    record = {
        "image": ["0.png", "1.png"],
        "conversations": [
            {"from": "human", "value": "<image><image>Which is larger?"},
            {"from": "gpt", "value": "the first"},
            {"from": "human", "value": "And darker?"},
            {"from": "gpt", "value": "no"},
        ],
    }
    conversation = parse_record(record, samples, "here:1", MediaPaths())
    sample = Tokeniser(tiny.processor, SETTINGS, 4096)(conversation)
    decode = tiny.processor.tokenizer.decode
    spoken = sample["input_ids"][sample["labels"] != IGNORED]
    assert decode(spoken) == "the first<|im_end|>\nno<|im_end|>\n"
    assert torch.equal(sample["labels"][sample["labels"] != IGNORED], spoken)
    images = [{"type": "image", "image": str(samples.parent / name)} for name in ("0.png", "1.png")]
    asked = build_inputs(
        tiny.processor,
        [[{"role": "user", "content": [*images, {"type": "text", "text": "Which is larger?"}]}]],
        SETTINGS,
    )
    length = asked["input_ids"].shape[1]
    assert torch.equal(sample["input_ids"][:length], asked["input_ids"][0])
    assert torch.equal(sample["pixel_values"], asked["pixel_values"])
    assert torch.equal(sample["image_grid_thw"], asked["image_grid_thw"])
    whole = tiny.processor.apply_chat_template(conversation.messages, tokenize=False)
    squeezed = decode(sample["input_ids"]).replace("<|image_pad|>", "")
    assert squeezed == whole.replace("<|image_pad|>", "")


def test_an_answer_of_two_tokens_has_four_labels_and_the_break_behind_a_image_stays(tiny, samples):
    tokenizer = tiny.processor.tokenizer
    answer = "xz"
    two = tokenizer(answer, add_special_tokens=False).input_ids
    assert len(two) == 2
    turns = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": answer}]
    record = parse_record({"image": "0.png", "conversations": turns}, samples, "here:1", MediaPaths())
    sample = Tokeniser(tiny.processor, SETTINGS, 4096)(record)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    (newline,) = tokenizer("\n", add_special_tokens=False).input_ids
    assert sample["labels"][sample["labels"] != IGNORED].tolist() == [*two, end, newline]
    assert "<|vision_end|>\nWhat is it?<|im_end|>" in tokenizer.decode(sample["input_ids"])


def test_records_in_both_layouts_and_markers():
    file = Path("/data/x.jsonl")

    def messages(record: dict[str, Any]) -> list[Any]:
        return parse_record(record, file, "x.jsonl:1", MediaPaths(Path("/img"))).messages

    plain = {"image": "a.png", "messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]}
    image = {"type": "image", "image": Path("/img/a.png")}
    assert messages(plain)[0]["content"] == [image, {"type": "text", "text": "Q"}]
    middle = {
        "images": ["a.png"],
        "conversations": [
            {"from": "system", "value": "S"},
            {"from": "human", "value": "Look <image>\nhere"},
            {"from": "gpt", "value": "A"},
        ],
    }
    assert messages(middle)[1]["content"] == [
        {"type": "text", "text": "Look "},
        image,
        {"type": "text", "text": "\nhere"},
    ]
    without = {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}
    assert messages(without)[0]["content"] == [{"type": "text", "text": "Q"}]


TURNS = [{"from": "human", "value": "<image>\nQ"}, {"from": "gpt", "value": "A"}]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("{", "not a JSON object"),
        ("[", "write one object a line"),
        ("[1]", "is a JSON object, got list"),
        (json.dumps({"image": "a.png"}), "key 'conversations' is missing"),
        (json.dumps({"image": "a.png", "conversations": [{"from": "human"}]}), "key 'value' is missing in turn 1"),
        (json.dumps({"image": "a.png", "conversations": [{"value": "x"}]}), "key 'from' is missing in turn 1"),
        (json.dumps({"image": "a.png", "conversations": [{"from": "bot", "value": "x"}]}), "from 'bot'"),
        (json.dumps({"image": "a.png", "conversations": TURNS[:1]}), "last turn must be an answer"),
        (json.dumps({"image": "a.png", "conversations": TURNS[1:]}), "first turn must be a question"),
        (json.dumps({"conversations": TURNS}), "1 <image> markers but 0 images"),
        (json.dumps({"image": 3, "conversations": TURNS}), "must be a path"),
        (json.dumps({"image": "/abs/a.png", "conversations": TURNS}), "image_paths=absolute"),
        (json.dumps({"image": "../a.png", "conversations": TURNS}), "leaves image_root"),
        (json.dumps({"image": "gone.png", "conversations": TURNS}), "not found"),
        (json.dumps({"image": "a.png", "conversations": [TURNS[0], {"from": "gpt", "value": " "}]}), "answer is empty"),
    ],
)
def test_a_bad_line_is_named_before_the_training_begins(tmp_path, line, reason):
    Image.new("RGB", (56, 56)).save(tmp_path / "a.png")
    good = json.dumps({"image": "a.png", "conversations": TURNS})
    file = tmp_path / "bad.jsonl"
    file.write_text(f"{good}\n\n{line}\n")
    with pytest.raises(InputError, match=reason) as caught:
        Conversations([file], MediaPaths())
    assert str(caught.value).startswith(f"{file}:3: ")
    assert "\n" not in str(caught.value)


def test_a_relative_path_is_refused_where_paths_are_absolute(tmp_path):
    file = tmp_path / "x.jsonl"
    file.write_text(json.dumps({"image": "a.png", "conversations": TURNS}) + "\n")
    with pytest.raises(InputError, match="is relative, but image_paths=absolute"):
        Conversations([file], MediaPaths(policy="absolute"))


@pytest.mark.parametrize("shown", ["bytes", "struct", "path"])
def test_parquet_of_image_question_answer(tiny, tmp_path, shown):
    import datasets

    Image.new("RGB", (56, 84), "teal").save(tmp_path / "a.png")
    raw = (tmp_path / "a.png").read_bytes()
    image = {"bytes": raw, "struct": {"bytes": raw, "path": None}, "path": "a.png"}[shown]
    rows = datasets.Dataset.from_list([{"image": image, "question": "Q?", "answer": ["teal", "blue"], "more": 1}] * 3)
    if shown == "struct":
        rows = rows.cast_column("image", datasets.Image())
    rows.to_parquet(str(tmp_path / "x.parquet"))
    conversations = Conversations([tmp_path / "x.parquet"], MediaPaths(), Tokeniser(tiny.processor, SETTINGS, 4096))
    assert len(conversations) == 3
    sample = conversations[2]
    assert isinstance(sample, dict)
    assert sample["place"] == f"{tmp_path / 'x.parquet'}:3"
    assert tiny.processor.tokenizer.decode(sample["labels"][sample["labels"] >= 0]) == "teal<|im_end|>\n"
    rows.remove_columns("answer").to_parquet(str(tmp_path / "y.parquet"))
    with pytest.raises(InputError, match="column 'answer' is missing"):
        Conversations([tmp_path / "y.parquet"], MediaPaths())


def test_samples_that_cannot_be_used_stop_or_are_left_out(tiny, samples):
    conversations = Conversations([samples], MediaPaths(), Tokeniser(tiny.processor, SETTINGS, 30))
    unusable = conversations[0]
    assert isinstance(unusable, Unusable)
    assert "train.jsonl:1: the sample has" in unusable.reason
    assert "context holds 30" in unusable.reason
    good = Conversations([samples], MediaPaths(), Tokeniser(tiny.processor, SETTINGS, 4096))[1]
    assert Collator(0)([unusable, good])["error"] == unusable.reason
    left = Collator(0, skip=True)([unusable, good])
    assert (left["error"], left["skipped"], len(left["input_ids"])) == (None, [unusable.reason], 1)


# --- the forward ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["selector", "predictor"])
def test_padding_side_and_checkpointing_change_nothing(samples, kind):
    made = []
    for fields in ({}, {"padding_side": "right"}, {"gradient_checkpointing": False}):
        spec = (selector_spec if kind == "selector" else predictor_spec)(samples, **fields)
        backbone = fresh_tiny()
        learner = (SelectorLearner if kind == "selector" else PredictorLearner).build(backbone, spec)  # type: ignore[arg-type]
        torch.manual_seed(0)
        outcome = learner(batch_of(backbone, samples, [0, 1, 2, 5], spec.padding_side), 3, 10)
        outcome.loss.backward()
        made.append((outcome.loss.item(), [p.grad.clone() for p in learner.parameters()]))
        assert all(p.grad is None for p in backbone.model.parameters())
    for loss, gradients in made[1:]:
        assert loss == pytest.approx(made[0][0], abs=2e-5)
        for mine, first in zip(gradients, made[0][1], strict=True):
            torch.testing.assert_close(mine, first, atol=2e-6, rtol=2e-3)


def test_a_full_mask_gives_the_stock_models_loss(samples):
    backbone = fresh_tiny()
    batch = batch_of(backbone, samples, [0, 3])
    stock = backbone.model(
        **{k: batch[k] for k in ("input_ids", "attention_mask", "pixel_values", "image_grid_thw", "labels")},
        mm_token_type_ids=(batch["input_ids"] == backbone.model.config.image_token_id).int(),
    ).loss
    learner = SelectorLearner.build(backbone, selector_spec(samples, gradient_checkpointing=False))
    prompt, encoded, owners = learner._read(batch)
    features = [item.features for row in encoded.rows for item in row]
    ours = learner._language_loss(prompt, learner._joined(prompt, features), batch["labels"])
    assert owners == [0, 1]
    torch.testing.assert_close(ours, stock)


def test_scope_is_the_image_or_the_micro_batch(samples):
    backbone = fresh_tiny()
    batch = batch_of(backbone, samples, [0, 1, 2])
    own = SelectorLearner.build(backbone, selector_spec(samples))(batch, 0, 10)
    sizes = [6, 12, 12]
    assert own.parts["kept_share"].item() == pytest.approx((1 + 2 + 2) / sum(sizes))
    packed = SelectorLearner.build(backbone, selector_spec(samples, upstream_exact=True))(batch, 0, 10)
    assert packed.parts["kept_share"].item() == pytest.approx(int(0.2 * sum(sizes)) / sum(sizes))
    with pytest.raises(InputError, match=r"train.jsonl:1: budget 16tok keeps 6 of 6"):
        SelectorLearner.build(backbone, selector_spec(samples, budget="16tok"))(batch, 0, 10)


def test_images_with_too_few_tokens_are_left_out_where_asked(samples):
    backbone = fresh_tiny()
    spec = selector_spec(samples, budget="6tok", on_bad_sample="skip", lambda_start=0.0)
    made = SelectorLearner.build(backbone, spec)
    both = made(batch_of(backbone, samples, [0, 1]), 0, 10)  # 6 and 12 tokens
    alone = made(batch_of(backbone, samples, [1]), 0, 10)
    assert both.left_out == (f"{samples}:1: budget 6tok keeps 6 of 6 visual tokens, and training needs 0 < k < N: "
                             "give larger images (min_pixels) or another budget",)  # fmt: skip
    torch.testing.assert_close(both.loss, alone.loss, atol=1e-5, rtol=1e-5)
    assert both.parts["kept_share"].item() == 0.5
    none = made(batch_of(backbone, samples, [0]), 0, 10)
    none.loss.backward()
    assert (none.loss.item(), len(none.left_out)) == (0.0, 1)


def test_dropped_tokens_are_not_seen_and_samples_do_not_see_each_other(samples):
    backbone = fresh_tiny()
    learner = PredictorLearner.build(backbone, predictor_spec(samples, gradient_checkpointing=False))
    batch = batch_of(backbone, samples, [0, 1])
    prompt, encoded, _ = learner._read(batch)
    features = [item.features for row in encoded.rows for item in row]

    def hidden(keep: float, changed: bool = False) -> torch.Tensor:
        """States of the last text token of each row after the last layer, with all visual tokens kept or dropped."""
        seen: list[torch.Tensor] = []
        with torch.no_grad():
            learner.learned.head[-1].weight.zero_()
            learner.learned.head[-1].bias.copy_(torch.tensor([60.0, -60.0]) * keep)
        shown = [f + 1.0 if changed and i == 0 else f for i, f in enumerate(features)]
        last = backbone.layer_access.layers[-1].register_forward_hook(lambda m, a, out: seen.append(out[:, -1]))
        try:
            with learner._policy(prompt.visual, [[len(f)] for f in features], 1.0):
                learner._language_loss(prompt, learner._joined(prompt, shown), batch["labels"])
        finally:
            last.remove()
        return seen[0].detach()

    kept, dropped = hidden(1.0), hidden(-1.0)
    assert not torch.allclose(kept, dropped, atol=1e-3)
    other = hidden(1.0, changed=True)
    assert not torch.allclose(other[0], kept[0], atol=1e-4)
    assert torch.equal(other[1], kept[1])
    stock = fresh_tiny()
    plain = SelectorLearner.build(stock, selector_spec(samples, gradient_checkpointing=False))
    seen: list[torch.Tensor] = []
    stock.layer_access.layers[-1].register_forward_hook(lambda m, a, out: seen.append(out[:, -1]))
    plain._language_loss(prompt, plain._joined(prompt, features), batch["labels"])
    torch.testing.assert_close(kept, seen[0], atol=1e-3, rtol=1e-3)  # eps alone differs


def test_text_alone_trains_nothing_but_runs(tiny, samples, tmp_path):
    file = tmp_path / "text.jsonl"
    file.write_text(json.dumps({"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]}))
    backbone = fresh_tiny()
    for learner in (
        SelectorLearner.build(backbone, selector_spec(samples)),
        PredictorLearner.build(backbone, predictor_spec(samples)),
    ):
        outcome = learner(batch_of(backbone, file, [0]), 0, 10)
        outcome.loss.backward()
        assert all(p.grad is not None and not p.grad.any() for p in learner.parameters())


def test_a_bfloat16_backbone_trains_a_float32_scorer(samples):
    backbone = load_backbone("tiny", dtype="bfloat16")
    learner = SelectorLearner.build(backbone, selector_spec(samples))
    outcome = learner(batch_of(backbone, samples, [0, 1]), 0, 10)
    outcome.loss.backward()
    assert {p.grad.dtype for p in learner.parameters()} == {torch.float32}


# --- real sizes -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("width", "layers", "heads", "scorer"), [(2048, 36, (16, 2), 4_196_352), (3584, 28, (28, 4), 12_848_640)]
)
def test_parameters_of_the_real_backbones(width, layers, heads, scorer):
    """Qwen2.5-VL 3B and 7B without memory: only the scorer or the predictor is trained."""
    text = {"hidden_size": width, "num_hidden_layers": layers, "intermediate_size": 11008}
    text |= {"num_attention_heads": heads[0], "num_key_value_heads": heads[1]}
    config = Qwen2_5_VLConfig(
        text_config={**text, "rope_parameters": {"rope_type": "default", "mrope_section": [16, 24, 24]}},
        vision_config={"out_hidden_size": width, "hidden_size": 1280, "depth": 32},
    )
    with torch.device("meta"):
        model: Any = Qwen2_5_VLForConditionalGeneration(config)
        backbone = _Meta(model)
        selector = SelectorLearner.build(backbone, selector_spec(Path("x.jsonl")))  # type: ignore[arg-type]
        assert sum(p.numel() for p in selector.parameters()) == scorer
        assert {n for n, p in selector.named_parameters() if p.requires_grad} == {
            f"learned.{x}_proj.{part}" for x in "qk" for part in ("weight", "bias")
        }
        predictor = PredictorLearner.build(backbone, predictor_spec(Path("x.jsonl"), hidden=512, blocks=2))  # type: ignore[arg-type]
        assert predictor.learned.in_proj.weight.shape == (512, width)
    assert not any(p.requires_grad for p in model.parameters())


class _Meta:
    """As much of a backbone as building a learner needs."""

    def __init__(self, model: Any) -> None:
        from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import apply_rotary_pos_emb

        from visionselector_eval.models.decoder_view import LayerAccess

        self.model, self.id, self.device = model, "meta", torch.device("meta")
        self.width = model.config.text_config.hidden_size
        self.depth = model.config.text_config.num_hidden_layers
        self.layer_access = LayerAccess(model.model.language_model, apply_rotary_pos_emb)


# --- training ---------------------------------------------------------------------------------------------------------


class KillAt(TrainerCallback):
    """Ends the training after a step, as a kill would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("make", "weights"), [(selector_spec, "scorer.safetensors"), (predictor_spec, "predictor.safetensors")]
)
def test_a_killed_training_ends_with_the_same_weights(
    samples: Path, tmp_path: Path, make: Callable[..., Any], weights: str
):
    undisturbed = train(make(samples, tmp_path / "a"))
    with pytest.raises(KeyboardInterrupt):
        train(make(samples, tmp_path / "b"), callbacks=[KillAt(5)])
    assert not (tmp_path / "b" / weights).exists()
    torn = tmp_path / "b" / "checkpoints" / "checkpoint-5"  # cut off while it was written
    torn.mkdir()
    (torn / "model.safetensors").touch()
    resumed = train(make(samples, tmp_path / "b"))
    first, second = (load_file(tmp_path / name / weights) for name in "ab")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert resumed.metrics == undisturbed.metrics  # type: ignore[union-attr]
    logs = [[json.loads(line) for line in (tmp_path / n / "log.jsonl").read_text().splitlines()] for n in "ab"]
    assert [e for e in logs[0] if "loss" in e] == [e for e in logs[1] if "loss" in e]
    again = train(make(samples, tmp_path / "b"))
    assert (again.fresh, again.steps) == (False, 6)  # type: ignore[union-attr]
    with pytest.raises(InputError, match=r"another training \(learning_rate=0.003, not 0.1\)"):
        train(make(samples, tmp_path / "b", learning_rate=0.1))


def test_a_trained_scorer_is_used_and_its_folder_says_how_it_came_to_be(samples, tmp_path, tiny):
    result = train(selector_spec(samples, tmp_path / "out"))
    config = json.loads((tmp_path / "out" / "scorer_config.json").read_text())
    assert config["width"] == tiny.width
    assert config["parameters"] == 2 * (tiny.width * (tiny.width // 2) + tiny.width // 2)
    assert config["backbone"]["id"] == "tiny"
    assert config["backbone"]["family"] == "qwen2_5_vl"
    assert config["training"]["learning_rate"] == 3e-3
    assert config["data"]["samples"] == 6
    assert len(config["data"]["sha256"]) == 64
    for name in ("loss", "loss_language", "loss_mask", "mask_entropy", "lambda"):
        assert name in config["metrics"], name
    assert "scorer" in (tmp_path / "out" / "README.md").read_text()
    compressor = build("visionselector", scorer=str(result.folder))
    before = build("visionselector", scorer=Scorer(tiny.width))
    assert compressor.fingerprint() != before.fingerprint()
    compressor.bind(Host(id="tiny", width=tiny.width))
    dry = train(selector_spec(samples, tmp_path / "other"), dry_run=True)
    assert isinstance(dry, TrainingPlan)
    assert (dry.samples, dry.steps, dry.parameters, dry.effective) == (6, 6, config["parameters"], 2)
    assert not (tmp_path / "other").exists()


def test_a_trained_predictor_is_used(samples, tmp_path, tiny):
    result = train(predictor_spec(samples, tmp_path / "out"))
    assert {"tau", "kept_share", "loss_keep"} <= set(result.metrics)  # type: ignore[union-attr]
    build("dynamic_qwen", predictor=str(result.folder)).bind(Host(id="tiny", width=tiny.width, depth=4))


def test_training_lowers_the_loss(samples, tmp_path):
    """Nothing about quality: 40 steps on 6 samples fit the mask."""
    train(selector_spec(samples, tmp_path, max_steps=40, learning_rate=1e-2, lambda_start=2.0, save_steps=100))
    entries = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    losses = [e["loss_mask"] for e in entries if "loss_mask" in e]
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_nan_stops_and_keeps_the_last_good_checkpoint(samples, tmp_path, what):
    class Poison(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 3:
                weight = model.learned.k_proj.weight
                if what == "loss":
                    with torch.no_grad():
                        weight.fill_(torch.nan)
                else:
                    weight.register_hook(lambda g: g * torch.nan)

    with pytest.raises(TrainingStopped, match=r"at step 3.*last good checkpoint is .*checkpoint-2"):
        train(selector_spec(samples, tmp_path), callbacks=[Poison()])
    kept = last_checkpoint(tmp_path / "checkpoints")
    assert kept is not None
    assert kept.name == "checkpoint-2"
    assert all(t.isfinite().all() for t in load_file(kept / "model.safetensors").values())
    assert not (tmp_path / "scorer.safetensors").exists()
    train(selector_spec(samples, tmp_path))  # and goes on from there


def test_bad_samples_are_left_out_where_asked(samples, tmp_path):
    broken = tmp_path / "broken.jsonl"
    turns = [{"from": "human", "value": "<image>\nQ"}, {"from": "gpt", "value": "A"}]
    (samples.parent / "bad.png").write_bytes(b"no image")
    broken.write_text(json.dumps({"image": "bad.png", "conversations": turns}) + "\n")
    fields: dict[str, Any] = {"image_root": str(samples.parent), "epochs": 1, "max_steps": None}
    both = tmp_path / "both.jsonl"
    both.write_text(samples.read_text() + broken.read_text())
    with pytest.raises(InputError, match=r"both.jsonl:7: image .* can't be read"):
        train(selector_spec(both, tmp_path / "a", **fields))
    train(selector_spec(both, tmp_path / "b", on_bad_sample="skip", **fields))
    config = json.loads((tmp_path / "b" / "scorer_config.json").read_text())
    assert (config["data"]["samples"], config["data"]["skipped"], config["steps"]) == (7, 1, 4)


COMMAND = [sys.executable, "-m", "visionselector_eval.harness.cli"]


def flags(spec: SelectorSpec) -> list[str]:
    given = {k: v for k, v in spec.model_dump().items() if k in spec.model_fields_set}
    return [
        x for k, v in given.items() for x in (f"--{k.replace('_', '-')}", *(v if isinstance(v, list) else [str(v)]))
    ]


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.mark.slow
def test_sigkill_and_the_same_command_again(samples, tmp_path):
    spec = selector_spec(samples, tmp_path / "b", max_steps=60)
    command = [*COMMAND, "train", "visionselector", *flags(spec)]
    process = subprocess.Popen(command, env=environment(), stderr=subprocess.DEVNULL)
    for _ in range(600):
        if last_checkpoint(tmp_path / "b" / "checkpoints"):
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "b" / "scorer.safetensors").exists()
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    train(selector_spec(samples, tmp_path / "a", max_steps=60))
    first, second = (load_file(tmp_path / name / "scorer.safetensors") for name in "ab")
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.slow
def test_two_processes_give_what_one_with_twice_the_accumulation_gives(samples, tmp_path):
    spec = selector_spec(samples, tmp_path / "two", batch_size=1, max_steps=4)
    # `--cpu` would start one process (or MPI); `--multi_gpu` is accelerate's word for torchrun, on CPUs as well.
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    done = subprocess.run(
        [*launch, "-m", "visionselector_eval.harness.cli", "train", "visionselector", *flags(spec)],
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("visionselector weights:") == 1
    config = json.loads((tmp_path / "two" / "scorer_config.json").read_text())
    assert (config["processes"], config["steps"]) == (2, 4)
    train(selector_spec(samples, tmp_path / "one", batch_size=1, accumulation=2, max_steps=4))
    two, one = (load_file(tmp_path / name / "scorer.safetensors") for name in ("two", "one"))
    for name in ("q_proj.weight", "k_proj.weight", "k_proj.bias"):  # that of q has no gradient but rounding
        torch.testing.assert_close(two[name], one[name], atol=1e-5, rtol=1e-3)


# --- export -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["visionselector", "dynamic-qwen"])
@pytest.mark.parametrize("sharded", [False, True])
def test_export_to_a_full_checkpoint_and_back(tmp_path, tiny, kind, sharded):
    stored = export.KINDS[kind]
    torch.manual_seed(0)
    module = Scorer(tiny.width) if kind == "visionselector" else Predictor(tiny.width, 16, blocks=1)
    export.save_learned(tmp_path / "learned", module, stored, {"backbone": {"id": "tiny"}})
    backbone = "tiny"
    if sharded:
        from visionselector_eval.models.tiny import checkpoint

        backbone = str(tmp_path / "shards")
        _shard(checkpoint(), tmp_path / "shards")
    full = export.export_checkpoint(tmp_path / "learned", tmp_path / "full", backbone)
    names = {n for f in full.glob("*.safetensors") for n in load_file(f)}
    if kind == "visionselector":
        assert {f"visual.importance_scorer.{x}_proj.{part}" for x in "qk" for part in ("weight", "bias")} <= names
    loaded = load_backbone(str(full))
    assert torch.equal(loaded.model.lm_head.weight, tiny.model.lm_head.weight)
    compressor = build(stored.method)
    bound = loaded.bind(compressor)
    given = build(stored.method, **{stored.name: str(tmp_path / "learned")}).bind(tiny.host)
    for mine, theirs in zip(bound._module.parameters(), given._module.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    export.extract_learned(str(full), tmp_path / "back", stored)
    first, second = (load_file(tmp_path / name / stored.file) for name in ("learned", "back"))
    assert all(torch.equal(first[name], second[name]) for name in first)
    with pytest.raises(InputError, match="already exists"):
        export.export_checkpoint(tmp_path / "learned", tmp_path / "full")


def _shard(source: Path, folder: Path) -> None:
    folder.mkdir()
    for file in source.iterdir():
        if file.suffix != ".safetensors":
            (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(source / "model.safetensors")
    names = sorted(tensors)
    places = {}
    for number, part in enumerate((names[::2], names[1::2])):
        shard = f"model-{number}.safetensors"
        save_file({name: tensors[name] for name in part}, folder / shard, metadata={"format": "pt"})
        places |= dict.fromkeys(part, shard)
    size = sum(t.nbytes for t in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_export_of_what_does_not_fit(tmp_path):
    with pytest.raises(InputError, match="no result of a training"):
        export.export_checkpoint(tmp_path, tmp_path / "out")
    export.save_learned(tmp_path / "wide", Scorer(96), export.KINDS["visionselector"], {"backbone": {"id": "tiny"}})
    with pytest.raises(InputError, match="width 96 but backbone tiny"):
        export.export_checkpoint(tmp_path / "wide", tmp_path / "out")
    assert not (tmp_path / "out").exists()


# --- spec -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"learning_rat": 1}, "did you mean 'learning_rate'"),
        ({"budget": 1.0}, "keeps every visual token"),
        ({"budget": 0}, "invalid budget 0: expected "),
        ({"data": []}, "on which data"),
        ({"batch_size": 0}, "greater than or equal to 1"),
        ({"report_to": "tensorbord"}, "did you mean 'tensorboard'"),
        ({"min_pixels": 10, "max_pixels": 5}, "min <= max"),
        ({"lambda_start": -1}, "lambda_start"),
    ],
)
def test_a_bad_spec_is_one_line(fields, reason):
    with pytest.raises(InputError, match=reason) as caught:
        SelectorSpec.make({"data": ["x.jsonl"], **fields})
    assert "\n" not in str(caught.value)


def test_published_settings_are_the_defaults():
    real = SelectorSpec.make({"data": ["x"], "pretrained": "Qwen/Qwen2.5-VL-7B-Instruct"})
    assert (real.learning_rate, real.schedule, real.warmup, real.weight_decay, real.clip) == (
        5e-5,
        "cosine",
        0.03,
        0,
        1,
    )
    assert (real.epochs, real.batch_size, real.accumulation, real.seed, real.budget) == (1, 16, 4, 42, Share(0.2))
    assert (real.lambda_start, real.lambda_end, real.init_std, real.hidden) == (0.1, 2.0, 1e-4, None)
    assert (real.min_pixels, real.max_pixels) == (784, 50_176)
    assert SelectorSpec.make({"data": ["x"]}).max_pixels is None  # tiny: the checkpoint's own
    dynamic = PredictorSpec.make({"data": ["x"]})
    assert (dynamic.learning_rate, dynamic.batch_size, dynamic.keep_weight, dynamic.layer) == (2e-4, 8, 100, 2)
    assert (dynamic.tau_start, dynamic.tau_end, dynamic.hidden, dynamic.blocks) == (1.0, 0.1, 512, 2)


def test_checkpoints_and_optimizer_hold_the_scorer_alone(samples, tmp_path, tiny):
    train(selector_spec(samples, tmp_path))
    checkpoint = last_checkpoint(tmp_path / "checkpoints")
    assert checkpoint is not None
    parts = [f"{x}_proj.{part}" for x in "qk" for part in ("weight", "bias")]
    assert set(load_file(checkpoint / "model.safetensors")) == {f"learned.{part}" for part in parts}
    state = torch.load(checkpoint / "optimizer.pt", weights_only=True)["state"]
    assert sum(s["exp_avg"].numel() for s in state.values()) == sum(p.numel() for p in Scorer(tiny.width).parameters())


def test_samples_read_by_another_process_are_the_same(samples, tmp_path):
    train(selector_spec(samples, tmp_path / "a"))
    train(selector_spec(samples, tmp_path / "b", workers=1))
    first, second = (load_file(tmp_path / name / "scorer.safetensors") for name in "ab")
    assert all(torch.equal(first[name], second[name]) for name in first)
    with pytest.raises(InputError, match=r"train.jsonl:\d: the sample has \d+ tokens") as caught:
        train(selector_spec(samples, tmp_path / "c", workers=1, max_length=30))
    assert "\n" not in str(caught.value)


def test_a_batch_of_which_everything_is_left_out(samples, tmp_path):
    train(selector_spec(samples, tmp_path, max_length=30, on_bad_sample="skip", max_steps=2))
    config = json.loads((tmp_path / "scorer_config.json").read_text())
    assert config["data"]["skipped"] == 4
    assert config["metrics"]["loss"] == 0


def test_the_predictor_judges_a_image_or_as_published_the_whole_micro_batch(samples):
    for exact, expected in ((False, [6, 12, 12]), (True, [30])):
        backbone = fresh_tiny()
        learner = PredictorLearner.build(
            backbone, predictor_spec(samples, upstream_exact=exact, gradient_checkpointing=False)
        )
        seen: list[int] = []
        learner.learned.register_forward_pre_hook(lambda module, args, seen=seen: seen.append(len(args[0])))
        learner(batch_of(backbone, samples, [0, 1, 2]), 0, 10)
        assert seen == expected
