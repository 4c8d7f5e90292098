"""LLaVA-1.5 and LLaVA-STF in the layout of the original code: the same answers, and one line for what does not fit."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from battery import draw_image, user
from llava_checkpoint import FUSED, PATCH, SIZE, WIDTH, save_llava
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from visionselector_eval.baselines import InputError, build
from visionselector_eval.models import load_backbone
from visionselector_eval.models.backbones.llava import VICUNA_TEMPLATE
from visionselector_eval.models.backbones.llava_original import (
    STF_NAMES,
    check_fusion,
    fusion_layers,
    is_original,
    tower_config,
)
from visionselector_eval.models.backbones.token_fusion import LAYERS, FusedLlava
from visionselector_eval.models.inputs import MediaSettings, build_inputs
from visionselector_eval.models.loading import checkpoint_family, checkpoint_revision
from visionselector_eval.models.tiny import checkpoint
from visionselector_eval.models.training.export import export_checkpoint
from visionselector_eval.models.visionselector import Scorer

TOWER = 48


def written(
    folder: Path,
    backbone: Any,
    *,
    tower: str = "folder",
    torch_files: bool = False,
    shards: int = 1,
    **changes: Any,
) -> Path:
    """`backbone` in the original layout.

    Parameters
    ----------
    tower: where the vision tower is: `folder` (config and weights), `checkpoint` (weights among the others, its
        configuration in a folder) or `nowhere`.
    torch_files: pytorch_model.bin. changes: over the fields of config.json.
    """
    folder.mkdir(parents=True)
    model, config = backbone.model, backbone.model.config
    text = config.text_config
    clip = folder / "clip"
    if tower == "folder":
        model.model.vision_tower.save_pretrained(clip)
    if tower != "nowhere":
        config.vision_config.save_pretrained(clip)
        CLIPImageProcessor(
            size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}, image_mean=[0.5, 0.4, 0.3]
        ).save_pretrained(clip)
    fields = {
        "architectures": ["LlavaLlamaForCausalLM"],
        "model_type": "llava",
        "vocab_size": text.vocab_size - 1,  # without <image>
        "torch_dtype": "float32",
        "mm_vision_tower": "clip" if tower != "nowhere" else "openai/clip-vit-large-patch14-336",
        "mm_hidden_size": TOWER,
        "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch",
        "mm_projector_type": "mlp2x_gelu",
        "mm_use_im_start_end": False,
        "rope_theta": text.rope_parameters["rope_theta"],
        "rope_scaling": None,
        "image_aspect_ratio": "pad",
        "tie_word_embeddings": False,
    }
    for name in (
        *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
        *("hidden_act", "rms_norm_eps", "max_position_embeddings", "initializer_range"),
        *("bos_token_id", "eos_token_id", "pad_token_id"),
    ):
        fields[name] = getattr(text, name)
    fields |= changes
    (folder / "config.json").write_text(json.dumps({k: v for k, v in fields.items() if v != "gone"}))
    tensors = {}
    for name, tensor in model.state_dict().items():
        short = name.removeprefix("model.")
        if short.startswith("language_model."):
            name = "model." + short.removeprefix("language_model.")
        elif short.startswith("vision_tower."):
            if tower != "checkpoint":
                continue
            name = "model.vision_tower.vision_tower.vision_model." + short.removeprefix("vision_tower.")
        elif short.startswith("multi_modal_projector."):
            layer, _, part = short.removeprefix("multi_modal_projector.").rpartition(".")
            plain = {"linear_1": "model.mm_projector.0", "linear_2": "model.mm_projector.2"}
            name = f"{(plain | STF_NAMES)[layer]}.{part}"
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            tensor = tensor[:-1]
        tensors[name] = tensor.detach().clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(8)  # old versions stored this table
    parts = [dict(list(tensors.items())[i::shards]) for i in range(shards)]
    kind = "bin" if torch_files else "safetensors"
    stem = "pytorch_model" if torch_files else "model"
    files = [f"{stem}.{kind}" if shards == 1 else f"{stem}-{i + 1:05}-of-{shards:05}.{kind}" for i in range(shards)]
    for file, part in zip(files, parts, strict=True):
        torch.save(part, folder / file) if torch_files else save_file(part, folder / file, metadata={"format": "pt"})
    if shards > 1:
        places = {name: file for file, part in zip(files, parts, strict=True) for name in part}
        (folder / f"{stem}.{kind}.index.json").write_text(json.dumps({"weight_map": places}))
    tokenizer = AutoTokenizer.from_pretrained(str(checkpoint()))
    tokenizer.chat_template = None
    tokenizer.save_pretrained(folder)
    settings = {"do_sample": False, "eos_token_id": text.eos_token_id, "pad_token_id": text.pad_token_id}
    (folder / "generation_config.json").write_text(json.dumps({**settings, "repetition_penalty": 1.05}))
    return folder


def change(folder: Path, edit: Any) -> Path:
    """`edit` the stored tensors."""
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_backbone(save_llava(tmp_path_factory.mktemp("plain"), learned=False))


@pytest.fixture(scope="module")
def fused(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_backbone(save_llava(tmp_path_factory.mktemp("fused"), learned=False, **FUSED))


def assert_same(ours: Any, theirs: Any) -> None:
    """Same tokens in, same logits out; ours has one token more than the original's vocabulary."""
    settings = MediaSettings(pad_square=True)
    theirs.processor.chat_template = VICUNA_TEMPLATE
    theirs.processor.image_processor = ours.processor.image_processor
    conversations = [user(draw_image(224, 280), "and", draw_image(140, 112, 1), "What is it?"), user("Just text.")]
    mine, reference = (build_inputs(b.processor, conversations, settings) for b in (ours, theirs))
    assert mine.keys() == reference.keys()
    assert all(torch.equal(mine[name], reference[name]) for name in reference)
    vocabulary = ours.model.config.text_config.vocab_size - 1
    for name in ("full", "divprune"):
        a, b = ours.prefill(mine, build(name), 0.5), theirs.prefill(reference, build(name), 0.5)
        assert all(torch.equal(x, y) for x, y in zip(a.kept, b.kept, strict=True))
        torch.testing.assert_close(a.logits[:, :vocabulary], b.logits[:, :vocabulary], atol=1e-5, rtol=1e-5)
        assert bool((a.logits[:, vocabulary] <= a.logits[:, :vocabulary].max(1).values).all())
        assert int(a.logits.argmax(1).max()) < vocabulary
    answer = ours.generate(mine, build("full"), 1.0, max_new_tokens=8)
    assert ours.model.config.image_token_id not in answer.tolist()[0]


