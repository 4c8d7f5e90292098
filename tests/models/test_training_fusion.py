"""Training of token fusion, end to end on a LLaVA of random weights: what moves, resuming, what comes out, refusals."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from battery import draw_image, user
from llava_checkpoint import FUSED, save_llava
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast, TrainerCallback

from visionselector_eval.baselines import InputError, build
from visionselector_eval.models import load_backbone
from visionselector_eval.models.backbones.llava import VICUNA_TEMPLATE
from visionselector_eval.models.backbones.token_fusion import FusionConfig, TokenFusion
from visionselector_eval.models.inputs import MediaSettings, build_inputs
from visionselector_eval.models.training import export
from visionselector_eval.models.training.data import IGNORED, Collator, Tokeniser
from visionselector_eval.models.training.records import MediaPaths, parse_record
from visionselector_eval.models.training.spec import TokenFusionSpec
from visionselector_eval.models.training.token_fusion import TokenFusionLearner
from visionselector_eval.models.training.trainer import TrainingPlan, last_checkpoint, media_of, read_data, train

LAYERS = FUSED["token_fusion"]["layers"]


def write_samples(folder: Path, *, images: bool = True) -> Path:
    """Six conversations, each about an image of another shape (or none)."""
    rng = np.random.default_rng(0)
    lines = []
    for i in range(6):
        size = (56 + 28 * (i % 3), 84 + 28 * (i % 2), 3)
        Image.fromarray(rng.integers(0, 255, size, dtype=np.uint8)).save(folder / f"{i}.png")
        turns = [
            {"from": "human", "value": ("<image>\n" if images else "") + "What is it" + "?" * i},
            {"from": "gpt", "value": f"cat {i}"},
            {"from": "human", "value": "Sure?"},
            {"from": "gpt", "value": "yes"},
        ]
        lines.append(json.dumps({"conversations": turns} | ({"image": f"{i}.png"} if images else {})))
    file = folder / ("train.jsonl" if images else "text.jsonl")
    file.write_text("\n".join(lines) + "\n")
    return file


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_samples(tmp_path_factory.mktemp("samples"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llava(tmp_path_factory.mktemp("plain"), learned=False)


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llava(tmp_path_factory.mktemp("fused"), learned=False, **FUSED)


def fusion_spec(data: Path, pretrained: Path, output: Path | None = None, **fields: Any) -> TokenFusionSpec:
    small: dict[str, Any] = {"max_steps": 6, "batch_size": 2, "total_batch": 2, "log_steps": 2, "save_steps": 2}
    small |= {"report_to": "none", "device": "cpu", "output": str(output or "unused"), "data": [str(data)]}
    small |= {"pretrained": str(pretrained)}
    if fields.get("stage", 1) == 1:
        small["layers"] = LAYERS
    else:
        small["learning_rate"] = 1e-3
    return TokenFusionSpec.make({**small, **fields})


@pytest.fixture(scope="module")
def first(samples: Path, plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The result of a first stage."""
    folder = tmp_path_factory.mktemp("first") / "out"
    train(fusion_spec(samples, plain, folder, max_steps=24))
    return folder


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    """A checkpoint's tensors, by the names of the loaded model."""
    return dict(load_backbone(folder).model.state_dict())


def losses(folder: Path) -> list[float]:
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [e["loss"] for e in entries if "loss" in e]


def learner_of(spec: TokenFusionSpec) -> TokenFusionLearner:
    return TokenFusionLearner.build(TokenFusionLearner.load(spec, "cpu"), spec)


def batch_of(learner: TokenFusionLearner, spec: TokenFusionSpec, numbers: list[int]) -> dict[str, Any]:
    processor = learner.backbone.processor
    conversations = read_data(spec)
    conversations.tokeniser = Tokeniser(processor, media_of(spec), 4096)
    return Collator(processor.tokenizer.pad_token_id, spec.padding_side)([conversations[i] for i in numbers])  # type: ignore[arg-type]


# --- what moves -------------------------------------------------------------------------------------------------------


