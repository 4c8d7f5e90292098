"""The commands `train`, `data` and `export`: what they write, what they refuse, and that no evaluation data leaks."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from visionselector_eval.baselines import InputError
from visionselector_eval.harness import cli
from visionselector_eval.harness.cli.commands import COMMANDS
from visionselector_eval.harness.cli.train import training_from
from visionselector_eval.harness.training import data as training_data
from visionselector_eval.models.inputs import MediaSettings, build_inputs
from visionselector_eval.models.training.data import IGNORED, Conversations, Tokeniser
from visionselector_eval.models.training.records import MediaPaths
from visionselector_eval.models.training.spec import SPECS
from visionselector_eval.tasks.binding import bind, requests
from visionselector_eval.tasks.scoring import score
from visionselector_eval.tasks.tiny import MIRRORS, generate

SEED = 1_000_003


def run(*arguments: str | Path) -> int:
    return cli.main([str(a) for a in arguments])


def records(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


# --- data mirrors -----------------------------------------------------------------------------------------------------


def test_mirrors_ask_what_sweeps_ask_and_never_the_same_documents(tiny, tmp_path, capsys):
    tasks = ["tiny_docvqa_val", "tiny_mme", "tiny_mmmu_val", "tiny_mvbench_moving_direction"]
    assert (
        run("data", "mirrors", "--tasks", *tasks, "--documents", "4", "--seed", SEED, "--output", tmp_path / "d") == 0
    )
    assert "16 conversations" in capsys.readouterr().out
    made = Conversations(
        [tmp_path / "d" / "train.jsonl"], MediaPaths(), Tokeniser(tiny.processor, MediaSettings(), 9999)
    )
    by_id = {r["id"]: made[i] for i, r in enumerate(records(tmp_path / "d" / "train.jsonl"))}
    for task in tasks:
        bound = bind(task, cache_dir=tmp_path / "cache", seed=SEED, documents=4)
        answers: dict[str, dict[int, str]] = {}
        for request in requests(bound):
            sample = by_id[f"{task}-{request.doc_id:06d}"]
            assert isinstance(sample, dict)
            asked = build_inputs(tiny.processor, [request.messages()], MediaSettings())
            ids = asked["input_ids"][0]
            assert sample["input_ids"][: len(ids)].tolist() == ids.tolist(), task
            for name in ("pixel_values", "pixel_values_videos"):
                assert (name in asked) == (name in sample)
                assert name not in asked or bool((asked[name] == sample[name]).all()), task
            spoken = tiny.processor.tokenizer.decode(sample["labels"][sample["labels"] != IGNORED])
            answers.setdefault(request.task, {})[request.doc_id] = spoken.removesuffix("<|im_end|>\n")
        result = score(bound, answers, output_path=tmp_path / "scores")
        assert result.score == pytest.approx(_full(task), rel=1e-6), task


def _full(task: str) -> float:
    return {"tiny_mme": 400.0, "tiny_mvbench_moving_direction": 100.0}.get(task, 1.0)


@pytest.mark.parametrize("task", sorted(MIRRORS))
def test_training_images_are_none_of_the_evaluations(task):
    """By digest of what is shown, whatever is asked; also that the digest would find an equal one."""
    taken = training_data.evaluation_images(task)
    assert training_data.image_digest(generate(task, 0, 2)[0]) in taken
    drawn = {training_data.image_digest(d) for d in generate(task, SEED, 24)}
    assert not drawn & taken
    drawn_rows = {d.digest() for d in generate(task, SEED, 24)}
    assert not drawn_rows & {d.digest() for d in generate(task, 0, 64)}


def test_a_image_that_sweeps_show_is_left_out(tmp_path, monkeypatch):
    taken = frozenset({training_data.image_digest(generate("tiny_docvqa_val", SEED, 2)[1])})
    monkeypatch.setattr(training_data, "evaluation_images", lambda task: taken)
    report = training_data.write_mirrors(["tiny_docvqa_val"], tmp_path / "d", seed=SEED, documents=3)
    assert (report.samples, report.left_out) == (2, 1)
    assert {r["id"] for r in records(report.file)} == {"tiny_docvqa_val-000000", "tiny_docvqa_val-000002"}


def test_mirrors_in_blocks_are_all_different(tmp_path, monkeypatch):
    monkeypatch.setattr(training_data, "_BLOCK", 2)
    report = training_data.write_mirrors(["tiny_docvqa_val"], tmp_path / "d", seed=SEED, documents=5)
    assert report.samples == 5
    assert len({p.read_bytes() for p in (tmp_path / "d" / "media").iterdir()}) == 5


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["mirrors", "--output", "out", "--seed", "0"], "draws the documents that sweeps ask"),
        (["mirrors", "--output", "out", "--tasks", "tiny_docvq"], "did you mean 'tiny_docvqa_val'"),
        (["mirrors", "--output", "out", "--documents", "0"], "documents >= 1"),
        (["mirrors", "--output", "full"], "already exists"),
        (["mirrors"], "give --output"),
        (["mirrors", "--output", "out", "--coco-share", "0.1"], "takes no --coco-share"),
        (["prepare-cambria", "--output", "out"], "did you mean 'prepare-cambrian'"),
        (["prepare-cambrian", "--output", "out"], "needs the file and its images"),
        (["prepare-cambrian", "gone.jsonl", "--image-root", ".", "--output", "out"], "'gone.jsonl' not found"),
        (["prepare-cambrian", "full/x", "--image-root", "gone", "--output", "out"], "invalid image_root"),
        (
            ["prepare-cambrian", "full/x", "--image-root", ".", "--output", "out", "--coco-share", "2"],
            "expected a ratio",
        ),
        (["prepare-cambrian", "full/x", "--image-root", ".", "--output", "out", "--documents", "2"], "no --documents"),
    ],
)
def test_data_refuses_in_one_line(tmp_path, monkeypatch, capsys, arguments, reason):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").touch()
    assert run("data", *arguments) == 2
    message = capsys.readouterr().err
    assert reason in message
    assert message.count("\n") == 1


# --- data prepare-cambrian --------------------------------------------------------------------------------------------


@pytest.fixture
def cambrian(tmp_path: Path) -> Path:
    """A small file in the layout of Cambrian737k.jsonl, beside its images; two are missing, one line is damaged."""
    lines = []

    def add(image: str | None, exists: bool = True) -> None:
        turns = [{"from": "human", "value": "<image>\nQ"}, {"from": "gpt", "value": f"é{len(lines)}"}]
        record: dict[str, Any] = {"id": str(len(lines)), "conversations": turns}
        if image:
            record["image"] = image
            if exists:
                (tmp_path / "images" / image).parent.mkdir(parents=True, exist_ok=True)
                Image.new("RGB", (56, 56)).save(tmp_path / "images" / image)
        lines.append(json.dumps(record, ensure_ascii=False))

    for i in range(40):
        add(f"coco/train2017/{i}.jpg")
    for i in range(5):
        add(f"ocr_vqa/images/{i}.jpg", exists=i != 3)
        add(f"chartqa/train/png/{i}.png")
        add(f"textvqa/train_images/{i}.jpg", exists=i != 0)
        add(f"gqa/images/{i}.jpg", exists=False)
        add(None)
    lines.insert(3, "{damaged")
    file = tmp_path / "Cambrian737k.jsonl"
    file.write_text("\n".join(lines) + "\n")
    return file


def test_cambrian_is_split_and_missing_images_are_reported(cambrian, tmp_path, capsys):
    out = tmp_path / "out"
    assert run("data", "prepare-cambrian", cambrian, "--image-root", tmp_path / "images", "--output", out) == 0
    shown = capsys.readouterr().out
    assert "10 records of other subsets, 1 damaged lines" in shown
    assert {f.name: len(records(f)) for f in out.glob("*.jsonl")} == {
        "ocr_vqa.jsonl": 4,
        "chartqa.jsonl": 5,
        "textvqa.jsonl": 4,
        "coco.jsonl": 4,
        "missing.jsonl": 2,
    }
    assert {r["image"] for r in records(out / "missing.jsonl")} == {
        "ocr_vqa/images/3.jpg",
        "textvqa/train_images/0.jpg",
    }
    summary = json.loads((out / "report.json").read_text())["subsets"]
    assert summary["coco"] == {"records": 40, "chosen": 4, "missing": 0, "written": 4}
    assert summary["ocr_vqa"] == {"records": 5, "chosen": 5, "missing": 1, "written": 4}
    whole = cambrian.read_text().splitlines()
    assert all(line in whole for line in (out / "coco.jsonl").read_text().splitlines())
    # What was written is what the trainer reads.
    assert len(Conversations([out / "coco.jsonl", out / "ocr_vqa.jsonl"], MediaPaths(tmp_path / "images"))) == 8


def test_coco_is_a_seeded_choice(cambrian, tmp_path):
    def chosen(seed: int, share: float = 0.25) -> list[str]:
        out = tmp_path / f"{seed}-{share}"
        training_data.prepare_cambrian(cambrian, tmp_path / "images", out, seed=seed, coco_share=share)
        return [r["image"] for r in records(out / "coco.jsonl")]

    first = chosen(1)
    assert len(first) == 10
    assert first == chosen(1)
    assert first != chosen(2)
    assert len(chosen(1, 1.0)) == 40


def test_a_wrong_image_root_is_a_report_and_exit_3(cambrian, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    out = tmp_path / "out"
    assert run("data", "prepare-cambrian", cambrian, "--image-root", tmp_path / "empty", "--output", out) == 3
    assert "first missing: ocr_vqa/images/0.jpg" in capsys.readouterr().out


# --- train ------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def mirrors(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mirrors") / "data"
    training_data.write_mirrors(["tiny_docvqa_val"], folder, seed=SEED, documents=6)
    return folder / "train.jsonl"


QUICK = ["--batch-size", "2", "--accumulation", "1", "--max-steps", "3", "--device", "cpu", "--report-to", "none"]


@pytest.mark.versions
def test_train_export_and_ask_with_the_result(mirrors, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    image = next((mirrors.parent / "media").iterdir())
    spec = {"data": [str(mirrors)], "learning_rate": "3e-4", "budget": "20%"}
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump(spec))
    assert run("train", "visionselector", "--spec", "tiny.yaml", *QUICK, "--dry-run") == 0
    assert "6 samples, 3 steps of 2 samples" in capsys.readouterr().out
    assert not Path("runs").exists()
    assert run("train", "visionselector", "--spec", "tiny.yaml", *QUICK, "--log-steps", "1") == 0
    captured = capsys.readouterr()
    assert "step 3 of 3: loss" in captured.err
    assert "visionselector weights: runs/visionselector" in captured.out
    saved = yaml.safe_load(Path("runs/visionselector/spec.yaml").read_text())
    assert saved["learning_rate"] == 3e-4
    assert run("train", "visionselector", "--spec", "tiny.yaml", *QUICK) == 0
    assert "finished after 3 steps" in capsys.readouterr().out
    assert run("train", "visionselector", "--spec", "tiny.yaml", *QUICK, "--existing", "overwrite") == 0
    capsys.readouterr()

    assert run("export", "runs/visionselector", "full") == 0
    assert run("export", "--to", "scorer", "full", "back") == 0
    assert Path("back/scorer.safetensors").read_bytes() == Path("runs/visionselector/scorer.safetensors").read_bytes()
    ask = ["ask", "--image", image, "Q", "--max-new-tokens", "2", "--budget", "0.2", "--method", "visionselector"]
    assert run(*ask, "--pretrained", "full") == 0
    from_checkpoint = capsys.readouterr().out
    assert run(*ask, "--scorer", "runs/visionselector") == 0
    assert capsys.readouterr().out.splitlines()[0] in from_checkpoint


def test_train_dynamic_qwen_by_command(mirrors, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert run("train", "dynamic-qwen", "--data", mirrors, "--hidden", "16", *QUICK) == 0
    assert "dynamic-qwen weights: runs/dynamic-qwen" in capsys.readouterr().out
    assert Path("runs/dynamic-qwen/predictor_config.json").is_file()


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["visionselecto"], "did you mean 'visionselector'"),
        (["visionselector"], "give --data FILE"),
        (["visionselector", "--data", "gone.jsonl"], "training data 'gone.jsonl' not found"),
        (["visionselector", "--data", "x.txt"], "must be .jsonl or .parquet"),
        (["visionselector", "--data", "empty.jsonl"], "holds no samples"),
        (["visionselector", "--data", "key.jsonl"], "key.jsonl:1: key 'conversations' is missing"),
        (["visionselector", "--data", "abs.jsonl"], "abs.jsonl:1: path '/a.png' is absolute"),
        (["visionselector", "--data", "DATA", "--budget", "1.0"], "keeps every visual token"),
        (["visionselector", "--data", "DATA", "--budget", "999tok"], "needs 0 < k < N"),
        (["visionselector", "--data", "DATA", "--budget", "0.001", "--upstream-exact", "true"], "keeps 0 of"),
        (["visionselector", "--data", "DATA", "--max-length", "20"], "but the context holds 20"),
        (["visionselector", "--data", "DATA", "--image-root", "gone"], "invalid image_root 'gone': expected a folder"),
        (
            ["visionselector", "--data", "DATA", "--tau-start", "1"],
            "--tau-start is no setting of `train visionselector`",
        ),
        (["visionselector", "--data", "DATA", "--learning-rat", "1"], "did you mean --learning-rate"),
        (["visionselector", "--data", "DATA", "--device", "tpu"], "device 'tpu'"),
        (["visionselector", "--data", "DATA", "--pretrained", "./gone"], "no checkpoint folder at './gone'"),
        (["visionselector", "--data", "DATA", "--init", "./gone"], "scorer './gone' does not exist"),
        (["visionselector", "--data", "DATA", "--output", "taken"], "holds no training"),
        (["visionselector", "--data", "DATA", "--spec", "typo.yaml"], "did you mean 'learning_rate'"),
        (["visionselector", "--data", "DATA", "--report-to", "wand"], "did you mean 'wandb'"),
        (["dynamic-qwen", "--data", "DATA", "--layer", "9"], "layers 0 to"),
        (["dynamic-qwen", "--data", "DATA", "--budget", "16tok"], "expected a ratio"),
        (["dynamic-qwen", "--data", "DATA", "--hidden", "12"], "hidden a multiple of 8"),
    ],
)
def test_train_refuses_in_one_line(mirrors, tmp_path, monkeypatch, capsys, arguments, reason):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.txt").touch()
    (tmp_path / "empty.jsonl").write_text("\n")
    (tmp_path / "key.jsonl").write_text('{"image": "a.png"}\n')
    turns = [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]
    (tmp_path / "abs.jsonl").write_text(json.dumps({"image": "/a.png", "conversations": turns}) + "\n")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "thesis.tex").touch()
    (tmp_path / "typo.yaml").write_text("learning_rat: 1\n")
    given = [str(mirrors) if a == "DATA" else a for a in arguments]
    quick = [] if "--device" in given else ["--device", "cpu"]
    assert run("train", *given, *quick) == 2
    message = capsys.readouterr().err.splitlines()
    assert reason in message[-1]
    assert message[-1].startswith("visionselector-eval: ")
    assert not any("Traceback" in line for line in message)


def test_flags_and_fields_are_the_same():
    parser = COMMANDS["train"].parser()
    text = parser.format_help()
    for kind, spec in SPECS.items():
        for name, info in spec.model_fields.items():
            assert info.description, name
            assert f"--{name.replace('_', '-')}" in text, name
        assert kind in text
    given = parser.parse_all(["dynamic-qwen", "--data", "a.jsonl", "b.jsonl", "--gradient-checkpointing", "false"])
    made = training_from(given)
    assert (made.kind, made.data, made.gradient_checkpointing) == ("dynamic-qwen", ["a.jsonl", "b.jsonl"], False)


def test_export_refuses_in_one_line(tmp_path, capsys):
    for arguments, reason in (
        ([tmp_path / "gone", tmp_path / "out"], "no result of a training"),
        (["--to", "scorers", "tiny", tmp_path / "out"], "did you mean 'scorer'"),
        (["--to", "scorer", "--pretrained", "tiny", "tiny", tmp_path / "out"], "takes no --pretrained"),
    ):
        assert run("export", *arguments) == 2
        assert reason in capsys.readouterr().err
    with pytest.raises(InputError):
        training_data.write_mirrors(["tiny_docvqa_val"], tmp_path, seed=-1, documents=1)