@pytest.mark.versions
@pytest.mark.parametrize("model_type", ["llava", "llava_llama"])
@pytest.mark.parametrize("tower", ["folder", "checkpoint"])
def test_plain_llava_loads_as_it_is(plain, tmp_path, tower, model_type):
    folder = written(tmp_path / "original", plain, tower=tower, model_type=model_type)
    ours = load_backbone(folder)
    assert ours.remark == ""
    assert_same(ours, plain)
    assert checkpoint_family(str(folder)).lmms_eval == "llava_hf"
    assert checkpoint_revision(str(folder)) == ours.revision
    assert list(ours.processor.image_processor.image_mean) == [0.5, 0.4, 0.3]
    assert ours.model.generation_config.repetition_penalty == 1.05


@pytest.mark.versions
@pytest.mark.parametrize(("torch_files", "shards"), [(True, 1), (True, 2), (False, 2)])
def test_stf_loads_from_files_of_any_kind(fused, tmp_path, torch_files, shards):
    folder = written(
        tmp_path / "stf",
        fused,
        torch_files=torch_files,
        shards=shards,
        model_type="llava_llama",
        mm_vision_select_layer=[-2, 4, 2],
    )
    ours = load_backbone(folder)
    assert isinstance(ours.model, FusedLlava)
    assert ours.remark == "trained fusion, LLM retrained"
    assert_same(ours, fused)
    if torch_files:
        before = checkpoint_revision(str(folder))
        file = next(folder.glob("*.bin"))
        torch.save({name: t + 1 for name, t in torch.load(file, weights_only=True).items()}, file)
        assert checkpoint_revision(str(folder)) != before


def test_stf_is_read_by_the_names_of_its_release(fused, tmp_path):
    folder = written(tmp_path / "stf", fused, mm_vision_select_layer=[-2, 4, 2])
    names = load_file(folder / "model.safetensors")
    for layer in ("mm_projector_crosslayer.0", "mm_projector_crosslayer.2", "mm_projector.0", "mm_projector.2"):
        assert {f"model.{layer}.weight", f"model.{layer}.bias"} <= set(names)
    assert_same(load_backbone(folder), fused)
    change(folder, lambda tensors: tensors.update({"z.a.weight": tensors.pop("model.mm_projector.0.weight")}))
    with pytest.raises(InputError, match=r"neither LLaVA-1.5's nor STF's .*z.a.weight"):
        load_backbone(folder)


