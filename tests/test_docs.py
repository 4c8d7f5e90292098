"""Documents are true: their commands run, their tables are the code's.

In README.md and docs/, every block marked `sh`, `python`, `yaml` or `toml` is used, in order, in an empty folder that
holds `picture.png`; `file=NAME` writes a block there, `sh hub` is only parsed. `make docs` writes what comes from the
code.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from source_tree import ROOT

from visionselector_eval.harness.cli.arguments import profile_from, spec_from
from visionselector_eval.harness.cli.commands import COMMANDS

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OURS = (["visionselector-eval"], ["python", "run_eval.py"])


@dataclass(frozen=True)
class Block:
    document: Path
    line: int
    language: str
    words: tuple[str, ...]
    text: str

    @property
    def place(self) -> str:
        return f"{self.document.relative_to(ROOT)}:{self.line}"

    def commands(self) -> list[list[str]]:
        lines = re.sub(r"\\\n\s*", "", self.text).splitlines()
        return [shlex.split(line, comments=True) for line in lines if line.strip()]


def blocks(document: Path) -> list[Block]:
    text = document.read_text()
    found = []
    for match in re.finditer(r"^```([^\n]*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        language, *words = match[1].split() or [""]
        found.append(Block(document, text[: match.start()].count("\n") + 1, language, tuple(words), match[2]))
    assert 2 * len(found) == text.count("```")
    return found


def named(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def our_arguments(command: list[str]) -> list[str] | None:
    """Arguments of our own command, None for another program."""
    for start in OURS:
        if command[: len(start)] == start:
            return command[len(start) :]
    if command[:2] == ["accelerate", "launch"]:
        return command[command.index("visionselector_eval.harness.cli") + 1 :]
    return None


def parse_only(arguments: list[str]) -> None:
    """Check a command that needs the hub as far as possible without it."""

    arguments = list(arguments)
    name = arguments.pop(0) if arguments and not arguments[0].startswith("-") else "sweep"
    parsed = COMMANDS[name].parser().parse_all(arguments)
    if name == "sweep":
        spec_from(parsed)
    elif name == "profile":
        profile_from(parsed)


def check_lmms_eval_arguments(command: list[str]) -> None:
    import inspect

    from visionselector_eval.baselines.contract.registry import options_of
    from visionselector_eval.models.lmms_eval_models import VisionSelectorQwen2_5_VL

    arguments = dict(pair.split("=", 1) for pair in command[command.index("--model_args") + 1].split(","))
    assert set(arguments) <= {*inspect.signature(VisionSelectorQwen2_5_VL).parameters, *options_of(arguments["method"])}


def run_command(block: Block, command: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from visionselector_eval.harness import cli

    arguments = our_arguments(command)
    if "hub" in block.words:
        if arguments is not None:
            parse_only(arguments)
        elif command[:2] == ["python", "-m"]:
            importlib.import_module(command[2]).parser().parse_args(command[3:])
        else:
            check_lmms_eval_arguments(command)
    elif arguments is not None:
        code = cli.main(arguments)
        shown = capsys.readouterr()
        assert code == 0 or arguments == ["doctor"], f"{block.place}: {shlex.join(command)}\n{shown.out}{shown.err}"
    elif command[:2] == ["python", "-m"]:
        assert importlib.import_module(command[2]).main(command[3:]) == 0, f"{block.place}: {shlex.join(command)}"
    elif command[0] == "make":
        assert re.search(rf"^{command[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), command
    elif command[:2] == ["pip", "install"]:
        install_here(command, folder)
    elif command[0] == "lmms-eval":
        pass  # run by the shell, as a whole block
    else:
        pytest.fail(f"{block.place}: no test runs `{shlex.join(command)}`")


def install_here(command: list[str], folder: Path) -> None:
    """`pip install` of a document, into a folder of its own instead of the environment of the tests."""
    site = folder / "site"
    pip = [sys.executable, "-m", *command, "--quiet", "--no-index", "--target", str(site)]
    done = subprocess.run(pip, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    sys.path.insert(0, str(site))


def run_in_shell(block: Block, folder: Path) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "-euc", block.text],
        cwd=folder,
        env={**os.environ, "PATH": path, "HF_HOME": str(folder / "hf")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, f"{block.place}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    assert "Throughput Summary" in done.stdout


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    from battery import draw_image

    draw_image(112, 140).save(tmp_path / "picture.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("document", DOCUMENTS, ids=named)
def test_what_a_document_shows_runs(document: Path, workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert blocks(document)
    for block in blocks(document):
        if name := next((word.removeprefix("file=") for word in block.words if word.startswith("file=")), None):
            (workplace / name).write_text(block.text)
        elif block.language == "python":
            exec(compile(block.text, block.place, "exec"), {"__name__": "__main__"})
        elif block.language == "sh":
            commands = block.commands()
            for command in commands:
                run_command(block, command, workplace, capsys)
            if "hub" not in block.words and any(command[0] == "lmms-eval" for command in commands):
                run_in_shell(block, workplace)
        else:
            assert block.language in {"text", "mermaid"}, f"{block.place}: give a language that is tested, or `text`"


def test_a_broken_command_would_be_noticed(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = ROOT / "docs" / "sweep.md"
    with pytest.raises(AssertionError, match="did you mean"):
        run_command(
            Block(document, 1, "sh", (), ""), ["visionselector-eval", "sweep", "--budget", "0.2"], workplace, capsys
        )
    with pytest.raises(BaseException, match="no test runs"):
        run_command(Block(document, 1, "sh", (), ""), ["curl", "x"], workplace, capsys)


def test_generated_parts_are_what_the_code_says(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("build_docs", ROOT / "docs" / "build.py")
    assert spec is not None
    assert spec.loader is not None
    build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(build)
    assert build.main(["--check"]) == 0, capsys.readouterr().out
    pages = {page for page, _ in build.PARTS.values()}
    for page in pages:
        (tmp_path / page).write_text((ROOT / "docs" / page).read_text().replace("| `budgets` |", "| `budget` |"))
    build.DOCS = tmp_path
    assert build.main(["--check"]) == 1
    assert capsys.readouterr().out == "docs/sweep.md: fields is out of date: run make docs\n"
    assert build.main([]) == 0
    assert {page: (tmp_path / page).read_text() for page in pages} == {
        page: (ROOT / "docs" / page).read_text() for page in pages
    }


def test_every_method_says_where_it_comes_from_and_what_it_costs() -> None:
    import dataclasses

    from visionselector_eval.baselines.contract.registry import BUILTIN, compressor_class

    for name in BUILTIN:
        method = compressor_class(name)
        assert method.name == name
        for said in (method.paper, method.deviations, method.cost):
            assert said, name
        assert re.search(r"arXiv \d{4}\.\d{5}|^none: |AngelSlim|UniPruneBench", method.paper), name
        assert re.fullmatch(r"none|one resize.*|time O\(.*memory O\(.*\)", method.cost), name
        learned = {f.name for f in dataclasses.fields(method)} & {"scorer", "predictor"}
        assert method.trained == bool(learned), name


def test_the_model_arguments_are_listed() -> None:
    import dataclasses
    import inspect

    from visionselector_eval.models.inputs import MediaSettings
    from visionselector_eval.models.lmms_eval_models import VisionSelectorQwen2_5_VL
    from visionselector_eval.models.protocols import PROTOCOLS

    text = (ROOT / "docs" / "lmms-eval.md").read_text()
    own = {*inspect.signature(VisionSelectorQwen2_5_VL).parameters} - {"batch_size", "backbone", "options"}
    for name in (*own, *(field.name for field in dataclasses.fields(MediaSettings)), *PROTOCOLS):
        assert f"`{name}`" in text, name


@pytest.mark.parametrize("document", [*DOCUMENTS, ROOT / "CONTRIBUTING.md"], ids=named)
def test_links_and_named_files_exist(document: Path) -> None:
    text = document.read_text()
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (document.parent / target).exists(), target
    for target in re.findall(r"`((?:tests|docs|baselines|models|tasks|harness|results|examples)/[\w./-]*)`", text):
        assert (ROOT / target).exists(), target
