"""Checkpoints: the released layout, shards, and everything that can be wrong with one."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from battery import PROMPTS
from safetensors.torch import load_file, save_file

from visionselector_eval.baselines import InputError, build
from visionselector_eval.models import load_backbone
from visionselector_eval.models.dynamic_qwen import Predictor
from visionselector_eval.models.inputs import MediaSettings, build_inputs
from visionselector_eval.models.loading import checkpoint_revision
from visionselector_eval.models.tiny import checkpoint


def released_layout(folder, shards: int = 1):
    """The embedded checkpoint as transformers 4.50 and the released VisionSelector checkpoints lay it out.

    Flat text configuration, `rope_scaling` of type mrope, tensors named `visual.*` and `model.*`, no video processor
    file, and the scorer beside the backbone.
    """
    shutil.copytree(checkpoint(), folder)
    config = json.loads((folder / "config.json").read_text())
    text = config.pop("text_config")
    rope = text.pop("rope_parameters")
    for key in ("model_type", "layer_types", "dtype"):
        text.pop(key, None)
    config.pop("dtype", None)
    config.update(
        text,
        rope_theta=rope["rope_theta"],
        rope_scaling={"type": "mrope", "mrope_section": rope["mrope_section"]},
        torch_dtype="bfloat16",
        transformers_version="4.50.0",
    )
    config["vision_config"].pop("rope_parameters", None)
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "video_preprocessor_config.json").unlink()
    tensors = {
        name.replace("model.visual.", "visual.").replace("model.language_model.", "model."): tensor
        for name, tensor in load_file(folder / "model.safetensors").items()
    }
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = names[i::shards]
        save_file({n: tensors[n] for n in part}, folder / file, metadata={"format": "pt"})
        weight_map.update(dict.fromkeys(part, file))
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("shards", [1, 3])
def test_a_released_checkpoint_loads_as_it_is(shards, tiny, tmp_path):
    backbone = load_backbone(released_layout(tmp_path / "released", shards))
    learned = {f"visual.importance_scorer.{p}_proj.{part}" for p in "qk" for part in ("weight", "bias")}
    learned |= {f"model.image_score_predictor.{name}" for name in Predictor(64, 16).state_dict()}
    assert set(backbone.host.extra_weights) == learned
    inputs = build_inputs(backbone.processor, PROMPTS["two images"](), MediaSettings())
    for name in ("full", "visionselector", "divprune", "dynamic_qwen"):
        ours = backbone.prefill(inputs, build(name), 0.2)
        theirs = tiny.prefill(inputs, build(name), 0.2)
        assert torch.equal(ours.kept[0], theirs.kept[0])
        assert torch.equal(ours.logits, theirs.logits)


def test_a_scorer_given_apart_serves_a_backbone_without_one(tiny, tmp_path):
    """One stock backbone for VisionSelector and all baselines."""
    folder = tmp_path / "stock"
    shutil.copytree(checkpoint(), folder)
    tensors = load_file(folder / "model.safetensors")
    stock = {k: v for k, v in tensors.items() if "importance_scorer" not in k}
    save_file(stock, folder / "model.safetensors", metadata={"format": "pt"})
    backbone = load_backbone(folder)
    inputs = build_inputs(backbone.processor, PROMPTS["one image"](), MediaSettings())
    with pytest.raises(InputError, match="scorer"):
        backbone.prefill(inputs, build("visionselector"), 0.2)
    ours = backbone.prefill(inputs, build("visionselector", scorer=str(checkpoint())), 0.2)
    assert torch.equal(ours.kept[0], tiny.prefill(inputs, build("visionselector"), 0.2).kept[0])


def test_a_scorer_of_another_width_is_refused(tiny, tmp_path):
    wide = {
        f"{p}_proj.{part}": torch.zeros(shape) for p in "qk" for part, shape in (("weight", (64, 128)), ("bias", (64,)))
    }
    save_file(wide, tmp_path / "scorer.safetensors")
    inputs = build_inputs(tiny.processor, PROMPTS["one image"](), MediaSettings())
    with pytest.raises(InputError, match=r"128.*192"):
        tiny.prefill(inputs, build("visionselector", scorer=str(tmp_path)), 0.2)


def template_moved(folder, into):
    """The template of chat_template.jinja in another file of the checkpoint, or in none."""
    file = folder / "chat_template.jinja"
    text = file.read_text(encoding="utf-8")
    file.unlink()
    if into == "chat_template.json":
        (folder / into).write_text(json.dumps({"chat_template": text}), encoding="utf-8")
    elif into is not None:
        settings = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        several = [{"name": "default", "template": text}, {"name": "rag", "template": "nothing of use"}]
        settings["chat_template"] = text if into == "tokenizer_config.json" else several
        (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")


@pytest.mark.parametrize("into", ["tokenizer_config.json", "several templates in it", "chat_template.json"])
def test_a_chat_template_may_stand_wherever_transformers_reads_one(into, tiny, tmp_path):
    backbone = load_backbone(copy_with(tmp_path, lambda folder: template_moved(folder, into)))
    for prompt in ("one image", "text only"):
        ours = build_inputs(backbone.processor, PROMPTS[prompt](), MediaSettings())
        theirs = build_inputs(tiny.processor, PROMPTS[prompt](), MediaSettings())
        assert torch.equal(ours["input_ids"], theirs["input_ids"])


def test_a_checkpoint_without_any_chat_template_says_where_one_belongs(tmp_path):
    with pytest.raises(InputError, match=r"no chat template: expected chat_template\.jinja"):
        load_backbone(copy_with(tmp_path, lambda folder: template_moved(folder, None)))


def copy_with(tmp_path, change):
    folder = tmp_path / "broken"
    shutil.copytree(checkpoint(), folder)
    change(folder)
    return folder


def truncate(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:500_000])


def drop_tensor(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def other_family(folder):
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 64}))


BROKEN = {
    "truncated": (truncate, "weights of .* can't be read"),
    "a tensor missing": (drop_tensor, "1 tensors missing"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "weights of"),
    "another family": (other_family, "family 'llama'.*available: llava, .*qwen2_5_vl"),
    "no config": (lambda f: (f / "config.json").unlink(), "without config.json"),
    "config that is no JSON": (lambda f: (f / "config.json").write_text("{"), "config.json of"),
    "no tokenizer": (lambda f: [(f / n).unlink() for n in ("tokenizer.json", "tokenizer_config.json")], "tokenizer of"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_checkpoint_is_one_clear_line(what, tmp_path):
    change, message = BROKEN[what]
    folder = copy_with(tmp_path, change)
    with pytest.raises(InputError, match=message) as caught:
        load_backbone(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"path_or_hub_id": "./nowhere"}, "no checkpoint folder"),
        ({"path_or_hub_id": "Qwen/Does-Not-Exist"}, "neither a local folder nor a checkpoint that the hub gave"),
        ({"device": "gpu"}, "device 'gpu'"),
        ({"device": "cuda:77"}, "is not here"),
        ({"dtype": "float8"}, "unknown dtype 'float8'"),
        ({"attn_implementation": "flash"}, "did you mean|available"),
        ({"attn_implementation": "flash_attention_2"}, "flash_attention_2 can't be used"),
    ],
)
def test_bad_arguments_are_one_clear_line(arguments, message):
    with pytest.raises(InputError, match=message) as caught:
        load_backbone(**{"path_or_hub_id": "tiny", **arguments})
    assert "\n" not in str(caught.value)


def test_the_revision_follows_the_files(tmp_path):
    folder = copy_with(tmp_path, lambda f: None)
    before = checkpoint_revision(str(folder))
    assert before == checkpoint_revision("tiny")
    generation = folder / "generation_config.json"
    generation.write_text(generation.read_text().replace("1.001", "1.002"))
    assert checkpoint_revision(str(folder)) != before