def test_what_was_read_is_written_as_our_own_and_loads_again(plain, fused, tmp_path):
    for name, backbone in (("plain", plain), ("stf", fused)):
        layers = {"mm_vision_select_layer": [-2, 4, 2]} if name == "stf" else {}
        folder = written(tmp_path / name, backbone, tower="checkpoint", model_type="llava_llama", **layers)
        ours = load_backbone(export_checkpoint(folder, tmp_path / f"{name}-own"))
        said = json.loads((tmp_path / f"{name}-own" / "config.json").read_text())
        assert "vision_config" in said
        assert said["model_type"] == "llava"
        assert not is_original(said)
        assert_same(ours, backbone)
        assert ours.processor.chat_template == VICUNA_TEMPLATE
    with pytest.raises(InputError, match="leave --pretrained out"):
        export_checkpoint(folder, tmp_path / "more", "tiny")
    half = written(tmp_path / "half", plain, torch_dtype="float16")
    export_checkpoint(half, tmp_path / "half-own")
    assert {t.dtype for t in load_file(tmp_path / "half-own" / "model.safetensors").values()} == {torch.float16}


def test_a_scorer_beside_it_is_found(plain, tmp_path):
    folder = written(tmp_path / "original", plain)
    scorer = Scorer(WIDTH, 8)
    change(folder, lambda t: t.update({f"visual.importance_scorer.{k}": v for k, v in scorer.state_dict().items()}))
    assert len(load_backbone(folder).host.extra_weights) == 4


def test_a_processor_is_made_where_none_is(plain, tmp_path):
    folder = written(tmp_path / "original", plain)
    (folder / "clip" / "preprocessor_config.json").unlink()
    images = load_backbone(folder).processor.image_processor
    assert images.crop_size == {"height": SIZE, "width": SIZE}
    (folder / "generation_config.json").unlink()
    assert load_backbone(folder).model.generation_config.eos_token_id == plain.model.config.text_config.eos_token_id


def drop(name: str) -> Any:
    return lambda tensors: tensors.pop(name)


def put(name: str, *shape: int) -> Any:
    return lambda tensors: tensors.update({name: torch.zeros(shape)})


@pytest.mark.parametrize(
    ("stf", "fields", "edit", "message"),
    [
        (False, {"tower": "nowhere"}, None, "LLaVA checkpoint without vision tower weights: .*openai/clip-vit-large"),
        (False, {"tower": "no weights"}, None, "LLaVA checkpoint without vision tower weights"),
        (False, {"hidden_size": "gone"}, None, "lacks 'hidden_size'"),
        (False, {"mm_use_im_start_end": True}, None, "puts markers around images"),
        (False, {"mm_vision_select_feature": "cls_patch"}, None, "shows the CLS token"),
        (False, {"model_type": "llava_mistral"}, None, "family 'llava_mistral', which has no adapter"),
        (False, {}, drop("model.layers.1.mlp.up_proj.weight"), "1 tensors missing"),
        (False, {}, put("model.image_newline", 64), "no place is known for: 'model.image_newline' 64"),
        (False, {}, put("model.mm_projector.0.weight", 64, 32), "STF weights of another width or layer list"),
        (True, {}, None, "of another layer list: they read 3 hidden states, the published ones 8"),
        (True, {"mm_vision_select_layer": [-2, 4, 1, 2]}, None, "of another layer list: they read 3"),
        (True, {"mm_vision_select_layer": [-2, 4, 9]}, None, "hidden state 9 of the vision tower"),
        (True, {"mm_vision_select_layer": [-2, 4, 2]}, drop("model.mm_projector.0.bias"), "lack 'model.mm_proj"),
        (True, {"mm_vision_select_layer": [-2, 4, 2]}, drop("model.mm_projector.0.weight"), "another width"),
        (True, {"mm_vision_select_layer": [-2, 4, 2]}, put("model.mm_projector.norm.weight", 48), "no place is known"),
    ],
)
def test_what_does_not_fit_is_one_clear_line(plain, fused, tmp_path, stf, fields, edit, message):
    fields = dict(fields)
    lost = fields.get("tower") == "no weights"
    if lost:
        fields["tower"] = "folder"
    folder = written(tmp_path / "original", fused if stf else plain, **fields)
    if lost:
        (folder / "clip" / "model.safetensors").unlink()
    if edit:
        change(folder, edit)
    with pytest.raises(InputError, match=message) as caught:
        load_backbone(folder)
    assert "\n" not in str(caught.value)


