"""Without a UTF-8 locale: files are UTF-8 all the same, and the screen falls back to ASCII."""

from __future__ import annotations

import ast
import io
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from PIL import Image
from source_tree import ROOT

from visionselector_eval.baselines.contract.errors import InputError
from visionselector_eval.harness import terminal

COMMANDS = """
    import json, locale, sys
    assert sys.stdout.encoding.lower() in ("ascii", "ansi_x3.4-1968"), sys.stdout.encoding
    from visionselector_eval.harness import cli
    for command in json.load(open(sys.argv[1], encoding="utf-8")):
        code = cli.main([*command, *sys.argv[2:]] if command[0] == "ask" else command)
        assert code == 0, (command, code)
"""


def in_ascii(tmp_path: Path, commands: list[list[str]], *question: str) -> subprocess.CompletedProcess[bytes]:
    """The commands in one process of a plain C locale; `question` goes by the command line to `ask`."""
    (tmp_path / "commands.json").write_text(json.dumps(commands), encoding="utf-8")
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(COMMANDS), "commands.json", *(text.encode() for text in question)],
        env={**os.environ, "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONIOENCODING": ""},
        cwd=tmp_path,
        capture_output=True,
        check=False,
    )


def test_every_command_lives_in_a_plain_c_locale(tmp_path) -> None:
    Image.new("RGB", (112, 84), "white").save(tmp_path / "sign.png")
    sweep = ["--methods", "divprune", "downsample", "--budgets", "0.2", "--tasks", "tiny_pope", "--limit", "2"]
    profile = ["--methods", "divprune", "--budgets", "0.2", "--synthetic", "16", "--repeats", "1", "--warmup", "0"]
    profile += ["--memory-rounds", "1", "--max-new-tokens", "2"]
    done = in_ascii(
        tmp_path,
        [
            ["sweep", *sweep, "--device", "cpu", "--output", "run", "--system-prompt", "Sei höflich: ≈"],
            ["report", "run", "--difficulty", "--against", "full", "--published"],
            ["ask", "--image", "sign.png", "--method", "divprune", "--device", "cpu", "--max-new-tokens", "2"],
            ["profile", *profile, "--device", "cpu", "--output", "profile"],
            ["list"],
            ["list", "published"],
            ["tasks", "list"],
        ],
        "Wie groß ist die Tür?",
    )
    assert done.returncode == 0, done.stderr.decode()
    said = done.stdout.decode("ascii")
    assert "~" in said, "the sign of what is not distinguishable"
    assert "kept" in said
    done.stderr.decode("ascii")
    for name in ("leaderboard.md", "leaderboard.html", "against.md", "difficulty.md", "spec.yaml"):
        (tmp_path / "run" / name).read_text(encoding="utf-8")
    assert "≈" in (tmp_path / "run" / "leaderboard.md").read_text(encoding="utf-8")


def test_a_sign_that_the_screen_has_no_code_for_is_shown_in_ascii(monkeypatch) -> None:
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding="ascii"))
    terminal.show_what_can_be_shown()
    sys.stdout.write("1.2 ≈ ±0.3 · Tür \ud83d 東\n")
    sys.stdout.flush()
    assert raw.getvalue() == b"1.2 ~ +-0.3 - T\\xfcr \\ud83d \\u6771\n"
    full = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(full, encoding="utf-8"))
    terminal.show_what_can_be_shown()
    sys.stdout.write("≈ Tür")
    sys.stdout.flush()
    assert full.getvalue() == "≈ Tür".encode()


def test_a_question_is_read_as_utf_8_and_says_where_it_is_not(monkeypatch) -> None:
    assert terminal.free_text("Tür") == "Tür"
    monkeypatch.setattr(os, "fsencode", lambda text: text.encode("ascii", "surrogateescape"))
    assert terminal.free_text("T\udcc3\udcbcr") == "Tür"
    assert terminal.free_text("Tür") == "Tür"
    with pytest.raises(InputError, match=r"invalid text 'T\\udcfcr': expected UTF-8"):
        terminal.free_text("T\udcfcr")


def text_files_without_encoding(source: str) -> list[int]:
    """Lines of calls that open text in the locale's encoding."""
    found = []
    for call in ast.walk(ast.parse(source)):
        if not isinstance(call, ast.Call) or any(word.arg in ("encoding", None) for word in call.keywords):
            continue
        name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
        owner = getattr(getattr(call.func, "value", None), "id", "")
        words = {word.arg: ast.unparse(word.value) for word in call.keywords}
        if name in ("run", "Popen", "check_output", "check_call", "call"):
            text = "True" in (words.get("text"), words.get("universal_newlines"))
        elif name == "open":
            # a path's own open has the mode first, the built-in second; other owners open no text
            place = 0 if isinstance(call.func, ast.Attribute) else 1
            mode = words.get("mode") or (ast.unparse(call.args[place]) if len(call.args) > place else "'r'")
            text = "b" not in mode and owner not in ("os", "av", "Image", "tarfile", "zipfile", "Run")
        else:
            text = name in ("read_text", "write_text", "fdopen", "TextIOWrapper", "NamedTemporaryFile")
        if text:
            found.append(call.lineno)
    return found


def test_every_text_file_of_the_product_names_its_encoding() -> None:
    files = [ROOT / "run_eval.py"]
    for folder in ("harness", "models", "tasks", "baselines", "examples"):
        files += sorted((ROOT / folder).rglob("*.py"))
    found = [
        f"{file.relative_to(ROOT)}:{line}"
        for file in files
        for line in text_files_without_encoding(file.read_text(encoding="utf-8"))
    ]
    assert found == []
    faulty = 'open(p)\np.open("a")\np.read_text()\nsubprocess.run(a, text=True)\nopen(p, "rb")\nos.open(p, 1)\n'
    assert text_files_without_encoding(faulty) == [1, 2, 3, 4]
