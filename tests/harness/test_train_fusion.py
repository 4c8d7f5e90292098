"""The command `train token-fusion`: both stages, what comes out, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from llava_checkpoint import save_llava
from PIL import Image

from visionselector_eval.harness import cli
from visionselector_eval.harness.cli.commands import COMMANDS
from visionselector_eval.harness.cli.train import training_from
from visionselector_eval.models import load_backbone

QUICK = ["--batch-size", "2", "--total-batch", "4", "--max-steps", "2", "--device", "cpu", "--report-to", "none"]
LAYERS = ["--layers", "-2", "4", "2"]


def run(*arguments: str | Path) -> int:
    return cli.main([str(a) for a in arguments])


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llava(tmp_path_factory.mktemp("plain"), learned=False)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("data")
    lines = []
    for number, colour in enumerate(("red", "green", "blue", "teal")):
        Image.new("RGB", (84, 56), colour).save(folder / f"{number}.png")
        turns = [{"from": "human", "value": "<image>\nWhich colour?"}, {"from": "gpt", "value": colour}]
        lines.append(json.dumps({"image": f"{number}.png", "conversations": turns}))
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "train.jsonl"


def test_both_stages_and_a_sweep_of_the_result(plain, data, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "one.yaml").write_text(yaml.safe_dump({"data": [str(data)], "layers": [-2, 4, 2]}))
    first = ["train", "token-fusion", "--spec", "one.yaml", "--pretrained", plain, *QUICK]
    assert run(*first, "--dry-run") == 0
    assert "4 samples, 2 steps of 4 samples" in capsys.readouterr().out
    assert run(*first, "--output", "one") == 0
    assert "token-fusion weights: one" in capsys.readouterr().out
    assert Path("one/fusion.safetensors").is_file()
    assert "--stage 2 --pretrained FOLDER" in Path("one/README.md").read_text()
    second = ["train", "token-fusion", "--stage", "2", "--pretrained", "one", "--data", data, *QUICK, "--output", "two"]
    assert run(*second) == 0
    assert run(*second) == 0
    assert "finished after 2 steps" in capsys.readouterr().out
    assert load_backbone("two").remark
    image = data.parent / "0.png"
    assert run("ask", "--pretrained", "two", "--image", image, "Q", "--max-new-tokens", "2", "--budget", "1.0") == 0
    assert run("export", "one", "whole") == 0
    assert run("export", "--to", "fusion", "whole", "again") == 0
    assert Path("again/fusion.safetensors").read_bytes() == Path("one/fusion.safetensors").read_bytes()
    answers = {}
    for name in ("two", "whole"):
        capsys.readouterr()
        assert run("ask", "--pretrained", name, "--image", image, "Q", "--max-new-tokens", "2") == 0
        answers[name] = capsys.readouterr().out
        assert "trained fusion, LLM retrained" in answers[name]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--budget", "0.2"], "--budget is no setting of `train token-fusion`"),
        (["--accumulation", "2"], "--accumulation is no setting of `train token-fusion`"),
        (["--layers", "-2", "x"], "argument --layers: invalid int value: 'x'"),
        (["--stage", "3"], "invalid stage '3' in the training spec: expected 1 or 2"),
        (["--pretrained", "./gone"], "no checkpoint folder at './gone'"),
        (["--pretrained", "tiny"], "is of family 'qwen2_5_vl'"),
        (["--pretrained", "PLAIN", "--stage", "2"], "give the result folder of stage 1"),
        (["--pretrained", "PLAIN", "--total-batch", "3", "--batch-size", "2"], "give a batch_size that divides it"),
        (
            ["--pretrained", "PLAIN", "--template", "chatml"],
            "invalid template 'chatml' in the training spec: expected 'vicuna'",
        ),
        (["--pretrained", "PLAIN", "--layers", "5"], "hidden state 5 of the vision tower, which has 0 to 4"),
    ],
)
def test_it_refuses_in_one_line(plain, data, tmp_path, monkeypatch, capsys, arguments, reason):
    monkeypatch.chdir(tmp_path)
    given = [str(plain) if a == "PLAIN" else a for a in arguments]
    assert run("train", "token-fusion", "--data", data, "--device", "cpu", *given) == 2
    message = capsys.readouterr().err.splitlines()
    assert reason in message[-1]
    assert not any("Traceback" in line for line in message)


def test_flags_become_the_spec():
    given = ["token-fusion", "--data", "a.jsonl", *LAYERS, "--stage", "2", "--pad-square", "false"]
    made = training_from(COMMANDS["train"].parser().parse_all(given))
    assert (made.layers, made.stage, made.pad_square, made.learning_rate) == ([-2, 4, 2], 2, False, 2e-5)