def test_stage_one_trains_the_fusion_alone(samples, plain, first):
    assert losses(first)[-1] < losses(first)[0]
    config = json.loads((first / "fusion_config.json").read_text())
    assert config["token_fusion"] == {"layers": LAYERS, "fusion_hidden": 192, "spatial_hidden": 768, "window": 2}
    assert (config["width"], config["out"], config["stage"], config["steps"]) == (48, 64, 1, 24)
    assert config["backbone"] == {
        "id": str(plain),
        "revision": load_backbone(plain).revision,
        "family": "llava",
    }
    spec = fusion_spec(samples, plain)
    learner = learner_of(spec)
    assert {name.split(".")[1] for name, p in learner.named_parameters() if p.requires_grad} == {"fusion"}
    begun = {name.removeprefix("learned.fusion."): p for name, p in learner.named_parameters()}
    assert config["parameters"] == sum(p.numel() for p in begun.values())
    trained = load_file(first / "fusion.safetensors")
    assert trained.keys() == begun.keys()
    assert all(not torch.equal(trained[name], begun[name]) for name in begun)
    before = load_backbone(plain).model.state_dict()
    learner(batch_of(learner, spec, [0, 1]), 0, 1).loss.backward()
    for name, tensor in learner.backbone.model.state_dict().items():
        assert "multi_modal_projector" in name or torch.equal(tensor, before[name]), name
    grads = [p for p in learner.backbone.model.parameters() if p.grad is not None]
    assert len(grads) == len(begun)


def test_stage_two_trains_the_llm_too_and_gives_a_checkpoint(samples, plain, first, tmp_path):
    out = tmp_path / "out"
    train(fusion_spec(samples, first, out, stage=2, max_steps=20))
    assert losses(out)[-1] < 0.8 * losses(out)[0]
    before, after = tensors_of(plain), tensors_of(out)
    fusion = load_file(first / "fusion.safetensors")
    for name, tensor in after.items():
        if "vision_tower" in name:
            assert torch.equal(tensor, before[name]), name
        elif "multi_modal_projector" in name:
            assert not torch.equal(tensor, fusion[name.partition("multi_modal_projector.")[2]]), name
        else:
            assert not torch.equal(tensor, before[name]), name
    assert {"lm_head.weight", "model.language_model.embed_tokens.weight"} <= after.keys()
    backbone = load_backbone(out)
    assert backbone.remark == "trained fusion, LLM retrained"
    assert backbone.processor.chat_template == VICUNA_TEMPLATE
    assert backbone.processor.patch_size == 28
    inputs = build_inputs(
        backbone.processor, [user(draw_image(224, 280), "What is it?")], MediaSettings(pad_square=True)
    )
    assert backbone.visual_totals(inputs) == [16]
    stock = backbone.model.generate(**inputs, max_new_tokens=4)[:, inputs["input_ids"].shape[1] :]
    assert torch.equal(backbone.generate(inputs, build("full"), 1.0, max_new_tokens=4), stock)
    again = train(fusion_spec(samples, first, out, stage=2, max_steps=20))
    assert not again.fresh  # type: ignore[union-attr]
    train(fusion_spec(samples, first, out, stage=2, max_steps=1), overwrite=True)
    assert json.loads((out / "fusion_config.json").read_text())["steps"] == 1


def test_stage_two_goes_on_from_a_fused_checkpoint_and_from_init(samples, plain, fused, first, tmp_path):
    backbones = [
        TokenFusionLearner.load(fusion_spec(samples, first, stage=2), "cpu"),
        TokenFusionLearner.load(fusion_spec(samples, plain, stage=2, init=str(first)), "cpu"),
    ]
    for name, tensor in backbones[0].model.state_dict().items():
        assert torch.equal(tensor, backbones[1].model.state_dict()[name])
    assert backbones[0].revision == backbones[1].revision
    train(fusion_spec(samples, fused, tmp_path / "a", stage=2, max_steps=1))
    whole = tensors_of(tmp_path / "a")
    assert whole.keys() == tensors_of(fused).keys()
    train(fusion_spec(samples, tmp_path / "a", tmp_path / "b", stage=2, max_steps=1))


