"""The command: every subcommand does what its help says, and every mistake is one line on stderr and exit code 2."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from battery import draw_image
from PIL import Image
from safetensors.torch import load_file, save_file

from visionselector_eval.baselines import available, parse_budget
from visionselector_eval.harness import cli
from visionselector_eval.harness.cli import sweep as sweep_command
from visionselector_eval.harness.cli.arguments import EXIT_BAD_INPUT, PROGRAM, spec_from
from visionselector_eval.harness.cli.commands import COMMANDS
from visionselector_eval.harness.store.run import load_run
from visionselector_eval.harness.sweep import worker
from visionselector_eval.models.backbones.qwen2_5_vl import Qwen2_5_VL
from visionselector_eval.models.inputs import MediaSettings, build_inputs
from visionselector_eval.models.tiny import checkpoint
from visionselector_eval.tasks import binding
from visionselector_eval.tasks.tiny import MIRRORS, clips, store

ROOT = Path(__file__).resolve().parents[2]
SMALL = ["--methods", "divprune", "--budgets", "0.2", "--tasks", "tiny_pope", "--limit", "2", "--device", "cpu"]


@pytest.fixture(scope="module")
def media(tmp_path_factory) -> Path:
    """A folder with an image, a video and a file that is neither."""
    folder = tmp_path_factory.mktemp("media")
    draw_image(224, 224).save(folder / "picture.png")
    clips.write_clip(folder / "clip.mp4", np.stack([np.asarray(draw_image(112, 112, i)) for i in range(8)]))
    (folder / "text.png").write_text("no image")
    (folder / "text.mp4").write_text("no video")
    return folder


def run(capsys, *arguments: str) -> tuple[int, str, str]:
    capsys.readouterr()
    code = cli.main(list(arguments))
    said = capsys.readouterr()
    return code, said.out, said.err


# help ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", COMMANDS)
def test_every_subcommand_has_an_example_that_it_understands(command, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([command, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    examples = [line.strip() for line in text.partition("example:\n")[2].splitlines() if line.strip()]
    assert examples
    for example in examples:
        program, name, *flags = shlex.split(example)
        assert (program, name) == (PROGRAM, command)
        parsed = COMMANDS[command].parser().parse_all(flags)
        if command == "sweep":
            spec_from(parsed)


def test_the_overview_names_every_command_and_exit_code(capsys):
    for asked in (["--help"], ["-h"], ["help"]):
        code, out, err = run(capsys, *asked)
        assert (code, err) == (0, "")
        assert all(re.search(rf"^  {name} ", out, re.M) for name in COMMANDS)
        assert "2 bad input" in out
    example = out.strip().splitlines()[-1].split()
    spec_from(sweep_command.parser().parse_all(example[1:]))
    assert run(capsys, "--version")[1].startswith(f"{PROGRAM} 0.")


# list, doctor, report ------------------------------------------------------------------------------------------------


def test_list_names_everything_that_a_sweep_takes(capsys):
    code, everything, err = run(capsys, "list")
    assert (code, err) == (0, "")
    code, compressors, _ = run(capsys, "list", "compressors")
    for name in available():
        assert re.search(rf"^{name} +(projector|pixels|decoder|-) +\S", compressors, re.M), name
    assert "upstream_exact=False" in compressors
    for what, names in (
        ("backbones", ["qwen2_5_vl", "tiny"]),
        ("suites", ["tiny", "visionselector9", "visionselector13"]),
        ("tasks", ["tiny_docvqa_val", "chartqa", "mme"]),
    ):
        code, out, _ = run(capsys, "list", what)
        assert code == 0
        assert all(name in out for name in names)
        assert out.strip() in everything


def test_doctor_says_what_is_there(capsys):
    code, out, _ = run(capsys, "doctor")
    assert code in (0, 3)
    for subject in ("torch", "lmms-eval", "entry point", "embedded checkpoint", "hub"):
        assert subject in out


def test_report_rebuilds_the_leaderboard_from_the_folder_alone(tmp_path, capsys):
    """The same bytes after the files are gone and the folder has moved; the table is printed by both commands."""
    code, swept, _ = run(capsys, "sweep", *SMALL, "--output", str(tmp_path / "run"))
    assert code == 0
    first = {p.name: p.read_bytes() for p in (tmp_path / "run").glob("leaderboard.*")}
    assert sorted(first) == [f"leaderboard.{ending}" for ending in ("csv", "html", "md", "tex")]
    for name in first:
        (tmp_path / "run" / name).unlink()
    (tmp_path / "run").rename(tmp_path / "moved")
    for _ in range(2):
        code, reported, err = run(capsys, "report", str(tmp_path / "moved"))
        assert (code, err) == (0, "")
        assert {p.name: p.read_bytes() for p in (tmp_path / "moved").glob("leaderboard.*")} == first
        assert swept.startswith(reported)
    assert "divprune" in reported
    assert "tiny_pope" in re.sub(r"\s+", "", reported)
    code, held, err = run(capsys, "report", str(tmp_path / "moved"), "--against", "full")
    assert (code, err) == (0, "")
    assert held.startswith(reported)
    assert "against full" in held
    assert "divprune" in (tmp_path / "moved" / "against.md").read_text()
    assert (tmp_path / "moved" / "against.csv").read_text().startswith("backbone,label,budget,task,difference,low,high")


# ask -----------------------------------------------------------------------------------------------------------------

NUMBERS = re.compile(
    r"^\[\S+ at budget \S+: (\d+) of (\d+) visual tokens kept( \([\d.]+ %\))?, "
    r"(\d+) prompt tokens, (\d+) new tokens\]$"
)


def asked(out: str) -> tuple[str, int, int]:
    """The answer, kept and total tokens of what `ask` printed."""
    answer, _, last = out.removesuffix("\n").rpartition("\n")
    found = NUMBERS.match(last)
    assert found, last
    return answer, int(found[1]), int(found[2])


@pytest.mark.parametrize("method", available())
def test_ask_answers_with_every_compressor(method, media, capsys):
    budget = parse_budget("0.2")
    code, out, _ = run(
        capsys,
        *("ask", "--image", str(media / "picture.png"), "What is it?", "--method", method, "--budget", "20%"),
        *("--max-new-tokens", "6", "--device", "cpu"),
    )
    assert code == 0
    _, kept, total = asked(out)
    assert total == 64
    assert kept == 64 if method == "full" else kept == 12
    assert kept <= budget.count(64) or method == "full"


def test_ask_full_is_the_stock_model(media, tiny, capsys):
    _, out, _ = run(
        capsys, "ask", "--image", str(media / "picture.png"), "Why?", "--max-new-tokens", "9", "--device", "cpu"
    )
    parts = [{"type": "image", "image": Image.open(media / "picture.png")}, {"type": "text", "text": "Why?"}]
    inputs = build_inputs(tiny.processor, [[{"role": "user", "content": parts}]], MediaSettings())
    tokens = tiny.model.generate(**inputs, max_new_tokens=9, do_sample=False)[0, inputs["input_ids"].shape[1] :]
    assert asked(out) == (tiny.processor.tokenizer.decode(tokens, skip_special_tokens=True), 64, 64)


def test_ask_takes_a_video_or_no_media_at_all(media, capsys):
    code, out, _ = run(
        capsys,
        *("ask", "--video", str(media / "clip.mp4"), "What moves?", "--method", "uniform", "--budget", "7tok"),
        *("--max-num-frames", "4", "--max-new-tokens", "3"),
    )
    assert code == 0
    assert asked(out)[1:] == (7, 2 * 16)
    code, out, _ = run(capsys, "ask", "Hello?", "--method", "divprune", "--budget", "0.1", "--max-new-tokens", "3")
    assert code == 0
    assert asked(out)[1:] == (0, 0)


def test_ask_names_the_remark_of_a_backbone(media, capsys, monkeypatch):
    question = ["ask", "Hello?", "--max-new-tokens", "2"]
    assert "retrained" not in run(capsys, *question)[1]
    monkeypatch.setattr(Qwen2_5_VL, "remark", "LLM retrained", raising=False)
    assert run(capsys, *question)[1].endswith("new tokens]\n[tiny: LLM retrained]\n")


# mistakes ------------------------------------------------------------------------------------------------------------


def broken(folder: Path, change) -> str:
    """A copy of the embedded checkpoint with something wrong."""
    shutil.copytree(checkpoint(), folder)
    change(folder)
    return str(folder)


def truncated(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:300_000])


def other_family(folder: Path) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": 64}))


def without_scorer(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    stock = {k: v for k, v in tensors.items() if "importance_scorer" not in k}
    save_file(stock, folder / "model.safetensors", metadata={"format": "pt"})


def wide_scorer(folder: Path) -> str:
    folder.mkdir()
    shapes = {"weight": (64, 128), "bias": (64,)}
    tensors = {f"{p}_proj.{part}": torch.zeros(shape) for p in "qk" for part, shape in shapes.items()}
    save_file(tensors, folder / "scorer.safetensors")
    return str(folder)


def long_image(path: Path) -> str:
    Image.new("RGB", (9000, 12)).save(path)
    return str(path)


def written(path: Path, text: str) -> str:
    path.write_text(text)
    return str(path)


# name: arguments, made in a temporary folder `t` from a media folder `m`; a pattern of the line
MISTAKES = {
    "method": (lambda t, m: ["sweep", "--methods", "divprun"], "unknown method 'divprun': did you mean 'divprune'"),
    "method of ask": (lambda t, m: ["ask", "?", "--method", "divprun"], "unknown method 'divprun': did you mean"),
    "option": (
        lambda t, m: ["sweep", "--methods", "divprune:upstram_exact=true"],
        "unknown option of method divprune 'upstram_exact': did you mean 'upstream_exact'",
    ),
    "option of ask": (
        lambda t, m: ["ask", "?", "--method", "divprune:upstram_exact=true"],
        "unknown option of method divprune 'upstram_exact': did you mean 'upstream_exact'",
    ),
    "option's value": (lambda t, m: ["sweep", "--methods", "divprune:upstream_exact=3"], "wrong type: give a bool"),
    "schedule": (
        lambda t, m: ["sweep", *SMALL, "--methods", "sparsevlm:schedule=publishd"],
        "invalid option schedule='publishd' of method 'sparsevlm': expected geometric",
    ),
    "schedule of another depth": (
        lambda t, m: ["sweep", *SMALL, "--methods", "sparsevlm:schedule=published"],
        "is for an LLM of 32 layers, but this one has 6: leave schedule out",
    ),
    "schedule of another depth of ask": (
        lambda t, m: ["ask", "?", "--method", "pyramiddrop:schedule=published", "--budget", "0.125"],
        r"drops tokens at layers \(8, 16, 24\), but the LLM has 6 layers: leave schedule out",
    ),
    "task": (lambda t, m: ["sweep", "--tasks", "tiny_pop"], "unknown task 'tiny_pop': did you mean 'tiny_pope'"),
    "suite": (lambda t, m: ["sweep", "--suite", "tinny"], "unknown suite 'tinny': did you mean 'tiny'"),
    **{
        f"budget {b} of {c[0]}": (
            lambda t, m, b=b, c=c: [*c, b],
            f"invalid budget '?{b}'?: expected a ratio of visual tokens",
        )
        for b in ("0", "-1", "1.5", "nan", "abc")
        for c in (["sweep", "--budgets"], ["ask", "?", "--budget"])
    },
    "checkpoint missing": (lambda t, m: ["sweep", "--pretrained", str(t / "none")], "no checkpoint folder at"),
    "checkpoint missing of ask": (lambda t, m: ["ask", "?", "--pretrained", "./none"], "no checkpoint folder at"),
    "checkpoint not on the hub": (lambda t, m: ["sweep", "--pretrained", "Qwen/None"], "neither a local folder nor"),
    "checkpoint truncated": (
        lambda t, m: ["sweep", *SMALL, "--pretrained", broken(t / "c", truncated)],
        "weights of .* can't be read",
    ),
    "checkpoint of another family": (
        lambda t, m: ["sweep", "--pretrained", broken(t / "c", other_family)],
        "is of family 'llama', which has no adapter here: available: llava, llava_llama, qwen2_5_vl",
    ),
    "no scorer weights": (
        lambda t, m: [
            *("sweep", *SMALL, "--methods", "visionselector", "divprune"),
            *("--pretrained", broken(t / "c", without_scorer), "--protocol", "checkpoint"),
        ],
        "visionselector.*scorer",
    ),
    "no scorer weights of ask": (
        lambda t, m: ["ask", "?", "--method", "visionselector", "--pretrained", broken(t / "c", without_scorer)],
        "visionselector.*scorer",
    ),
    "scorer of another width": (
        lambda t, m: ["sweep", *SMALL, "--methods", "visionselector", "--scorer", wide_scorer(t / "s")],
        "128.*192",
    ),
    "scorer missing": (lambda t, m: ["sweep", "--methods", "visionselector", "--scorer", str(t / "s")], "scorer"),
    "scorer of no method": (lambda t, m: ["ask", "?", "--scorer", str(t)], "--scorer is for visionselector and other"),
    "image unreadable": (lambda t, m: ["ask", "?", "--image", str(m / "text.png")], "text.png' can't be read"),
    "image too long": (
        lambda t, m: ["ask", "?", "--image", long_image(t / "long.png")],
        "the checkpoint's processor refused the input",
    ),
    "question with a placeholder": (
        lambda t, m: ["ask", "Is <|image_pad|> here?", "--image", str(m / "picture.png")],
        "invalid prompt text: expected none of the family's placeholder tokens",
    ),
    "image missing": (lambda t, m: ["ask", "?", "--image", str(m / "none.png")], "none.png' not found"),
    "image that is a folder": (lambda t, m: ["ask", "?", "--image", str(m)], "can't be read"),
    "video unreadable": (lambda t, m: ["ask", "?", "--video", str(m / "text.mp4")], "text.mp4' can't be decoded"),
    "video missing": (lambda t, m: ["ask", "?", "--video", str(m / "none.mp4")], "none.mp4' not found"),
    "output below a file": (
        lambda t, m: ["sweep", *SMALL, "--output", written(t / "file", "") + "/run"],
        "cannot write to the run folder .*give a folder that you may write to",
    ),
    "output that is a file": (
        lambda t, m: ["sweep", *SMALL, "--output", written(t / "file", "")],
        "cannot write to the run folder",
    ),
    "dry run": (lambda t, m: ["sweep", "--tasks", "tiny_pop", "--dry-run"], "unknown task 'tiny_pop'"),
    "spec with a typo": (
        lambda t, m: ["sweep", "--spec", written(t / "s.yaml", "methods: [divprune]\nbudgts: [0.2]\n")],
        "unknown field of the spec 'budgts': did you mean 'budgets'",
    ),
    "spec with a typo inside": (
        lambda t, m: ["sweep", "--spec", written(t / "s.yaml", "methods: [{name: divprune, lable: x}]\n")],
        "'lable': did you mean 'label'",
    ),
    "spec that is no YAML": (lambda t, m: ["sweep", "--spec", written(t / "s.yaml", "a: [")], "is not YAML"),
    "spec missing": (lambda t, m: ["sweep", "--spec", str(t / "s.yaml")], "can't be read: No such file"),
    "flag": (lambda t, m: ["sweep", "--methds", "divprune"], "unknown argument '--methds': did you mean --methods"),
    "flag of the default command": (lambda t, m: ["--lmit", "4"], "unknown argument '--lmit': did you mean --limit"),
    "flag of ask": (lambda t, m: ["ask", "?", "--imge=x"], "unknown argument '--imge=x': did you mean --image"),
    "subcommand": (lambda t, m: ["swep"], "unknown command 'swep': did you mean 'sweep'"),
    "list": (lambda t, m: ["list", "task"], "unknown list 'task': did you mean 'tasks'"),
    "no question": (lambda t, m: ["ask"], "question"),
    "image and video": (lambda t, m: ["ask", "?", "--image", "a", "--video", "b"], "not allowed with"),
    "no tokens": (lambda t, m: ["ask", "?", "--max-new-tokens", "0"], "expected at least 1"),
    "no run": (lambda t, m: ["report", str(t / "none")], "there is no run folder"),
    "backbone of no row": (
        lambda t, m: ["report", str(t), "--against-backbone", "tiny"],
        "--against-backbone goes with --against",
    ),
    "empty run": (lambda t, m: ["report", str(t)], "no finished or failed cell"),
    "device": (lambda t, m: ["sweep", "--device", "gpu"], "invalid device 'gpu': expected auto"),
    "dtype": (lambda t, m: ["sweep", "--dtype", "float8"], "unknown dtype 'float8'"),
    "attention": (lambda t, m: ["sweep", "--attn-implementation", "flash"], "unknown attn_implementation 'flash'"),
    "flash attention on a CPU": (
        lambda t, m: ["sweep", "--device", "cpu", "--attn-implementation", "flash_attention_2"],
        "flash_attention_2 can't be used",
    ),
    "engine": (lambda t, m: ["sweep", "--engine", "locl"], "unknown engine 'locl': did you mean 'local'"),
    "half a pair": (lambda t, m: ["sweep", "--limit", "3"], "limit 3 for tiny_mme.*try 4"),
    "generation": (lambda t, m: ["sweep", "--generation", "max_new_tokns=4"], "did you mean 'max_new_tokens'"),
}


@pytest.mark.parametrize("what", MISTAKES)
def test_a_mistake_is_one_line_and_exit_code_2(what, media, tmp_path, monkeypatch, capsys):
    from transformers.utils import logging as hf_logging

    hf_logging.disable_progress_bar()  # as the command itself does where stderr is no terminal
    monkeypatch.chdir(tmp_path)
    make, message = MISTAKES[what]
    code, out, err = run(capsys, *make(tmp_path, media))
    assert code == EXIT_BAD_INPUT == 2
    assert out == ""
    assert err.count("\n") == 1, err
    assert err.startswith(f"{PROGRAM}: ")
    assert re.search(message, err), err
    assert "Traceback" not in err


def test_an_empty_data_set_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys):
    """A task whose parquet file has the columns and no rows."""
    full = store.ensure("tiny_chartqa").parquet
    empty = tmp_path / "empty.parquet"
    datasets.Dataset.from_parquet(str(full), cache_dir=str(tmp_path / "hf")).select([]).to_parquet(empty)
    location = {
        "dataset_path": "parquet",
        "dataset_name": None,
        "dataset_kwargs": {"data_files": {"test": str(empty)}, "cache_dir": str(tmp_path / "hf2")},
    }
    bind = binding.bind
    monkeypatch.setattr(worker.binding, "bind", lambda name, **options: bind(name, override=location, **options))
    flags = ["--methods", "divprune", "--budgets", "0.2", "--tasks", "chartqa", "--device", "cpu"]
    code, out, err = run(capsys, "sweep", *flags, "--output", str(tmp_path / "run"))
    assert (code, out) == (2, "")
    assert re.fullmatch(rf"{PROGRAM}: .*chartqa has no documents: its data set is empty.*\n", err), err


def test_cells_of_other_settings_are_one_line_and_exit_code_2(tmp_path, capsys):
    flags = ["sweep", *SMALL, "--output", str(tmp_path / "run")]
    assert run(capsys, *flags)[0] == 0
    code, out, err = run(capsys, *flags, "--generation", "max_new_tokens=2")
    assert (code, out) == (2, "")
    assert re.fullmatch(rf"{PROGRAM}: .*made with other settings \(generation\).*--existing overwrite\n", err), err
    assert run(capsys, *flags, "--generation", "max_new_tokens=2", "--existing", "overwrite")[0] == 0


def test_the_demo_of_an_old_checkout_is_made_anew(tmp_path, monkeypatch, capsys):
    """`make demo` after the weights and the version changed: a leaderboard, of new cells alone."""
    makefile = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    (demo,) = re.findall(r"^DEMO := (.*)$", makefile, re.M)
    parsed = sweep_command.parser().parse_all(shlex.split(demo))
    assert (parsed.name, parsed.existing) == ("demo", "replace-stale")
    monkeypatch.chdir(tmp_path)
    fewer = ["--limit", "2", "--tasks", "tiny_pope", "--methods", "uniform", "--device", "cpu"]
    with monkeypatch.context() as then:
        then.setattr("visionselector_eval.harness.sweep.plan.version", lambda package: "0.0")
        then.setattr("visionselector_eval.harness.sweep.plan.checkpoint_revision", lambda *a: "old weights")
        assert run(capsys, "sweep", *shlex.split(demo), *fewer)[0] == 0
        old = set(load_run("runs/demo").cells["digest"])
    plain = [flag for flag in shlex.split(demo) if flag not in ("--existing", "replace-stale")]
    code, out, err = run(capsys, "sweep", *plain, *fewer)
    assert (code, out, err.count("\n")) == (2, "", 1), "without being asked nothing is thrown away"
    code, out, _ = run(capsys, "sweep", *shlex.split(demo), *fewer)
    assert code == 0
    assert "uniform" in out
    assert "left out" not in out
    cells = load_run("runs/demo").cells
    assert len(cells) == len(old)
    assert not old & set(cells["digest"])


def test_tasks_include_gives_the_stock_command_its_folder(tmp_path, capsys):
    code, out, err = run(capsys, "tasks", "include", "--tasks", "tiny_pope", "tiny_videomme")
    assert (code, err.count("\n")) == (0, 1)
    assert "lmms-eval reads HF_HOME while it loads such tasks (nextqa): export HF_HOME=" in err
    assert run(capsys, "tasks", "include", "--tasks", "tiny_pope")[2] == ""
    folder = Path(out.strip())
    names = {"tiny_pope.yaml", "tiny_videomme.yaml", "media_tiny_videomme.py"}
    assert {file.name for file in folder.iterdir()} == names
    everything = run(capsys, "tasks", "include")
    assert {f.stem for f in Path(everything[1].strip()).glob("*.yaml")} == set(MIRRORS)
    assert everything == run(capsys, "tasks", "include", "--suite", "tiny")
    for flags, said in (
        (["--tasks", "chartqa"], "chartqa is lmms-eval's own"),
        (["--tasks", "tiny_pop"], "did you mean 'tiny_pope'"),
        (["--tasks", "tiny_pope", "--data-root", str(tmp_path)], "no --data-root"),
    ):
        code, out, err = run(capsys, "tasks", "include", *flags)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert said in err


def test_stopped_by_hand_says_that_it_can_go_on(tmp_path, monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(worker.Answerer, "answer", stop)
    code, _, err = run(capsys, "sweep", *SMALL, "--output", str(tmp_path / "run"))
    assert code == 130
    assert err.splitlines()[-1] == f"{PROGRAM}: interrupted; run the same command again to resume"


# as processes --------------------------------------------------------------------------------------------------------


def console_script() -> list[str]:
    return [str(Path(sys.executable).with_name(PROGRAM))]


@pytest.mark.parametrize(
    "program", [[sys.executable, str(ROOT / "run_eval.py")], console_script()], ids=["py", "script"]
)
def test_the_program_itself_says_one_line(program, tmp_path):
    """A mistake that shows only when the checkpoint is loaded, after every library was imported."""
    folder = broken(tmp_path / "c", truncated)
    flags = ["ask", "?", "--pretrained", folder, "--device", "cpu"]
    done = subprocess.run([*program, *flags], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(rf"{PROGRAM}: weights of .* can't be read.*\n", done.stderr), done.stderr


def test_a_reader_that_stops_early_is_no_error(tmp_path):
    """`visionselector-eval list | head -1`"""
    listing = subprocess.Popen(
        [*console_script(), "list"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, cwd=tmp_path, text=True
    )
    listing.stdout.close()
    assert listing.stderr.read() == ""
    assert listing.wait() == 0


def test_every_flag_that_is_taken_is_read():
    """A flag is read by its name, or as a field of a spec that is read; none is taken and forgotten."""
    import argparse
    import ast

    from visionselector_eval.harness.cli.commands import COMMANDS

    def flags(parser: argparse.ArgumentParser) -> Iterator[str]:
        for action in parser._actions:
            if isinstance(action, argparse._SubParsersAction):
                for inner in action.choices.values():
                    yield from flags(inner)
            elif not isinstance(action, argparse._HelpAction):
                yield action.dest

    read: set[str] = set()
    for file in (ROOT / "harness").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute):
                read.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                read.update({node.value, f"profile_{node.value}"})
    fields = {name for spec in _specs() for name in spec.model_fields}
    for name, command in COMMANDS.items():
        assert not set(flags(command.parser())) - read - fields, name


def _specs() -> list[Any]:
    from visionselector_eval.harness.profiler.spec import ProfileSpec
    from visionselector_eval.harness.sweep.spec import SweepSpec
    from visionselector_eval.harness.training.run import KINDS

    return [SweepSpec, ProfileSpec, *KINDS.values()]
