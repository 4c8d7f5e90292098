"""`examples/featurenorm` as its authors would have it: installed beside us, with no change here."""

from __future__ import annotations

import os
import re
import shutil
import site
import subprocess
import sys
from pathlib import Path

import pytest
from source_tree import ROOT

EXAMPLE = ROOT / "examples" / "featurenorm"
PAGE = ROOT / "docs" / "new-method.md"
SHORTEST = 30  # lines that a score-type method may take


def test_a_method_is_one_short_file() -> None:
    assert len((EXAMPLE / "featurenorm.py").read_text().splitlines()) <= SHORTEST


@pytest.mark.parametrize("name", ["pyproject.toml", "featurenorm.py", "tests/test_featurenorm.py"])
def test_the_page_shows_the_example_as_it_is(name: str) -> None:
    (shown,) = re.findall(rf"^```\w+ file={re.escape(Path(name).name)}\n(.*?)^```$", PAGE.read_text(), re.M | re.S)
    assert shown == (EXAMPLE / name).read_text()


@pytest.fixture(scope="module")
def scratch(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A fresh environment that sees the packages of this one, with the example installed; and the example's folder."""
    here = tmp_path_factory.mktemp("scratch")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", here / "env"], check=True)
    python = here / "env" / "bin" / "python"
    (home,) = (here / "env" / "lib").glob("python*/site-packages")
    # addsitedir also reads the .pth files there: this package may itself be installed by one.
    lines = [f"import site; site.addsitedir({folder!r})" for folder in site.getsitepackages()]
    (home / "outer.pth").write_text("\n".join(lines) + "\n")
    copy = Path(shutil.copytree(EXAMPLE, here / "featurenorm"))
    options = ["--quiet", "--no-index", "--no-deps", "--no-build-isolation"]
    run([sys.executable, "-m", "pip", "--python", str(python), "install", *options, str(copy)], copy)
    return python, copy


def run(command: list[str], folder: Path) -> str:
    """Output of a command that has to succeed."""
    done = subprocess.run(command, cwd=folder, env=os.environ, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_it_works_in_every_command_of_a_fresh_environment(scratch: tuple[Path, Path], tmp_path: Path) -> None:
    python, copy = scratch
    ours = [str(python), "-m", "visionselector_eval.harness.cli"]
    where = run([str(python), "-c", "import featurenorm; print(featurenorm.__file__)"], tmp_path)
    assert Path(where.strip()).is_relative_to(python.parents[1])

    listed = run([*ours, "list", "compressors"], tmp_path)
    assert re.search(r"^featurenorm +projector +Keeps the tokens whose features have the largest norm", listed, re.M)

    grid = ["--methods", "featurenorm", "featurenorm:power=1.0", "featurenorm+fastv", "--budgets", "0.2"]
    tiny = ["--tasks", "tiny_chartqa", "--limit", "2", "--device", "cpu"]
    board = run([*ours, "sweep", *grid, *tiny], tmp_path)
    for label in ("featurenorm", "featurenorm[power=1.0]", "featurenorm+fastv"):
        assert label in board
    assert "failed" not in board

    shown = run([*ours, "check", "featurenorm"], tmp_path)
    assert set(re.findall(r"^\w+", shown, re.M)) == {"ok"}
    assert "3 passed" in run([str(python), "-m", "pytest", "-p", "no:cacheprovider", "tests"], copy)