def test_a_new_fusion_begins_as_torchs_layers_do_and_by_the_seed(samples, plain):
    made = [
        TokenFusionLearner.load(fusion_spec(samples, plain, seed=seed), "cpu").model.model.multi_modal_projector
        for seed in (1, 1, 2)
    ]
    torch.manual_seed(1)
    expected = TokenFusion(FusionConfig.published(48, LAYERS), 48, 64)
    for name, parameter in made[0].named_parameters():
        assert torch.equal(parameter, expected.get_parameter(name))
        assert torch.equal(parameter, made[1].get_parameter(name))
        assert not torch.equal(parameter, made[2].get_parameter(name))
    small = learner_of(fusion_spec(samples, plain, fusion_hidden=32, spatial_hidden=40))
    assert small.learned["fusion"].config == FusionConfig(tuple(LAYERS), 32, 40)


# --- the forward ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [1, 2])
def test_the_loss_is_the_stock_models(samples, plain, fused, stage):
    spec = fusion_spec(samples, plain if stage == 1 else fused, stage=stage, gradient_checkpointing=False)
    learner = learner_of(spec)
    batch = batch_of(learner, spec, [0, 3])
    stock = learner.backbone.model(
        **{k: batch[k] for k in ("input_ids", "attention_mask", "pixel_values", "labels")},
        position_ids=(batch["attention_mask"].cumsum(1) - 1).clamp_min(0),
    ).loss
    torch.testing.assert_close(learner(batch, 0, 1).loss, stock)


@pytest.mark.parametrize("stage", [1, 2])
def test_padding_side_and_checkpointing_change_nothing(samples, first, plain, stage):
    made = []
    for fields in ({}, {"padding_side": "right"}, {"gradient_checkpointing": False}):
        spec = fusion_spec(samples, plain if stage == 1 else first, stage=stage, **fields)
        learner = learner_of(spec)
        outcome = learner(batch_of(learner, spec, [0, 1, 5]), 3, 10)
        outcome.loss.backward()
        made.append((outcome.loss.item(), {n: p.grad.clone() for n, p in learner.named_parameters()}))
        assert all(p.grad is None for p in learner.backbone.model.model.vision_tower.parameters())
    for loss, gradients in made[1:]:
        assert loss == pytest.approx(made[0][0], abs=2e-5)
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, made[0][1][name], atol=2e-5, rtol=5e-3)


@pytest.mark.parametrize("stage", [1, 2])
def test_bfloat16_computes_with_float32_weights(samples, plain, first, stage, tmp_path):
    source = plain if stage == 1 else first
    exact_spec = fusion_spec(samples, source, stage=stage)
    exact = learner_of(exact_spec)
    spec = fusion_spec(samples, source, tmp_path / "out", stage=stage, dtype="bfloat16", max_steps=2)
    learner = learner_of(spec)
    assert {p.dtype for p in learner.parameters()} == {torch.float32}
    assert {p.dtype for p in learner.backbone.model.model.vision_tower.parameters()} == {torch.bfloat16}
    outcome = learner(batch_of(learner, spec, [0, 1]), 0, 1)
    outcome.loss.backward()
    assert {p.grad.dtype for p in learner.parameters()} == {torch.float32}
    assert outcome.loss.item() == pytest.approx(exact(batch_of(exact, exact_spec, [0, 1]), 0, 1).loss.item(), rel=0.03)
    if stage == 2:
        for name, tensor in exact.learned.state_dict().items():
            assert torch.equal(tensor, learner.learned.state_dict()[name]), name
        train(spec)
        stored = load_file(tmp_path / "out" / "model.safetensors")
        assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
        assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
        load_backbone(tmp_path / "out")


