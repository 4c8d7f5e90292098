"""Where VisionSelector's weights are found, and what it says where they are not."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub.errors import EntryNotFoundError
from safetensors.torch import save_file

from visionselector_eval.baselines import Host, InputError, VisualTokens, build
from visionselector_eval.models.visionselector import Scorer, load_scorer

WIDTH = 8
TOKENS = VisualTokens(features=torch.randn(20, WIDTH), grid=(1, 4, 5))


@pytest.fixture
def weights() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"q_proj.weight": (4, WIDTH), "q_proj.bias": (4,), "k_proj.weight": (4, WIDTH), "k_proj.bias": (4,)}
    return {name: torch.randn(shape, generator=generator).bfloat16() for name, shape in shapes.items()}


def prefixed(weights: dict[str, torch.Tensor], prefix: str = "visual.importance_scorer.") -> dict[str, torch.Tensor]:
    return {prefix + name: tensor for name, tensor in weights.items()}


def sharded(folder: Path, weights: dict[str, torch.Tensor]) -> Path:
    """A checkpoint in three shards, the scorer in two of them, the third deliberately absent."""
    folder.mkdir()
    names = prefixed(weights)
    query = {name: tensor for name, tensor in names.items() if "q_proj" in name}
    key = {name: tensor for name, tensor in names.items() if "k_proj" in name}
    save_file({**query, "model.embed": torch.zeros(3)}, folder / "model-1.safetensors")
    save_file(key, folder / "model-2.safetensors")
    weight_map = dict.fromkeys(query, "model-1.safetensors") | dict.fromkeys(key, "model-2.safetensors")
    weight_map["model.layers.0.self_attn.q_proj.weight"] = "model-3.safetensors"
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def line(error: pytest.ExceptionInfo[InputError]) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_every_kind_of_local_source_gives_the_same_scorer(tmp_path, weights):
    save_file(weights, tmp_path / "plain.safetensors")
    own = tmp_path / "own"
    own.mkdir()
    save_file(weights, own / "scorer.safetensors")
    single = tmp_path / "single"
    single.mkdir()
    save_file({**prefixed(weights), "lm_head.weight": torch.zeros(2)}, single / "model.safetensors")
    shards = sharded(tmp_path / "shards", weights)

    expected = Scorer.from_state(weights)(TOKENS.features)
    prints = set()
    for source in (tmp_path / "plain.safetensors", own, single, shards):
        compressor = build("visionselector", scorer=str(source))
        selection = compressor.compress(TOKENS, 5)
        assert selection.scores is not None
        assert torch.equal(selection.scores, expected)
        bound = compressor.bind(Host(id="host", width=WIDTH))
        assert bound.compress(TOKENS, 5).kept.tolist() == selection.kept.tolist()
        prints |= {compressor.fingerprint(), bound.fingerprint()}
    in_float32 = Scorer.from_state({name: tensor.float() for name, tensor in weights.items()})
    prints.add(build("visionselector", scorer=in_float32).fingerprint())
    assert len(prints) == 1
    assert len(prints.pop()) == 64
    in_float32.k_proj.bias[0] += 1
    assert build("visionselector", scorer=in_float32).fingerprint() not in prints


def test_weights_of_the_backbone(weights):
    host = Host(id="host", width=WIDTH, extra_weights={**prefixed(weights), "visual.other": torch.zeros(1)})
    compressor = build("visionselector")
    bound = compressor.bind(host)
    assert bound == compressor
    assert hash(bound) == hash(compressor)
    assert bound.fingerprint() == ""
    expected = Scorer.from_state(weights)(TOKENS.features)
    assert torch.equal(bound.compress(TOKENS, 5).scores, expected)
    assert torch.equal(pickle.loads(pickle.dumps(bound)).compress(TOKENS, 5).scores, expected)
    with pytest.raises(InputError, match="bind it to a backbone"):
        compressor.compress(TOKENS, 5)
    # An explicit scorer goes before the backbone's own.
    other = Scorer(WIDTH).requires_grad_(False)
    assert torch.equal(build("visionselector", scorer=other).bind(host).score(TOKENS), other(TOKENS.features))


def test_no_scorer_anywhere():
    with pytest.raises(InputError) as error:
        build("visionselector").bind(Host(id="org/stock", width=WIDTH, extra_weights={"visual.x": torch.zeros(1)}))
    assert line(error) == (
        "visionselector needs scorer weights: checkpoint org/stock has no visual.importance_scorer.*; "
        "give scorer=FOLDER_OR_ID"
    )


def test_scorer_of_another_width(tmp_path, weights):
    save_file(weights, tmp_path / "scorer.safetensors")
    with pytest.raises(InputError, match="has width 8 but backbone org/large has 3584") as error:
        build("visionselector", scorer=str(tmp_path)).bind(Host(id="org/large", width=3584))
    line(error)
    with pytest.raises(InputError, match=r"features of shape \(N, 8\), got \(20, 9\)"):
        build("visionselector", scorer=str(tmp_path)).compress(
            VisualTokens(features=torch.zeros(20, 9), grid=(1, 4, 5)), 5
        )


def test_a_trained_module_is_used_as_it_stands(weights):
    scorer = Scorer.from_state(weights)
    compressor = build("visionselector", scorer=scorer)
    before = compressor.compress(TOKENS, 5).scores
    scorer.q_proj.weight.mul_(2)
    after = compressor.compress(TOKENS, 5).scores
    assert not torch.equal(before, after)
    meta = VisualTokens(features=TOKENS.features.to("meta"), grid=TOKENS.grid)
    first = compressor.module_on(meta.features.device)
    assert compressor.module_on(meta.features.device) is first  # copied once
    scorer.q_proj.weight.mul_(2)
    assert compressor.module_on(meta.features.device) is not first


def test_scorer_made_in_inference_mode(tmp_path, weights):
    save_file(weights, tmp_path / "scorer.safetensors")
    with torch.inference_mode():
        compressor = build("visionselector", scorer=str(tmp_path))
        assert len(compressor.compress(TOKENS, 3).kept) == 3
        assert compressor.module_on(torch.device("meta")).q_proj.weight.device.type == "meta"


def test_start_of_training():
    scorer = Scorer(512)
    assert scorer.hidden == 256
    assert scorer.q_proj.bias.abs().max() == 0
    assert scorer.k_proj.weight.std().item() == pytest.approx(1e-4, rel=0.02)
    assert list(scorer.state_dict()) == ["q_proj.weight", "q_proj.bias", "k_proj.weight", "k_proj.bias"]
    parameters = sum(p.numel() for p in Scorer(3584, 1792).parameters())
    assert parameters == 12_848_640  # the released scorer of the 7B


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("k_proj.bias"), "k_proj.bias is missing"),
        (lambda w: w.update({"k_proj.weight": torch.zeros(4, 9)}), r"k_proj.weight has shape \(4, 9\)"),
        (lambda w: w.update({"q_proj.bias": torch.zeros(5)}), r"q_proj.bias has shape \(5,\)"),
        (lambda w: w.update({"q_proj.weight": torch.zeros(5)}), r"q_proj.weight has shape \(5,\)"),
        (lambda w: w.update({"visual.importance_scorer.norm.weight": torch.zeros(5)}), "is missing"),
        (lambda w: w.clear(), "holds no scorer"),
    ],
)
def test_unfit_tensors(weights, change, message):
    change(weights)
    with pytest.raises(InputError, match=message) as error:
        Scorer.from_state(weights, "place")
    assert line(error).startswith("place")


def test_unknown_part_and_two_scorers_are_refused(weights):
    with pytest.raises(InputError, match=r"importance_scorer.norm.weight is unknown"):
        Scorer.from_state({**prefixed(weights), "visual.importance_scorer.norm.weight": torch.zeros(8)})
    twice = {**prefixed(weights), **prefixed(weights, "model.visual.importance_scorer.")}
    assert torch.equal(Scorer.from_state(twice)(TOKENS.features), Scorer.from_state(weights)(TOKENS.features))
    twice["model.visual.importance_scorer.k_proj.bias"] = weights["k_proj.bias"] + 1
    with pytest.raises(InputError, match="several scorers that differ") as error:
        Scorer.from_state(twice)
    line(error)
    with pytest.raises(InputError, match=r"tensor norm\.weight is unknown"):
        Scorer.from_state({**weights, "norm.weight": torch.zeros(8)})


def test_unusable_local_sources(tmp_path, weights):
    empty = tmp_path / "empty"
    empty.mkdir()
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(b"not safetensors at all")
    stock = tmp_path / "stock"
    stock.mkdir()
    save_file({"lm_head.weight": torch.zeros(2)}, stock / "model.safetensors")
    broken_index = tmp_path / "broken"
    broken_index.mkdir()
    (broken_index / "model.safetensors.index.json").write_text("{")
    lost_shard = sharded(tmp_path / "lost", weights)
    (lost_shard / "model-2.safetensors").unlink()
    for source, message in (
        (empty, r"holds no .safetensors or .bin file \(found nothing\)"),
        (damaged, "cannot read damaged.safetensors"),
        (stock, r"holds no scorer: found lm_head.weight in model.safetensors"),
        (broken_index, "is damaged"),
        (lost_shard, "cannot read model-2.safetensors"),
        (tmp_path / "nothing" / "here", "does not exist"),
        ("./nothing", "does not exist"),
    ):
        with pytest.raises(InputError, match=message) as error:
            load_scorer(str(source))
        line(error)


def test_hub_id_while_offline():
    with pytest.raises(InputError, match=r"scorer 'no-such-owner/no-such-model' is no local file or folder") as error:
        load_scorer("no-such-owner/no-such-model")
    assert "give a local folder" in line(error)


def a_hub(folder: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """`folder` is what the hub gives of any repository; returns what is asked for, in order."""
    asked: list[str] = []

    def listed(repo: str) -> list[str]:
        asked.append(repo)
        return [str(file.relative_to(folder)) for file in sorted(folder.rglob("*")) if file.is_file()] + [
            "model-3.safetensors"
        ]

    def download(repo: str, name: str) -> str:
        asked.append(name)
        if not (folder / name).is_file():
            raise EntryNotFoundError(f"404: {name}\nsecond line")
        return str(folder / name)

    monkeypatch.setattr(huggingface_hub, "list_repo_files", listed)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return asked


def test_hub_id_takes_only_the_shards_with_the_scorer(tmp_path, weights, monkeypatch):
    folder = sharded(tmp_path / "repo", weights)
    asked = a_hub(folder, monkeypatch)
    (folder / "pytorch_model.bin").write_bytes(b"not even looked at")
    scorer = load_scorer("owner/name")
    assert torch.equal(scorer.q_proj.bias, weights["q_proj.bias"].float())
    assert asked == ["owner/name", "model.safetensors.index.json", "model-1.safetensors", "model-2.safetensors"]
    save_file(weights, folder / "scorer.safetensors")
    asked.clear()
    load_scorer("owner/name")
    assert asked == ["owner/name", "scorer.safetensors"]


def test_a_folder_of_a_hub_repository(tmp_path, weights, monkeypatch):
    asked = a_hub(tmp_path, monkeypatch)
    (tmp_path / "a" / "b").mkdir(parents=True)
    torch.save(weights, tmp_path / "a" / "b" / "any.bin")
    assert torch.equal(load_scorer("owner/name/a/b").q_proj.bias, weights["q_proj.bias"].float())
    assert asked == ["owner/name", "a/b/any.bin"]


def test_what_is_cached_serves_while_the_hub_is_out_of_reach(tmp_path, weights, monkeypatch):
    def unreachable(repo: str) -> list[str]:
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub, "list_repo_files", unreachable)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda repo, local_files_only: str(tmp_path))
    torch.save(weights, tmp_path / "any.bin")
    assert torch.equal(load_scorer("owner/name").q_proj.bias, weights["q_proj.bias"].float())


def test_angelslim_is_a_name_of_its_hub_id(tmp_path, weights, monkeypatch):
    asked = a_hub(tmp_path, monkeypatch)
    save_file(prefixed(weights, "module."), tmp_path / "selector_final.safetensors")
    monkeypatch.setattr(
        huggingface_hub, "list_repo_files", lambda repo: asked.append(repo) or ["selector_final.safetensors"]
    )
    scores = build("idpruner", scorer="angelslim").compress(TOKENS, 5).scores
    assert torch.equal(scores, Scorer.from_state(weights)(TOKENS.features))
    assert asked == ["AngelSlim/Qwen2.5-VL-7B-Instruct-Selector", "selector_final.safetensors"]


PREFIXES = [
    "",
    "module.",
    "_orig_mod.",
    "module._orig_mod.",
    "visual.importance_scorer.",
    "model.visual.importance_scorer.",
]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("layout", ["any.safetensors", "any.bin", "old.bin", "shards.safetensors", "shards.bin"])
def test_released_names_in_any_file_of_a_folder(tmp_path, weights, prefix, layout):
    names = prefixed(weights, prefix)
    other = {"model.layers.0.self_attn.q_proj.weight": torch.zeros(2, 2), "lm_head.weight": torch.zeros(2)}
    store = save_file if layout.endswith("safetensors") else torch.save
    if layout.startswith("shards"):
        kind = layout.partition(".")[2]
        parts = {f"x-1.{kind}": dict(list(names.items())[:2]), f"x-2.{kind}": {**dict(list(names.items())[2:])}}
        for file, part in parts.items():
            store(part, tmp_path / file)
        weight_map = {name: file for file, part in parts.items() for name in part}
        (tmp_path / f"x.{kind}.index.json").write_text(json.dumps({"weight_map": weight_map}))
    elif layout == "old.bin":
        torch.save(names, tmp_path / layout, _use_new_zipfile_serialization=False)
    else:
        store(names, tmp_path / layout)
    save_file(other, tmp_path / "backbone.safetensors")
    torch.save(Path("no tensor"), tmp_path / "training_args.bin")
    (tmp_path / "config.json").write_text("{}")
    assert torch.equal(load_scorer(str(tmp_path))(TOKENS.features), Scorer.from_state(weights)(TOKENS.features))


def test_files_that_contradict_each_other_are_one_line_and_copies_are_not(tmp_path, weights):
    save_file(weights, tmp_path / "a.safetensors")
    torch.save(weights, tmp_path / "b.bin")
    load_scorer(str(tmp_path))
    torch.save({**weights, "k_proj.bias": weights["k_proj.bias"] + 1}, tmp_path / "b.bin")
    with pytest.raises(InputError, match=r"k_proj.bias has other values in b.bin than in a.safetensors") as error:
        load_scorer(str(tmp_path))
    line(error)


def test_a_pickle_is_never_run(tmp_path):
    class Runs:
        def __reduce__(self):
            return (Path(tmp_path / "ran").touch, ())

    torch.save({"q_proj.weight": Runs()}, tmp_path / "scorer.bin")
    for source in (tmp_path, tmp_path / "scorer.bin"):
        with pytest.raises(InputError, match=r"scorer.bin can't be read as tensors alone") as error:
            load_scorer(str(source))
        line(error)
    assert not (tmp_path / "ran").exists()


def test_stock_backbones_default_to_their_released_scorer():
    """`--pretrained Qwen/Qwen2.5-VL-7B-Instruct --methods visionselector` works as it is; what is given wins."""
    from visionselector_eval.baselines.contract.registry import resolve_options

    stock = "Qwen/Qwen2.5-VL-7B-Instruct"
    assert resolve_options("visionselector", {}, stock)["scorer"] == "JulietChoo/VisionSelector-Qwen2.5-VL-7B"
    assert resolve_options("visionselector", {"scorer": "mine"}, stock)["scorer"] == "mine"
    assert resolve_options("visionselector", {}, "tiny")["scorer"] is None
    assert resolve_options("visionselector", {})["scorer"] is None
    assert "scorer" not in resolve_options("divprune", {}, stock)