def test_no_weights_and_a_tower_that_is_no_clip(plain, tmp_path):
    folder = written(tmp_path / "a", plain)
    shutil.copytree(folder, tmp_path / "b")
    (folder / "model.safetensors").unlink()
    with pytest.raises(InputError, match="holds no weights"):
        load_backbone(folder)
    tower = tmp_path / "b" / "clip" / "config.json"
    tower.write_text(json.dumps({**json.loads(tower.read_text()), "model_type": "siglip_vision_model"}))
    with pytest.raises(InputError, match="is 'siglip_vision_model', no CLIP"):
        load_backbone(tmp_path / "b")


@pytest.mark.versions
def test_a_sentencepiece_model_is_read_as_the_original_code_reads_it(plain, tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    folder = written(tmp_path / "original", plain)
    (folder / "tokenizer.json").unlink()
    (tmp_path / "text.txt").write_text(
        "\n".join(["what is the cat on the mat", "USER: ASSISTANT: a curious chat"] * 200)
    )
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"),
        model_prefix=str(folder / "tokenizer"),
        vocab_size=315,
        model_type="bpe",
        byte_fallback=True,
        pad_id=-1,
        normalization_rule_name="identity",  # as Llama was trained
        remove_extra_whitespaces=False,
        minloglevel=2,
    )
    ours = load_backbone(folder)
    tokenizer = ours.processor.tokenizer
    assert tokenizer.convert_tokens_to_ids("<image>") == ours.model.config.image_token_id == 315
    assert (tokenizer.pad_token, tokenizer.eos_token, tokenizer.bos_token) == ("<unk>", "</s>", "<s>")
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    for text in ("what is the cat", "USER: a  chat\nété", " a"):
        assert tokenizer(text).input_ids == [model.bos_id(), *model.encode(text)]
        assert tokenizer.decode(model.encode(text)) == text
    export_checkpoint(folder, tmp_path / "own")
    again = load_backbone(tmp_path / "own").processor.tokenizer
    assert again("USER: <image>\nwhat is</s> a").input_ids == tokenizer("USER: <image>\nwhat is</s> a").input_ids
    behind = tokenizer("USER: <image>\nwhat is").input_ids
    place = behind.index(315)
    # The original code tokenises what stands on either side of an image on its own.
    assert behind[1:place] == model.encode("USER: ")
    assert behind[place + 1 :] == model.encode("\nwhat is")


# --- sizes ------------------------------------------------------------------------------------------------------------


def published_shapes() -> dict[str, tuple[int, ...]]:
    """Of the released 7B."""
    sizes = {
        "model.mm_projector_crosslayer.0": (4096, 8192),
        "model.mm_projector_crosslayer.2": (1024, 4096),
        "model.mm_projector.0": (16384, 4096),
        "model.mm_projector.2": (4096, 16384),
    }
    return {f"{n}.weight": size for n, size in sizes.items()} | {f"{n}.bias": size[:1] for n, size in sizes.items()}


def test_the_published_sizes_fit():
    check_fusion(published_shapes(), 1024, 4096, "x")
    check_fusion(
        {**published_shapes(), "model.mm_projector.2.weight": (5120, 16384), "model.mm_projector.2.bias": (5120,)},
        1024,
        5120,
        "x",
    )
    assert fusion_layers({"mm_vision_select_layer": -2}, 8, "x") == LAYERS
    assert fusion_layers({"mm_vision_select_layer": [23, 18, 12, 6]}, 4, "x") == (23, 18, 12, 6)
    with pytest.raises(InputError, match="another width"):
        check_fusion(published_shapes(), 768, 4096, "x")


def test_a_tower_is_known_by_its_tensors():
    config = CLIPVisionConfig(
        hidden_size=128,
        intermediate_size=96,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=84,
        patch_size=PATCH,
    )
    with torch.device("meta"):
        shapes = {
            f"model.vision_tower.{name.removeprefix('vision_model.')}": tuple(p.shape)
            for name, p in CLIPVisionModel(config).named_parameters()
        }
    made = tower_config(shapes, "x")
    for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "image_size"):
        assert getattr(made, name) == getattr(config, name), name
    with pytest.raises(InputError, match="no CLIP of OpenAI's"):
        tower_config({k: tuple(48 if n == 128 else n for n in v) for k, v in shapes.items()}, "x")