@pytest.mark.parametrize("stage", [1, 2])
def test_text_alone_gives_the_fusion_a_gradient_of_nothing(samples, plain, first, stage, tmp_path):
    text = write_samples(tmp_path, images=False)
    spec = fusion_spec(text, plain if stage == 1 else first, stage=stage)
    learner = learner_of(spec)
    learner(batch_of(learner, spec, [0, 1]), 0, 1).loss.backward()
    for name, parameter in learner.named_parameters():
        assert parameter.grad is not None, name
        assert bool(parameter.grad.any()) == ("fusion" not in name), name


# --- resuming, several processes --------------------------------------------------------------------------------------


class KillAt(TrainerCallback):
    """Ends the training after a step, as a kill would."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.step:
            raise KeyboardInterrupt


@pytest.mark.parametrize("stage", [1, 2])
def test_a_killed_training_ends_with_the_same_weights(samples, plain, first, tmp_path, stage):
    source = plain if stage == 1 else first
    weights = "fusion.safetensors" if stage == 1 else "model.safetensors"
    undisturbed = train(fusion_spec(samples, source, tmp_path / "a", stage=stage))
    with pytest.raises(KeyboardInterrupt):
        train(fusion_spec(samples, source, tmp_path / "b", stage=stage), callbacks=[KillAt(5)])
    assert not (tmp_path / "b" / weights).exists()
    resumed = train(fusion_spec(samples, source, tmp_path / "b", stage=stage))
    a, b = (load_file(tmp_path / name / weights) for name in "ab")
    assert a.keys() == b.keys()
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert resumed.metrics == undisturbed.metrics  # type: ignore[union-attr]
    kept = last_checkpoint(tmp_path / "a" / "checkpoints")
    assert kept is not None
    parts = {name.split(".")[1] for name in load_file(kept / "model.safetensors")}
    assert parts == ({"fusion"} if stage == 1 else {"fusion", "language_model", "lm_head"})


@pytest.mark.slow
def test_two_processes_give_what_one_gives(samples, first, tmp_path):
    spec = fusion_spec(samples, first, tmp_path / "two", stage=2, batch_size=1, max_steps=3)
    given = {k: v for k, v in spec.model_dump().items() if k in spec.model_fields_set}
    flags = [
        x
        for k, v in given.items()
        for x in (f"--{k.replace('_', '-')}", *(map(str, v) if isinstance(v, list) else [str(v)]))
    ]
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    launch += ["--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    done = subprocess.run(
        [*launch, "-m", "visionselector_eval.harness.cli", "train", "token-fusion", *flags],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    config = json.loads((tmp_path / "two" / "fusion_config.json").read_text())
    assert (config["processes"], config["steps"]) == (2, 3)
    train(fusion_spec(samples, first, tmp_path / "one", stage=2, batch_size=1, max_steps=3))
    two, one = (load_file(tmp_path / name / "model.safetensors") for name in ("two", "one"))
    for name in one:
        # Adam's first steps have the size of the learning rate even where a gradient is rounding.
        assert bool(((two[name] - one[name]).abs() > 1e-4).float().mean() < 0.02), name


# --- export -----------------------------------------------------------------------------------------------------------


def test_a_first_stage_becomes_a_checkpoint_and_back(plain, first, tmp_path):
    full = export.export_checkpoint(first, tmp_path / "full")
    backbone = load_backbone(full)
    assert backbone.remark
    before = tensors_of(plain)
    trained = load_file(first / "fusion.safetensors")
    for name, tensor in backbone.model.state_dict().items():
        mark = "multi_modal_projector."
        assert torch.equal(tensor, trained[name.partition(mark)[2]] if mark in name else before[name]), name
    export.extract_learned(str(full), tmp_path / "back", export.KINDS["token-fusion"])
    back = load_file(tmp_path / "back" / "fusion.safetensors")
    assert all(torch.equal(back[name], trained[name]) for name in trained)
    assert export.load_fusion(str(tmp_path / "back")).config == export.load_fusion(str(first)).config
    with pytest.raises(InputError, match=r"no plain LLaVA-1\.5"):
        export.export_checkpoint(first, tmp_path / "again", "tiny")
    with pytest.raises(InputError, match="has no token fusion"):
        export.extract_learned(str(plain), tmp_path / "none", export.KINDS["token-fusion"])


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A first stage's result for another backbone."""
    folder = tmp_path_factory.mktemp("wide")
    fusion = TokenFusion(FusionConfig.published(48, LAYERS), 48, 96)
    export.save_learned(folder, fusion, export.KINDS["token-fusion"], {"backbone": {}})
    return folder


