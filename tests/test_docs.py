"""Documents are true: their commands run, their tables are the code's.

In README.md and docs/, every block marked `sh`, `python`, `yaml` or `toml` is used, in order, in an empty folder that
holds `picture.png`; `file=NAME` writes a block there, `sh hub` is only parsed. `python tests/test_docs.py` writes the
table of a sweep's fields and the sections of methods anew.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
from source_tree import ROOT

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
OURS = (["visionselector-eval"], ["python", "run_eval.py"])
FIELDS = ("<!-- fields: written by tests/test_docs.py -->\n", "<!-- end of fields -->")
METHODS = ("<!-- methods: written by tests/test_docs.py -->\n", "<!-- end of methods -->")


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
    return None


def parse_only(arguments: list[str]) -> None:
    """Check a command that needs the hub as far as possible without it."""
    from visionselector_eval.harness import cli

    arguments = list(arguments)
    name = arguments.pop(0) if arguments and not arguments[0].startswith("-") else "sweep"
    parsed = cli.COMMANDS[name][0]().parse_all(arguments)
    if name == "sweep":
        cli._spec_from(parsed)


def check_lmms_eval_arguments(command: list[str]) -> None:
    import inspect

    from visionselector_eval.baselines.registry import options_of
    from visionselector_eval.models.compressed import VisionSelectorQwen2_5_VL

    arguments = dict(pair.split("=", 1) for pair in command[command.index("--model_args") + 1].split(","))
    assert set(arguments) <= {*inspect.signature(VisionSelectorQwen2_5_VL).parameters, *options_of(arguments["method"])}


def run_command(block: Block, command: list[str], folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from visionselector_eval.harness import cli

    arguments = our_arguments(command)
    if "hub" in block.words:
        if arguments is not None:
            parse_only(arguments)
        else:
            check_lmms_eval_arguments(command)
    elif arguments is not None:
        code = cli.main(arguments)
        shown = capsys.readouterr()
        assert code == 0 or arguments == ["doctor"], f"{block.place}: {shlex.join(command)}\n{shown.out}{shown.err}"
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
    from battery import picture

    picture(112, 140).save(tmp_path / "picture.png")
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
            assert block.language == "text", f"{block.place}: give the block a language that is tested, or `text`"


def test_a_broken_command_would_be_noticed(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = ROOT / "docs" / "sweep.md"
    with pytest.raises(AssertionError, match="did you mean"):
        run_command(
            Block(document, 1, "sh", (), ""), ["visionselector-eval", "sweep", "--budget", "0.2"], workplace, capsys
        )
    with pytest.raises(BaseException, match="no test runs"):
        run_command(Block(document, 1, "sh", (), ""), ["curl", "x"], workplace, capsys)


# --------------------------------------------------------------------------------------------------------------- tables


def spec_table() -> str:
    """The fields of a sweep as a Markdown table."""
    from visionselector_eval.harness.cli import _shown
    from visionselector_eval.harness.spec import SweepSpec

    rows = ["| field | default | what it is |", "|---|---|---|"]
    for name, info in SweepSpec.model_fields.items():
        default = info.get_default(call_default_factory=True)
        shown = "" if default is None or default in ([], {}) else f"`{_shown(default)}`"
        rows.append(f"| `{name}` | {shown} | {info.description} |")
    return "\n".join(rows) + "\n"


def method_sections() -> str:
    """The registry as a table of all compressors and a section for each, from their docstrings and options."""
    import dataclasses
    import inspect

    from visionselector_eval.baselines.registry import BUILTIN, compressor_class

    rows = ["| method | stage | reads | trained | what it does |", "|---|---|---|---|---|"]
    sections = []
    for name in sorted(BUILTIN):
        method = compressor_class(name)
        text = inspect.getdoc(method) or ""
        options = [f for f in dataclasses.fields(method) if f.name != "upstream_exact"]
        reads = ", ".join(sorted(method.needs)) or ("hidden states" if method.stage == "decoder" else "features")
        trained = "yes" if any(f.name in ("scorer", "predictor") for f in options) else "no"
        rows.append(f"| [{name}](#{name}) | {method.stage} | {reads} | {trained} | {text.splitlines()[0]} |")
        lines = [f"- `{f.name}` (default `{f.default!r}`): {f.metadata['help']}" for f in options]
        sections.append("\n".join([f"## {name}", "", text, *(["", "Options:", "", *lines] if lines else [])]))
    return "\n".join(rows) + "\n\n" + "\n\n".join(sections) + "\n\n"


def rewritten(text: str, markers: tuple[str, str], content: str) -> str:
    start, end = text.index(markers[0]) + len(markers[0]), text.index(markers[1])
    return text[:start] + content + text[end:]


def with_spec_table(text: str) -> str:
    return rewritten(text, FIELDS, spec_table())


def with_method_sections(text: str) -> str:
    return rewritten(text, METHODS, method_sections())


def test_the_table_of_fields_is_the_spec() -> None:
    text = (ROOT / "docs" / "sweep.md").read_text()
    assert text == with_spec_table(text), "run `python tests/test_docs.py`"


def test_the_sections_of_methods_are_the_registry() -> None:
    text = (ROOT / "docs" / "methods.md").read_text()
    assert text == with_method_sections(text), "run `python tests/test_docs.py`"


def test_the_model_arguments_are_listed() -> None:
    import dataclasses
    import inspect

    from visionselector_eval.models.compressed import VisionSelectorQwen2_5_VL
    from visionselector_eval.models.inputs import MediaSettings
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
    for target in re.findall(r"`((?:tests|docs|baselines|models|tasks|harness|results)/[\w./-]*)`", text):
        assert (ROOT / target).exists(), target


if __name__ == "__main__":
    for file, write in (("sweep.md", with_spec_table), ("methods.md", with_method_sections)):
        page = ROOT / "docs" / file
        page.write_text(write(page.read_text()))