@pytest.mark.parametrize(
    ("pretrained", "fields", "message"),
    [
        ("tiny", {}, "trained on LLaVA-1.5, but 'tiny' is of family 'qwen2_5_vl'"),
        ("fused", {}, "has it already: give a plain one, or stage=2"),
        ("plain", {"stage": 2}, "has none: give the result folder of stage 1"),
        ("plain", {"layers": None}, "hidden state 21 of the vision tower, which has 0 to 4"),
        ("plain", {"init": "WIDE"}, "an LLM of width 96, but the backbone has 48 and 64"),
        ("plain", {"init": "FIRST", "layers": [-2, 2]}, r"has layers=\[-2, 4, 2\], but the spec says \[-2, 2\]"),
        ("plain", {"init": "FIRST", "fusion_hidden": 8}, "has fusion_hidden=192, but the spec says 8"),
        ("fused", {"stage": 2, "init": "FIRST"}, "has its token fusion already"),
        ("first", {"stage": 2, "init": "FIRST"}, "has its token fusion already"),
        ("fused", {"stage": 2, "layers": [-2]}, "the spec says"),
        ("wide", {"stage": 2}, "does not say its backbone"),
        ("plain", {"init": "PLAIN"}, "has no token fusion"),
        ("plain", {"batch_size": 4}, "total_batch 2 can't be made of micro-batches of 4"),
        ("plain", {"dtype": "float16"}, "unknown dtype of token-fusion 'float16'"),
        ("plain", {"stage": 3}, "invalid stage"),
        ("plain", {"template": "checkpoint"}, "the chat template does not show the answer"),
    ],
)
def test_what_cannot_be_trained_is_one_clear_line(samples, request, tmp_path, pretrained, fields, message):
    source = pretrained if pretrained == "tiny" else request.getfixturevalue(pretrained)
    given = {
        k: str(request.getfixturevalue(v.lower())) if isinstance(v, str) and v.isupper() else v
        for k, v in fields.items()
    }
    with pytest.raises(InputError, match=message) as caught:
        train(fusion_spec(samples, source, tmp_path / "out", **given))
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out" / "fusion_config.json").exists()


def test_data_without_images_or_with_videos_is_refused(plain, tmp_path):
    text = write_samples(tmp_path, images=False)
    with pytest.raises(InputError, match="none of the 6 samples has one"):
        train(fusion_spec(text, plain, tmp_path / "out"))
    (tmp_path / "clip.mp4").touch()
    turns = [{"from": "human", "value": "<video>\nQ"}, {"from": "gpt", "value": "A"}]
    video = tmp_path / "video.jsonl"
    video.write_text(json.dumps({"video": "clip.mp4", "conversations": turns}) + "\n")
    with pytest.raises(InputError, match=r"LLaVA-1\.5 takes none"):
        train(fusion_spec(video, plain, tmp_path / "out"))


def test_a_grid_that_windows_do_not_divide_is_refused(samples, tmp_path):
    odd = save_llava(tmp_path / "odd", learned=False)
    for name in ("config.json", "processor_config.json"):
        config = (odd / name).read_text().replace("112", "98")
        (odd / name).write_text(config)
    tensors = load_file(odd / "model.safetensors")
    from safetensors.torch import save_file

    position = next(name for name in tensors if "position_embedding" in name)
    tensors[position] = tensors[position][: 7 * 7 + 1].clone()
    save_file(tensors, odd / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(InputError, match="images of this vision tower have 7x7: the sides must be multiples of 2"):
        train(fusion_spec(samples, odd, tmp_path / "out"))


# --- spec -------------------------------------------------------------------------------------------------------------


def test_published_settings_are_the_defaults(tmp_path):
    one, two = (TokenFusionSpec.make({"data": ["x"], "stage": stage}) for stage in (1, 2))
    for spec, rate, batch in ((one, 1e-3, 256), (two, 2e-5, 128)):
        assert (spec.learning_rate, spec.total_batch, spec.micro_batches(1) * spec.batch_size) == (rate, batch, batch)
        assert spec.micro_batches(8) * 8 * spec.batch_size == batch
        assert (spec.epochs, spec.schedule, spec.warmup, spec.weight_decay) == (1, "cosine", 0.03, 0)
        assert media_of(spec) == MediaSettings(pad_square=True)
        (tmp_path / "spec.yaml").write_text(spec.to_yaml())
        assert TokenFusionSpec.load(tmp_path / "spec.yaml") == spec
        assert spec.defaults() == spec.model_dump() | {"data": [], "stage": 1}
    assert TokenFusionSpec.make({"data": ["x"], "stage": 2, "learning_rate": 1e-3}).learning_rate == 1e-3


def test_a_plan_counts_what_is_trained(samples, plain, first, tmp_path):
    for stage, source in ((1, plain), (2, first)):
        spec = fusion_spec(samples, source, tmp_path / "out", stage=stage, total_batch=4, max_steps=None, epochs=2)
        made = train(spec, dry_run=True)
        assert isinstance(made, TrainingPlan)
        assert (made.samples, made.steps, made.effective) == (6, 4, 4)
        assert made.parameters == sum(p.numel() for p in learner_of(spec).parameters())
    assert not (tmp_path / "out").exists()


# --- tokens -----------------------------------------------------------------------------------------------------------


def llama_like(first: bool) -> PreTrainedTokenizerFast:
    """A tokenizer with Llama's habits: a beginning token, and a space before every text (or the `first` alone)."""
    letters = [
        "<unk>",
        "<s>",
        "</s>",
        *(f"<0x{i:02X}>" for i in range(256)),
        "▁",
        *map(chr, range(33, 127)),
        "▁c",
        "▁A",
    ]
    merges = [("▁", "c"), ("▁", "A")]
    inner = Tokenizer(
        models.BPE({t: i for i, t in enumerate(letters)}, merges, unk_token="<unk>", byte_fallback=True)  # type: ignore[arg-type]
    )
    if first:
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<unk>"
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return tokenizer


@pytest.mark.parametrize("first", [False, True])
def test_samples_are_tokenised_as_the_whole_conversation(samples, first):
    tokenizer = llama_like(first)
    images = CLIPImageProcessor(size={"shortest_edge": 112}, crop_size={"height": 112, "width": 112})
    processor = LlavaProcessor(
        images,
        tokenizer,
        patch_size=28,
        vision_feature_select_strategy="default",
        chat_template=VICUNA_TEMPLATE,
        num_additional_image_tokens=1,
    )
    conversation = parse_record(json.loads(samples.read_text().splitlines()[0]), samples, "here:1", MediaPaths())
    made = Tokeniser(processor, MediaSettings(pad_square=True), 4096)(conversation)
    text = processor.apply_chat_template(conversation.messages, tokenize=False)
    text = text.replace("<image>\n\n", "<image>\n")  # the template has the break behind the marker already
    assert text.endswith("USER: <image>\nWhat is it ASSISTANT: cat 0</s>USER: Sure? ASSISTANT: yes</s>")
    whole = tokenizer(text.replace("<image>", "<image>" * 16)).input_ids
    assert made["input_ids"].tolist() == whole
    assert whole.count(tokenizer.bos_token_id) == 1
    learned = made["input_ids"][made["labels"] != IGNORED]
    expected = [*tokenizer("cat 0", add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    expected += [*tokenizer("yes", add_special_tokens=False).input_ids, tokenizer.eos_token_id]
    assert learned.tolist() == expected
